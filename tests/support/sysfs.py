"""A sysfs of our own: one NVMe drive with a sensor, said to hold whatever lies beside a path."""

import os
from pathlib import Path


class FakeDrive:
    """The drive under `path`, as DriveSensors and `shoal node --sysfs` find it below `root`."""

    def __init__(self, root: Path, path: Path, celsius: float) -> None:
        self.root = root
        controller = root / "devices/pci/nvme/nvme0"
        drive = controller / "nvme0n1"
        (drive / "queue").mkdir(parents=True)
        self._hwmon = controller / "hwmon0"
        self._hwmon.mkdir()
        (self._hwmon / "name").write_text("nvme\n")
        (self._hwmon / "device").symlink_to(controller)
        for folder in ("dev/block", "class/hwmon"):
            (root / folder).mkdir(parents=True)
        (root / "class/hwmon/hwmon0").symlink_to(self._hwmon)
        number = path.stat().st_dev
        (root / f"dev/block/{os.major(number)}:{os.minor(number)}").symlink_to(drive)
        self.set_celsius(celsius)

    def set_celsius(self, celsius: float) -> None:
        """Let the sensor say so, whole: a reader never sees half a number."""
        partial = self._hwmon / "partial"
        partial.write_text(f"{round(celsius * 1000)}\n")
        partial.replace(self._hwmon / "temp1_input")
