"""How much memory this process may use: what is installed, or what a control group grants.

Control groups nest: the smallest limit on the way from the process's own group to the root holds.
Both versions are read: `memory.max` of the unified hierarchy, `memory.limit_in_bytes` of version 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

NO_LIMIT_V1 = 1 << 62  # version 1 writes 2^63 less a page where there is no limit


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The most memory this process can have, and what says so."""

    num_bytes: int
    source: str


def memory_limit(
    proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup"), installed: int | None = None
) -> MemoryLimit:
    """Return the tightest limit.

    Args:
        proc, cgroup: where these file systems are mounted. installed: None: ask the system.
    """
    total = psutil.virtual_memory().total if installed is None else installed
    tightest = MemoryLimit(total, "this machine's memory")
    if sys.platform != "linux":
        return tightest
    for file in _limit_files(proc, cgroup):
        granted = _granted(file)
        if granted is not None and granted < tightest.num_bytes:
            tightest = MemoryLimit(granted, f"the control group's limit ({file})")
    return tightest


def _limit_files(proc: Path, cgroup: Path) -> list[Path]:
    files: list[Path] = []
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2, alone or beside version 1
            roots, name = [cgroup, cgroup / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            roots, name = [cgroup / "memory"], "memory.limit_in_bytes"
        else:
            continue
        for root in roots:
            own = root / group.lstrip("/")
            files += [folder / name for folder in (own, *own.parents) if _is_within(folder, root)]
    # A container often sees its own group at the root of the mount, whatever its path says.
    files += [cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes"]
    return list(dict.fromkeys(files))


def _is_within(folder: Path, root: Path) -> bool:
    return folder == root or root in folder.parents


def _granted(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    if not text.isdecimal() or int(text) >= NO_LIMIT_V1:
        return None
    return int(text)
