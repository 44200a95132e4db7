"""How fast the drive is without any cache: fio where it is installed, else our own O_DIRECT reads.

And how to make files cold: `forget` drops their pages without a word to the rest of the machine.
"""

import ctypes
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux
BLOCK_BYTES = 1 << 20
QUEUE_DEPTH = 32
SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Random O_DIRECT reads. tool: who measured."""

    gb_per_s: float
    tool: str


def disk_speed(
    path: Path,
    seconds: float = SECONDS,
    *,
    block_bytes: int = BLOCK_BYTES,
    queue_depth: int = QUEUE_DEPTH,
) -> DiskSpeed:
    """Measure on a file that nobody writes to. Raises OSError where it cannot be read.

    block_bytes, queue_depth: of fio; our own reads are of BLOCK_BYTES, QUEUE_DEPTH of them.
    """
    if shutil.which("fio") is None:
        return DiskSpeed(_own_probe(path, seconds), "own preads (fio is not installed)")
    version = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True)
    options = [f"--filename={path}", "--rw=randread", f"--bs={block_bytes}", "--direct=1"]
    options += [f"--iodepth={queue_depth}", "--readonly", "--norandommap", "--output-format=json"]
    options += ["--time_based", f"--runtime={seconds}", "--name=probe"]
    for engine in ("io_uring", "libaio"):  # containers often forbid the first
        command = ["fio", f"--ioengine={engine}", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            [job] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
            return DiskSpeed(job["read"]["bw_bytes"] / 1e9, f"{version.stdout.strip()}, {engine}")
    raise OSError(f"fio cannot read {path}: {done.stderr.strip()}")


def _own_probe(path: Path, seconds: float) -> float:
    descriptor = os.open(path, os.O_RDONLY | O_DIRECT)
    blocks = os.fstat(descriptor).st_size // BLOCK_BYTES
    end_s = time.perf_counter() + seconds

    def read(seed: int) -> int:
        buffer, draw, num_bytes = mmap.mmap(-1, BLOCK_BYTES), random.Random(seed), 0
        while time.perf_counter() < end_s:
            num_bytes += os.preadv(descriptor, [buffer], draw.randrange(blocks) * BLOCK_BYTES)
        return num_bytes

    try:
        began_s = time.perf_counter()
        with ThreadPoolExecutor(QUEUE_DEPTH) as readers:
            num_bytes = sum(readers.map(read, range(QUEUE_DEPTH)))
        return num_bytes / (time.perf_counter() - began_s) / 1e9
    finally:
        os.close(descriptor)


@contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[int]:
    """Let the kernel read that much ahead on the file's drive for the block; yield what it was.

    A setting of the whole machine, restored at the end. Needs root.
    """
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    setting = (folder if (folder / "queue").exists() else folder.parent) / "queue/read_ahead_kb"
    before = setting.read_text().strip()
    setting.write_text(str(kib))
    try:
        yield int(before)
    finally:
        setting.write_text(before)


def files_of(path: Path) -> list[Path]:
    """Return the file, or every file below the folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def forget(paths: Sequence[Path]) -> None:
    """Drop the files' pages from the page cache; nobody may have them mapped."""
    if sys.platform != "linux":
        raise OSError("only Linux forgets pages on request")
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_bytes(paths: Sequence[Path]) -> int:
    """Return how many bytes of the files the page cache holds (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    total = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        if pages:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            states = ctypes.create_string_buffer(pages)
            libc.mincore(address, size, states)
            libc.munmap(address, size)
            total += sum(state & 1 for state in states.raw[:pages]) * mmap.PAGESIZE
        os.close(descriptor)
    return total
