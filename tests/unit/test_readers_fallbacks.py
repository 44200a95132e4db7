"""Readers where the system refuses: direct reads, io_uring, locked memory, aligned blocks."""

import errno
import mmap
import os
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import UsageError
from shoal.experts.readers import Backend, Read, Source, Tuning, open_reader
from shoal.experts.readers.open_reader import explain
from shoal.experts.readers.queue_reader import Operation
from shoal.experts.readers.thread_reader import ThreadReader
from shoal.ops.reads import Ring
from support.held_reader import until
from support.readers import PAGE, aligned, collect, open_here, random_bytes, read_one, ring_problem

FILE_PAGES = 512
LINUX = sys.platform == "linux"


@pytest.fixture(scope="module")
def content() -> bytes:
    return random_bytes(FILE_PAGES)


@pytest.fixture(scope="module")
def file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readers") / "experts"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("wanted", [Backend.IO_URING, Backend.PREAD])
def test_a_file_system_of_large_blocks_is_read_through_buffers_of_ours(
    wanted: Backend, file: Path, content: bytes
) -> None:
    if wanted is Backend.IO_URING and (problem := ring_problem()):
        pytest.skip(problem)
    tuning = Tuning(8 * PAGE, alignment_of=lambda _: (16 * PAGE, PAGE))
    with closing(open_here(wanted, [file], tuning)) as reader:
        for offset in (0, 3 * PAGE, 16 * PAGE):
            assert read_one(reader, file, offset, 33)[1] == content[offset : offset + 33 * PAGE]
        figures = reader.figures()
        assert figures.num_bounced > 0
        assert figures.num_buffered == 0
        assert 0 < figures.bounce_buffers <= figures.num_bounced
    with closing(open_here(wanted, [file], replace(tuning, bounce_limit_bytes=0))) as reader:
        assert read_one(reader, file, 3 * PAGE, 33)[1] == content[3 * PAGE : 36 * PAGE]
        figures = reader.figures()
        assert (figures.num_bounced, figures.bounce_buffers) == (0, 0)
        assert (figures.num_buffered, figures.num_unbounced) == (0, 5)


def test_buffers_grow_to_their_bound_run_out_and_come_back(
    tmp_path: Path, file: Path, content: bytes
) -> None:
    """Eight misaligned chunks and two buffers; reads end when the test says so."""
    chunk = 8 * PAGE
    tuning = Tuning(
        chunk,
        queue_depth=8,
        bounce_limit_bytes=2 * (chunk + 2 * 16 * PAGE),
        alignment_of=lambda _: (16 * PAGE, PAGE),
    )
    may_end = threading.Semaphore(0)
    states: list[tuple[int, bool, int]] = []

    class Held(ThreadReader):
        def _take(self) -> Operation | None:
            operation = super()._take()
            bounce = self._bounce
            states.append((bounce.num_buffers, bounce.is_exhausted, bounce.num_refused))
            self._lock.release()
            may_end.acquire()
            self._lock.acquire()
            return operation

    with closing(Held(Backend.PREAD, "", [file], tuning)) as reader:
        out = aligned(8 * 8)
        reader.submit([Read(0, (Source(file, 3 * PAGE),), out)])
        until(lambda: len(states) == 8)
        assert states == [(1, False, 0), (2, False, 0), *((2, True, n) for n in range(1, 7))]
        assert reader.figures().is_bounce_exhausted
        for _ in range(32):
            may_end.release()
        assert collect(reader, 1)[0].error is None
        assert out.tobytes() == content[3 * PAGE : 67 * PAGE]
        figures = reader.figures()
        assert (figures.bounce_buffers, figures.num_bounced, figures.num_unbounced) == (2, 2, 6)
        assert figures.num_buffered == 0 and not figures.is_bounce_exhausted
        assert read_one(reader, file, 3 * PAGE, 8)[0].error is None
        assert reader.figures().num_bounced == 3, "buffers that came back are used again"


