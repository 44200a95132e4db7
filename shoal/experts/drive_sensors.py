"""The temperatures of the drives that hold some files, as Linux tells them in sysfs.

A file's device number leads to its block device, that one's partition and mapper layers to whole
drives, and a drive to the hwmon that its driver registered (`nvme`; `drivetemp` for SATA). Virtual
machines usually have none: no sensor is a state, never a failure.

Source: Linux, Documentation/hwmon/sysfs-interface.rst and drivers/nvme/host/hwmon.c (temp1 is the
composite temperature in thousandths of a degree, temp1_max the drive's warning threshold).
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DRIVERS = ("nvme", "drivetemp")
PLAUSIBLE_C = (-40.0, 150.0)  # a sensor that says anything else is broken
_MAX_LAYERS = 8  # of device mapper and md below one file system


@dataclass(frozen=True, slots=True)
class Temperature:
    """One drive's reading. warning_c: where the drive itself complains; None: it does not say."""

    drive: str
    celsius: float
    warning_c: float | None


@dataclass(frozen=True, slots=True)
class _Sensor:
    drive: str
    folder: Path


class DriveSensors:
    """The sensors behind some paths; found once, read many times."""

    def __init__(
        self,
        paths: Collection[Path],
        root: Path = Path("/sys"),
        device_of: Callable[[Path], int] | None = None,
    ) -> None:
        """Find the sensors.

        Args:
            root: of sysfs. device_of: the device number of a path; None: ask the system.
        """
        self._root = root
        numbers = {number for path in paths if (number := _device(path, device_of)) is not None}
        drives = {drive for number in numbers for drive in self._drives(number)}
        hwmons = list(self._hwmons())
        self._sensors = [sensor for sensor in hwmons if sensor.drive in drives]

    @property
    def drives(self) -> tuple[str, ...]:
        """The drives that have a sensor; empty: nothing to read."""
        return tuple(sensor.drive for sensor in self._sensors)

    def read(self) -> list[Temperature]:
        """Return what the sensors say now; one that fails or talks nonsense is left out."""
        readings = []
        for sensor in self._sensors:
            celsius = _celsius(sensor.folder / "temp1_input")
            if celsius is not None:
                warning_c = _celsius(sensor.folder / "temp1_max")
                readings.append(Temperature(sensor.drive, celsius, warning_c))
        return readings

    def _drives(self, number: int) -> Iterator[str]:
        # Whole drives under a device number: nvme0n1 of partition nvme0n1p2, sda and sdb of dm-0.
        block = self._root / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
        yield from self._whole(block, _MAX_LAYERS)

    def _whole(self, block: Path, layers_left: int) -> Iterator[str]:
        with suppress(OSError):
            block = block.resolve(strict=True)
            if (block / "partition").exists():
                block = block.parent
            slaves = sorted((block / "slaves").iterdir()) if (block / "slaves").is_dir() else []
            if not slaves or not layers_left:
                yield block.name
            for slave in slaves:
                yield from self._whole(slave, layers_left - 1)

    def _hwmons(self) -> Iterator[_Sensor]:
        # hwmonN/device is the controller (nvme0) or the SCSI device; the drives are below it.
        with suppress(OSError):
            for folder in sorted((self._root / "class/hwmon").iterdir()):
                with suppress(OSError):
                    if (folder / "name").read_text().strip() in DRIVERS:
                        device = (folder / "device").resolve(strict=True)
                        yield from (_Sensor(name, folder) for name in _blocks_of(device))


def _blocks_of(device: Path) -> Iterator[str]:
    # nvme: .../nvme/nvme0/{nvme0n1,hwmon0}; its multipath head may lie elsewhere: nvme0c0n1 here.
    # SATA: .../1:0:0:0/block/sda.
    for folder in (device, device / "block"):
        if folder.is_dir():
            for entry in sorted(folder.iterdir()):
                if (entry / "size").exists() or (entry / "queue").is_dir():
                    yield _head_of(entry.name)


def _head_of(name: str) -> str:
    # nvme0c1n1 is path 1 to the drive nvme0n1.
    left, middle, right = name.partition("c")
    path, n, namespace = right.partition("n")
    if middle and n and left.startswith("nvme") and path.isdecimal() and namespace.isdecimal():
        return f"{left}n{namespace}"
    return name


def _device(path: Path, device_of: Callable[[Path], int] | None) -> int | None:
    try:
        return device_of(path) if device_of is not None else path.stat().st_dev
    except OSError:
        return None


def _celsius(file: Path) -> float | None:
    try:
        celsius = int(file.read_text()) / 1000
    except (OSError, ValueError):
        return None
    return celsius if PLAUSIBLE_C[0] <= celsius <= PLAUSIBLE_C[1] else None
