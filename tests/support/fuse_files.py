"""A folder seen through a file system with faults: errors, short reads, reads that never end.

with fuse_files(source, tmp_path / "mount") as files:      # skips where FUSE is missing
    files.fail("experts-0.bin", offset=4096, num_bytes=4096, times=2)   # EIO, twice
    ... read files.path / "experts-0.bin" ...
    files.hold("experts-0.bin")          # reads of it wait ...
    files.wait_held(1)                   # ... one is there ...
    files.release()                      # ... and goes on: placed, not timed

Linux shows these errors to every way of reading, io_uring among them; a preloaded library would
not. Nothing is cached between reader and file, so every read meets its fault.
"""

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.fuse_server import MNT_DETACH, mount_folder

SERVER = Path(__file__).with_name("fuse_server.py")
EXIT_TIMEOUT_S = 30.0
END = 1 << 62  # of any file


class NoFuse(Exception):
    """This machine, or these rights, cannot mount a FUSE file system."""


class FuseFiles:
    """A mounted view of `source`. `path`: where it is. Faults are given per file and range."""

    def __init__(self, source: Path, mount: Path) -> None:
        """Mount it. Raises NoFuse saying what is missing."""
        if not Path("/dev/fuse").exists():
            raise NoFuse("there is no /dev/fuse")
        mount.mkdir()
        self.path = mount
        self._server = subprocess.Popen(
            [sys.executable, "-I", str(SERVER), str(source.resolve()), str(mount)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        first = self._reply()
        if "error" in first:
            self.close()
            raise NoFuse(first["error"])

    def fail(
        self,
        name: str,
        *,
        offset: int = 0,
        num_bytes: int = END,
        times: int | None = None,
        number: int = errno.EIO,
    ) -> None:
        """Let reads that touch the range fail, `times` times (None: for ever)."""
        self._fault("error", name, offset, num_bytes, times, number)

    def shorten(
        self,
        name: str,
        to_bytes: int,
        *,
        offset: int = 0,
        num_bytes: int = END,
        times: int | None = None,
    ) -> None:
        """Let reads that touch the range bring at most `to_bytes`."""
        self._fault("short", name, offset, num_bytes, times, to_bytes)

    def hold(
        self, name: str, *, offset: int = 0, num_bytes: int = END, times: int | None = None
    ) -> None:
        """Let reads that touch the range wait for `release`."""
        self._fault("hold", name, offset, num_bytes, times, 0)

    def wait_held(self, count: int) -> None:
        """Return once at least that many reads wait."""
        self._order(do="wait_held", count=count)

    def release(self) -> None:
        """Answer every held read and hold no more."""
        self._order(do="release")

    def truncate(self, name: str, size: int) -> None:
        """Let the file look that short, also to those who have it open."""
        self._order(do="resize", name=name, size=size)

    def refuse_direct(self) -> None:
        """Refuse to open with O_DIRECT (EINVAL), as some file systems do."""
        self._order(do="refuse_direct")

    def clear(self) -> None:
        """Forget faults and truncations. Held reads stay held."""
        self._order(do="clear")

    def take_reads(self) -> list[tuple[str, int, int]]:
        """Return (name, offset, bytes) of each read since the last time, as the kernel cut them."""
        return [(name, offset, size) for name, offset, size in self._order(do="reads")["reads"]]

    def close(self) -> None:
        """Unmount and end the server. Safe to call again."""
        unmount(self.path)
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(EXIT_TIMEOUT_S)

    def _fault(
        self, kind: str, name: str, offset: int, num_bytes: int, times: int | None, value: int
    ) -> None:
        assert (self.path / name).exists(), name
        end = offset + num_bytes
        self._order(
            do="fault", kind=kind, name=name, offset=offset, end=end, times=times, value=value
        )

    def _order(self, **order: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the FUSE server has died: see its traceback on stderr"
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def fuse_files(source: Path, mount: Path) -> Iterator[FuseFiles]:
    """Mount `source` at the new folder `mount` for the block; skip the test where that fails."""
    try:
        files = FuseFiles(source, mount)
    except NoFuse as reason:
        pytest.skip(f"needs FUSE: {reason}")
    try:
        yield files
    finally:
        files.close()


@contextmanager
def small_tmpfs(mount: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of that size at the new folder `mount`; skips where it cannot be mounted."""
    mount.mkdir()
    try:
        mount_folder(mount, "tmpfs", 0, f"size={num_bytes}")
    except OSError as error:
        pytest.skip(f"needs the right to mount: {error}")
    try:
        yield mount
    finally:
        unmount(mount)


def unmount(where: Path) -> None:
    """Take a mount away, whoever still uses it; nothing if there is none."""
    ctypes.CDLL(None).umount2(os.fsencode(where), MNT_DETACH)