def test_few_reads_get_fewer_places_at_the_drive_which_the_figures_say(file: Path) -> None:
    with closing(open_reader(Backend.BUFFERED, None, [file])) as reader:
        assert (reader.figures().queue_depth, reader.figures().depth_now) == (32, 6)
        reader.set_queue_depth(16)
        assert (reader.figures().queue_depth, reader.figures().depth_now) == (16, 3)


@pytest.mark.skipif(not LINUX, reason="O_DIRECT")
@pytest.mark.parametrize("wanted", [Backend.IO_URING, Backend.PREAD])
def test_a_direct_read_that_is_refused_after_all_is_made_through_the_page_cache(
    wanted: Backend, file: Path, content: bytes
) -> None:
    # Told that no alignment is needed, we ask for an odd offset: the kernel answers EINVAL.
    if wanted is Backend.IO_URING and (problem := ring_problem()):
        pytest.skip(problem)
    with closing(open_here(wanted, [file], Tuning(alignment_of=lambda _: (1, 1)))) as reader:
        done, read = read_one(reader, file, 33, 20)
        assert (done.error, read) == (None, content[33 : 33 + 20 * PAGE])
        figures = reader.figures()
        if not figures.num_buffered:
            pytest.skip("this file system takes direct reads at odd offsets")
        assert "EINVAL" in figures.fallbacks[str(file)]
        assert read_one(reader, file, 0, 20)[1] == content[: 20 * PAGE]


def test_a_file_system_without_direct_reads_is_buffered_and_says_so(
    file: Path, content: bytes
) -> None:
    tuning = Tuning(alignment_of=lambda _: (0, 0))

    def no_ring(_: int) -> Ring:
        raise OSError(errno.EPERM, "no")

    with closing(open_reader(None, None, [file], tuning=tuning, open_ring=no_ring)) as reader:
        assert reader.backend is Backend.BUFFERED
        assert "no io_uring" in reader.why
        assert "no direct reads" in reader.why
        assert str(file) in reader.why
        assert read_one(reader, file, 0, 5)[1] == content[: 5 * PAGE]
    with pytest.raises(UsageError, match="--io pread: no direct reads"):
        open_reader(Backend.PREAD, None, [file], tuning=tuning)
    with pytest.raises(UsageError, match="--io io_uring: no io_uring"):
        open_reader(Backend.IO_URING, None, [file], open_ring=no_ring)
    if not ring_problem():
        with closing(open_reader(Backend.IO_URING, None, [file], tuning=tuning)) as reader:
            assert read_one(reader, file, 0, 5)[1] == content[: 5 * PAGE]
            assert reader.figures().num_buffered == 1
            assert "statx" in reader.figures().fallbacks[str(file)]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs to read from")
def test_a_tmpfs_is_read_whatever_it_thinks_of_direct_reads(file: Path, content: bytes) -> None:
    path = Path(f"/dev/shm/shoal-readers-{os.getpid()}")
    path.write_bytes(content)
    try:
        with closing(open_reader(None, None, [path])) as reader:
            assert read_one(reader, path, 8 * PAGE, 50)[1] == content[8 * PAGE : 58 * PAGE]
            depth = reader.figures().queue_depth
        if path.stat().st_dev != file.stat().st_dev:  # two drives have twice the places
            with closing(open_reader(None, None, [path, file])) as reader:
                assert reader.figures().queue_depth == 2 * depth
    finally:
        path.unlink()


