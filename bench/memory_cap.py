"""A memory cgroup for benchmarks: a process and its page cache live within so many bytes.

with MemoryCap("shoal-bench", 2_000_000_000) as cap:
    subprocess.run(cap.command(["shoal", "run", ...]))
    cap.usage()      # memory of processes, page cache, how often the limit was met

Versions 1 and 2 of Linux's cgroups; both count the page cache of what the group was first to read.
Needs root, or a delegated group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOT_V1 = Path("/sys/fs/cgroup/memory")
ROOT_V2 = Path("/sys/fs/cgroup")


class NoMemoryCap(Exception):
    """No memory cgroup can be made here; says why."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group holds now, and what has happened to it.

    process_bytes: memory of its processes; cache_bytes: page cache charged to it. peak_bytes: of
    both together. num_limited: how often an allocation met the limit; num_killed: processes that
    the kernel killed for it.
    """

    process_bytes: int
    cache_bytes: int
    peak_bytes: int
    num_limited: int
    num_killed: int


class MemoryCap:
    """A group of its own with a limit; removed at the end of the `with` block, once it is empty."""

    def __init__(
        self, name: str, limit_bytes: int, *, v1: Path = ROOT_V1, v2: Path = ROOT_V2
    ) -> None:
        """Make the group. v1, v2: where the two versions are mounted. Raises NoMemoryCap."""
        self.limit_bytes = limit_bytes
        self.is_v1 = (v1 / "memory.limit_in_bytes").exists()
        self.path = (v1 if self.is_v1 else v2) / name
        try:
            if not self.is_v1:
                (v2 / "cgroup.subtree_control").write_text("+memory")
            self.path.mkdir()
            self._set_limit()
        except OSError as error:
            raise NoMemoryCap(f"{self.path}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_v1:
            (self.path / "memory.force_empty").write_text("0")
        self.path.rmdir()

    def command(self, command: Sequence[str]) -> list[str]:
        """Return a command that joins the group and becomes `command`."""
        joins = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", joins, str(self.path / "cgroup.procs"), *command]

    def usage(self) -> Usage:
        """Return what the group holds now."""
        stat = dict(line.split() for line in self._read("memory.stat").splitlines())
        if self.is_v1:
            control = dict(line.split() for line in self._read("memory.oom_control").splitlines())
            return Usage(
                int(stat["total_rss"]),
                int(stat["total_cache"]),
                int(self._read("memory.max_usage_in_bytes")),
                int(self._read("memory.failcnt")),
                int(control.get("oom_kill", 0)),
            )
        events = dict(line.split() for line in self._read("memory.events").splitlines())
        peak = self._read("memory.peak") if (self.path / "memory.peak").exists() else "0"
        return Usage(
            int(stat["anon"]),
            int(stat["file"]),
            int(peak),
            int(events["max"]),
            int(events["oom_kill"]),
        )

    def _set_limit(self) -> None:
        limit = str(self.limit_bytes)
        if self.is_v1:
            (self.path / "memory.limit_in_bytes").write_text(limit)
            return
        (self.path / "memory.max").write_text(limit)
        if (self.path / "memory.swap.max").exists():
            (self.path / "memory.swap.max").write_text("0")

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()
