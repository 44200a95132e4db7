"""The file system with faults does what the fault tests rely on."""

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fuse_files import FuseFiles, fuse_files, small_tmpfs
from support.fuse_server import O_DIRECT

DATA = bytes(range(256)) * 64  # 16 KiB
WAYS = {"buffered": 0, "O_DIRECT": O_DIRECT}

pytestmark = pytest.mark.processes


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FuseFiles]:
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    (source / "a.bin").write_bytes(DATA)
    (source / "folder" / "b.bin").write_bytes(DATA[::-1])
    with fuse_files(source, tmp_path / "mount") as files:
        yield files


def read(path: Path, offset: int, num_bytes: int, flags: int = 0) -> bytes:
    memory = mmap.mmap(-1, num_bytes)  # aligned, as O_DIRECT wants it
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        return memory[: os.preadv(descriptor, [memory], offset)]
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_files_and_folders_show_through(files: FuseFiles, flags: int) -> None:
    assert sorted(p.name for p in files.path.iterdir()) == ["a.bin", "folder"]
    assert (files.path / "folder" / "b.bin").read_bytes() == DATA[::-1]
    assert (files.path / "a.bin").stat().st_size == len(DATA)
    assert read(files.path / "a.bin", 4096, 8192, flags) == DATA[4096:12288]
    assert files.take_reads()[-1] == ("a.bin", 4096, 8192)
    with pytest.raises(FileNotFoundError):
        (files.path / "folder" / "c.bin").read_bytes()
    with pytest.raises(OSError, match="Read-only"):
        (files.path / "new").write_bytes(b"")


@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_a_range_fails_so_many_times_and_then_reads(files: FuseFiles, flags: int) -> None:
    path = files.path / "a.bin"
    files.fail("a.bin", offset=4096, num_bytes=1, times=2)
    assert read(path, 0, 4096, flags) == DATA[:4096]
    for _ in range(2):
        with pytest.raises(OSError) as failed:
            read(path, 4096, 4096, flags)
        assert failed.value.errno == errno.EIO
    assert read(path, 4096, 4096, flags) == DATA[4096:8192]


@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_reads_come_short_and_files_shrink(files: FuseFiles, flags: int) -> None:
    path = files.path / "a.bin"
    files.shorten("a.bin", 512, offset=8192, times=1)
    assert read(path, 8192, 4096, flags) == DATA[8192 : 8192 + 512]
    assert read(path, 8192, 4096, flags) == DATA[8192:12288]
    files.truncate("a.bin", 10000)
    assert path.stat().st_size == 10000
    assert read(path, 8192, 4096, flags) == DATA[8192:10000]
    assert read(path, 12288, 4096, flags) == b""
    files.clear()
    assert read(path, 12288, 4096, flags) == DATA[12288:]


def test_a_held_read_waits_to_be_released(files: FuseFiles) -> None:
    files.hold("a.bin", offset=4096, num_bytes=4096)
    came: list[bytes] = []
    path = files.path / "a.bin"
    reader = threading.Thread(target=lambda: came.append(read(path, 4096, 4096, O_DIRECT)))
    reader.start()
    files.wait_held(1)
    assert came == [] and read(path, 0, 4096) == DATA[:4096]
    files.release()
    reader.join()
    assert came == [DATA[4096:8192]]


def test_direct_io_can_be_refused(files: FuseFiles) -> None:
    files.refuse_direct()
    with pytest.raises(OSError) as refused:
        read(files.path / "a.bin", 0, 4096, O_DIRECT)
    assert refused.value.errno == errno.EINVAL
    assert read(files.path / "a.bin", 0, 4096) == DATA[:4096]


def test_a_small_tmpfs_is_soon_full(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", 8192) as folder:
        with pytest.raises(OSError) as full:
            (folder / "file").write_bytes(bytes(16384))
        assert full.value.errno == errno.ENOSPC