def test_pinned_memory_is_pinned_once_it_was_filled_and_can_be_given_back(
    file: Path, content: bytes
) -> None:
    if problem := ring_problem():
        pytest.skip(problem)
    size = 200 * PAGE
    with (
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        closing(open_reader(Backend.IO_URING, None, [file])) as reader,
    ):
        arena = np.frombuffer(memory, np.uint8)
        reader.register([arena])
        assert reader.figures().pinned_bytes == 0
        for offset in (0, PAGE):
            reader.submit([Read(0, (Source(file, offset),), arena)])
            assert collect(reader, 1)[0].error is None
            assert arena.tobytes() == content[offset : offset + size]
        assert reader.figures().pinned_bytes == size or "not pinned" in reader.why
        reader.register([])
        assert reader.figures().pinned_bytes == 0
        if LINUX:
            memory.madvise(mmap.MADV_DONTNEED)
            assert not arena.any()
        reader.submit([Read(0, (Source(file, 0),), arena)])
        assert collect(reader, 1)[0].error is None
        assert arena.tobytes() == content[:size]
        del arena


@pytest.mark.parametrize(
    ("code", "switch", "message"),
    [
        (errno.ENOSYS, "0", "does not have it"),
        (errno.EPERM, "0", "seccomp"),
        (errno.EPERM, "2", "switched off by"),
        (errno.ENOMEM, "0", "no memory"),
        (errno.EMFILE, "0", "EMFILE"),
    ],
)
def test_the_reason_against_io_uring_is_told(
    code: int, switch: str, message: str, tmp_path: Path
) -> None:
    disabled = tmp_path / "io_uring_disabled"
    disabled.write_text(switch + "\n")
    assert message in explain(OSError(code, "x"), disabled)


FORBIDDEN = """
import ctypes, struct, sys
from pathlib import Path
from shoal.experts.readers import open_reader

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

# Berkeley packet filter: load the call's number; 425 (io_uring_setup) is EPERM, others are allowed.
code = b"".join(struct.pack("HBBI", *op) for op in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(Program(4, code)), 0, 0) == 0  # PR_SET_SECCOMP
reader = open_reader(None, None, [Path(sys.argv[1])])
print(reader.backend, reader.why)
reader.close()
"""


@pytest.mark.processes
@pytest.mark.skipif(not LINUX, reason="seccomp")
def test_a_container_that_forbids_io_uring_reads_without_it(file: Path) -> None:
    command = [sys.executable, "-c", FORBIDDEN, str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    backend, _, why = ran.stdout.partition(" ")
    assert backend in (Backend.PREAD, Backend.BUFFERED)
    assert "no io_uring: forbidden" in why or "switched off by" in why


UNPRIVILEGED = """
import os, resource, sys
from pathlib import Path
import numpy as np
from shoal.experts.readers import Backend, Read, Source, open_reader

resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
path = Path(sys.argv[1])
reader = open_reader(Backend.IO_URING, None, [path])
os.setgroups([]), os.setgid(65534), os.setuid(65534)  # without the right to lock memory
reader.close()
try:
    reader = open_reader(Backend.IO_URING, None, [path])
except Exception as error:
    print("skip", error)
    sys.exit()
memory = np.zeros(201 * 4096, np.uint8)
arena = memory[-memory.ctypes.data % 4096 :][: 200 * 4096]
reader.register([arena])
for offset in (0, 4096):
    reader.submit([Read(0, (Source(path, offset),), arena)])
    [done] = reader.wait(30.0)
    assert done.error is None, done
print(reader.figures().pinned_bytes, reader.why)
"""


@pytest.mark.processes
@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="must be root, to stop being it")
def test_a_limit_of_locked_memory_costs_the_pins_and_nothing_else(
    file: Path, tmp_path: Path
) -> None:
    if problem := ring_problem():
        pytest.skip(problem)
    for folder in (file.parent, *file.parent.parents[:-1]):
        if folder.stat().st_uid == os.geteuid() and "pytest" in folder.name:
            folder.chmod(0o755)
    file.parent.chmod(0o755)
    command = [sys.executable, "-c", UNPRIVILEGED, str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    if ran.stdout.startswith("skip"):
        pytest.skip(ran.stdout)
    assert ran.stdout.startswith("0 its memory is not pinned (ENOMEM): the limit of locked memory")
