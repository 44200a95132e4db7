"""Drive temperatures from a sysfs that the test makes."""

import os
from pathlib import Path

import pytest

from shoal.experts.drive_sensors import DriveSensors, Temperature

NVME = os.makedev(259, 2)
MAPPED = os.makedev(253, 0)
SATA = os.makedev(8, 1)


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """nvme0 (drive nvme0n1 with a partition), nvme1 (a multipath head), sda, dm-0 on both nvmes."""
    root = tmp_path / "sys"
    for name in ("dev/block", "class/hwmon", "block"):
        (root / name).mkdir(parents=True)
    for number, block in enumerate(("nvme0n1", "nvme1c1n1")):
        controller = root / f"devices/pci/nvme/nvme{number}"
        (controller / block / "queue").mkdir(parents=True)
        hwmon(root, number, "nvme", controller, 41_850 + number * 1000)
    part = root / "devices/pci/nvme/nvme0/nvme0n1/nvme0n1p2"
    part.mkdir()
    (part / "partition").write_text("2\n")
    head = root / "devices/virtual/nvme-subsystem/nvme1n1"
    (head / "queue").mkdir(parents=True)
    disk = root / "devices/ata/1:0:0:0"
    (disk / "block/sda/sda1").mkdir(parents=True)
    (disk / "block/sda/size").write_text("100\n")
    (disk / "block/sda/sda1/partition").write_text("1\n")
    hwmon(root, 2, "drivetemp", disk, 33_000)
    hwmon(root, 3, "coretemp", root / "devices", 90_000)
    slaves = root / "devices/virtual/block/dm-0/slaves"
    slaves.mkdir(parents=True)
    (slaves / "nvme0n1p2").symlink_to(part)
    (slaves / "nvme1n1").symlink_to(head)
    for name, target in (
        ("259:2", part),
        ("253:0", slaves.parent),
        ("8:1", disk / "block/sda/sda1"),
    ):
        (root / "dev/block" / name).symlink_to(target)
    return root


def hwmon(root: Path, number: int, name: str, device: Path, thousandths: int) -> None:
    folder = device / f"hwmon{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "temp1_input").write_text(f"{thousandths}\n")
    if name == "nvme":
        (folder / "temp1_max").write_text("81850\n")
    (folder / "device").symlink_to(device)
    (root / f"class/hwmon/hwmon{number}").symlink_to(folder)


def sensors(root: Path, *numbers: int) -> DriveSensors:
    devices = {Path(str(number)): number for number in numbers}
    return DriveSensors(list(devices), root, lambda path: devices[path])


def test_the_drive_of_a_partition_is_read(sysfs: Path) -> None:
    found = sensors(sysfs, NVME)
    assert found.drives == ("nvme0n1",)
    assert found.read() == [Temperature("nvme0n1", 41.85, 81.85)]


def test_a_mapped_device_is_all_of_its_drives(sysfs: Path) -> None:
    readings = sensors(sysfs, MAPPED).read()
    assert [(r.drive, r.celsius) for r in readings] == [("nvme0n1", 41.85), ("nvme1n1", 42.85)]


def test_a_sata_drive_is_read_by_drivetemp(sysfs: Path) -> None:
    assert sensors(sysfs, SATA).read() == [Temperature("sda", 33.0, None)]


def test_only_the_drives_of_the_paths_are_read(sysfs: Path) -> None:
    assert sensors(sysfs, NVME, SATA).drives == ("nvme0n1", "sda")
    assert sensors(sysfs, os.makedev(0, 99)).drives == ()


@pytest.mark.parametrize("text", ["", "many\n", "-273150\n", "999999999\n"])
def test_nonsense_is_no_reading(sysfs: Path, text: str) -> None:
    found = sensors(sysfs, NVME)
    (sysfs / "class/hwmon/hwmon0/temp1_input").write_text(text)
    assert found.read() == []


def test_a_sensor_that_goes_away_is_no_reading(sysfs: Path) -> None:
    found = sensors(sysfs, NVME)
    (sysfs / "class/hwmon/hwmon0/temp1_input").unlink()
    assert found.read() == []


def test_a_machine_without_sysfs_has_no_sensors(tmp_path: Path) -> None:
    assert DriveSensors([tmp_path], tmp_path / "none").drives == ()


def test_a_path_that_does_not_exist_is_left_out(sysfs: Path, tmp_path: Path) -> None:
    assert DriveSensors([tmp_path / "none"], sysfs).drives == ()
