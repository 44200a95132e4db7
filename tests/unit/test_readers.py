"""Readers on real files: every backend gives the same bytes, and errors instead of wrong ones."""

import errno
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import UsageError
from shoal.experts.readers import Backend, Done, Read, Reader, Source, Tuning, open_reader
from shoal.experts.readers.open_reader import explain
from shoal.ops.reads import Ring

PAGE = 4096
FILE_PAGES = 512
LINUX = sys.platform == "linux"


def ring_problem() -> str:
    try:
        Ring(8)
    except OSError as error:
        return explain(error)
    return ""


def aligned(num_pages: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    memory = np.zeros((num_pages + 1) * PAGE, np.uint8)
    skip = -memory.__array_interface__["data"][0] % PAGE
    return memory[skip : skip + num_pages * PAGE]


@pytest.fixture(params=list(Backend))
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    if chosen is Backend.IO_URING and (problem := ring_problem()):
        pytest.skip(problem)
    return chosen


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(7).integers(0, 256, FILE_PAGES * PAGE, np.uint8).tobytes()


@pytest.fixture(scope="module")
def file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readers") / "experts"
    path.write_bytes(content)
    return path


@pytest.fixture
def reader(backend: Backend, file: Path) -> Iterator[Reader]:
    with closing(open_here(backend, [file])) as opened:
        yield opened


def open_here(backend: Backend | None, paths: Sequence[Path], **tuning: object) -> Reader:
    """Open a reader, or skip where this folder's file system has no direct reads."""
    try:
        return open_reader(backend, None, paths, tuning=Tuning(**tuning))  # type: ignore[arg-type]
    except UsageError as error:
        pytest.skip(str(error))


def collect(reader: Reader, count: int) -> dict[int, Done]:
    """Wait until that many reads are done."""
    done: dict[int, Done] = {}
    while len(done) < count:
        ended = reader.wait(30.0)
        assert ended, f"nothing ends: {reader.figures()}"
        for one in ended:
            assert one.tag not in done
            done[one.tag] = one
    return done


def read_one(reader: Reader, path: Path, offset: int, num_pages: int) -> tuple[Done, bytes]:
    out = aligned(num_pages)
    reader.submit([Read(0, (Source(path, offset),), out)])
    return collect(reader, 1)[0], out.tobytes()


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_extents_of_a_file_arrive_whole(
    backend: Backend, file: Path, content: bytes, data: st.DataObject
) -> None:
    extents = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, FILE_PAGES - 40).map(lambda page: page * PAGE)
                | st.integers(0, (FILE_PAGES - 40) * PAGE),  # no alignment at all
                st.integers(1, 39),
                st.booleans(),
            ),
            min_size=1,
            max_size=20,
        )
    )
    chunk_pages, depth = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 20))
    arena = aligned(sum(pages for _, pages, _ in extents))
    reads, start = [], 0
    for tag, (offset, pages, is_prefetch) in enumerate(extents):
        out = arena[start : start + pages * PAGE]
        reads.append(Read(tag, (Source(file, offset),), out, is_prefetch))
        start += pages * PAGE
    tuning = {"chunk_bytes": chunk_pages * PAGE, "queue_depth": depth}
    with closing(open_here(backend, [file], **tuning)) as reader:
        reader.register([arena])
        reader.submit(reads[: len(reads) // 2])
        reader.submit(reads[len(reads) // 2 :])
        done = collect(reader, len(reads))
        figures = reader.figures()
    for read, (offset, pages, _) in zip(reads, extents, strict=True):
        assert done[read.tag].error is None
        assert read.out.tobytes() == content[offset : offset + pages * PAGE]
    assert (figures.in_flight, figures.queued, figures.num_errors) == (0, 0, 0)
    assert figures.num_reads == len(reads)
    assert figures.num_bytes == arena.nbytes
    assert sum(figures.read_latency) == len(reads)


def test_a_file_that_ends_early_is_an_error_that_names_it(
    backend: Backend, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "short"
    path.write_bytes(content[: 5 * PAGE + 1000])
    with closing(open_here(backend, [path])) as reader:
        for offset in (0, 5 * PAGE, 6 * PAGE, 60 * PAGE):
            done, _ = read_one(reader, path, offset, 8)
            assert done.error is not None
            assert done.error.errno == errno.ENODATA
            assert done.error.filename == str(path)
        done, read = read_one(reader, path, 0, 5)
        assert (done.error, read) == (None, content[: 5 * PAGE])


def test_a_file_truncated_while_it_is_served_is_an_error_and_no_signal(
    backend: Backend, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "experts"
    path.write_bytes(content)
    with closing(open_here(backend, [path])) as reader:
        assert read_one(reader, path, 0, 8)[0].error is None
        os.truncate(path, 3 * PAGE)
        done, _ = read_one(reader, path, 0, 8)
        assert done.error is not None
        assert "truncated" in str(done.error)
        assert read_one(reader, path, 0, 3)[0].error is None


def test_a_replaced_file_gives_its_old_bytes_until_it_is_reopened(
    backend: Backend, content: bytes, tmp_path: Path
) -> None:
    path, fresh = tmp_path / "experts", tmp_path / "fresh"
    path.write_bytes(content[: 8 * PAGE])
    fresh.write_bytes(content[8 * PAGE : 16 * PAGE])
    with closing(open_here(backend, [path])) as reader:
        fresh.replace(path)
        assert read_one(reader, path, 0, 8)[1] == content[: 8 * PAGE]
        reader.reopen([path])
        assert read_one(reader, path, 0, 8)[1] == content[8 * PAGE : 16 * PAGE]
        with pytest.raises(FileNotFoundError, match="nowhere"):
            reader.reopen([path, tmp_path / "nowhere"])
        assert read_one(reader, path, 0, 8)[1] == content[8 * PAGE : 16 * PAGE]


def test_a_missing_file_is_named_when_the_reader_opens_and_when_it_reads(
    reader: Reader, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_reader(reader.backend, None, [tmp_path / "nowhere"])
    done, _ = read_one(reader, tmp_path / "nowhere", 0, 1)
    assert isinstance(done.error, FileNotFoundError)
    assert done.error.filename == str(tmp_path / "nowhere")


def test_the_second_copy_serves_what_the_first_has_lost(
    reader: Reader, file: Path, content: bytes, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content[: 4 * PAGE])
    out = aligned(100)
    reader.submit([Read(5, (Source(damaged, 0), Source(file, 0)), out)])
    assert collect(reader, 1)[5].error is None
    assert out.tobytes() == content[: 100 * PAGE]


@pytest.mark.skipif(not LINUX, reason="/proc/self/mem gives EIO on Linux")
def test_an_input_output_error_is_tried_again_and_then_told(reader: Reader) -> None:
    # Nothing is mapped at address 0, so that the kernel itself answers EIO.
    done, _ = read_one(reader, Path("/proc/self/mem"), 0, 1)
    assert done.error is not None
    assert done.error.errno == errno.EIO
    assert "3 attempts" in str(done.error)
    figures = reader.figures()
    assert (figures.num_retries, figures.num_errors) == (2, 1)


def test_a_cancelled_prefetch_is_done_and_a_demand_is_not_cancelled(
    backend: Backend, file: Path, content: bytes
) -> None:
    with closing(open_here(backend, [file], chunk_bytes=PAGE, queue_depth=4)) as reader:
        reader.set_bandwidth(1.0)  # what begins is one chunk; the next would take an hour
        arena = aligned(60)
        wanted, guess = arena[: 20 * PAGE], arena[20 * PAGE :]
        reader.submit(
            [
                Read(1, (Source(file, 0),), wanted),
                Read(2, (Source(file, PAGE),), guess, is_prefetch=True),
            ]
        )
        reader.cancel([1, 2, 3])
        done = collect(reader, 1)[2]
        assert done.error is not None
        assert done.error.errno == errno.ECANCELED
        reader.set_bandwidth(None)
        assert collect(reader, 1)[1].error is None
        assert wanted.tobytes() == content[: 20 * PAGE]
        assert reader.figures().num_cancelled == 1


def test_a_promoted_prefetch_is_read_before_one_that_is_not(backend: Backend, file: Path) -> None:
    with closing(open_here(backend, [file], chunk_bytes=PAGE, queue_depth=1)) as reader:
        reader.set_bandwidth(1.0)
        blocker = Read(0, (Source(file, 0),), aligned(1))
        guesses = [Read(n, (Source(file, 0),), aligned(1), is_prefetch=True) for n in (1, 2, 3)]
        reader.submit([blocker])
        reader.submit(guesses)
        reader.promote(3)
        reader.set_bandwidth(None)
        order: list[int] = []
        while len(order) < 4:
            order += [done.tag for done in reader.wait(30.0)]
        assert order.index(3) < order.index(1) < order.index(2)


def test_a_wake_ends_the_wait_under_way_or_the_next(reader: Reader) -> None:
    reader.wake()
    assert reader.wait(1000.0) == []
    ended: list[list[Done]] = []
    waiter = threading.Thread(target=lambda: ended.append(reader.wait(1000.0)))
    waiter.start()
    reader.wake()
    waiter.join()
    assert ended == [[]]
    assert reader.wait(0.0) == []


def test_a_read_submitted_by_another_thread_ends_the_wait(
    reader: Reader, file: Path, content: bytes
) -> None:
    ended: list[Done] = []
    waiter = threading.Thread(target=lambda: ended.extend(reader.wait(1000.0)))
    waiter.start()
    out = aligned(64)
    # The submitting thread ends at once, which must not take its reads along.
    read = Read(9, (Source(file, PAGE),), out)
    submitter = threading.Thread(target=lambda: reader.submit([read]))
    submitter.start()
    submitter.join()
    waiter.join()
    assert [(done.tag, done.error) for done in ended] == [(9, None)]
    assert out.tobytes() == content[PAGE : 65 * PAGE]


def test_reads_under_way_end_before_a_close_and_the_queued_are_given_up(
    backend: Backend, file: Path
) -> None:
    reader = open_here(backend, [file], chunk_bytes=PAGE, queue_depth=2)
    outs = [aligned(30) for _ in range(20)]
    reader.submit([Read(tag, (Source(file, 0),), out) for tag, out in enumerate(outs)])
    reader.close()
    ended = {done.tag: done.error for done in reader.wait(0.0)}
    assert len(ended) == 20
    assert any(error is not None and error.errno == errno.ECANCELED for error in ended.values())
    reader.close()
    reader.wake()
    assert reader.figures().in_flight == 0
    with pytest.raises(ValueError, match="closed"):
        reader.submit([Read(99, (Source(file, 0),), outs[0])])


def test_a_close_ends_the_wait_of_another_thread(reader: Reader) -> None:
    waiter = threading.Thread(target=reader.wait, args=(1000.0,))
    waiter.start()
    reader.close()
    waiter.join()


@pytest.mark.skipif(not LINUX, reason="counts /proc/self/fd")
def test_no_descriptor_is_left_open(backend: Backend, file: Path, tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for _ in range(3):
        reader = open_here(backend, [file])
        read_one(reader, file, 1, 3)
        reader.reopen([file])
        read_one(reader, tmp_path, 0, 1)  # a folder
        reader.close()
    del reader
    assert descriptors() == before
    with pytest.raises(FileNotFoundError):
        open_reader(backend, None, [file, tmp_path / "nowhere"])
    assert descriptors() == before


def test_submitters_and_cancellers_at_once_disturb_nobodys_bytes(
    backend: Backend, file: Path, content: bytes
) -> None:
    with closing(open_here(backend, [file], chunk_bytes=2 * PAGE, queue_depth=8)) as reader:
        outs = [aligned(11) for _ in range(240)]

        def work(first: int) -> None:
            for tag in range(first, 240, 3):
                source = Source(file, tag * PAGE)
                reader.submit([Read(tag, (source,), outs[tag], is_prefetch=tag % 2 == 0)])
                reader.promote(tag - 2)
                reader.cancel([tag - 6, tag])
                reader.set_queue_depth(1 + tag % 20)

        workers = [threading.Thread(target=work, args=(first,)) for first in range(3)]
        for worker in workers:
            worker.start()
        done = collect(reader, 240)
        for worker in workers:
            worker.join()
        for tag, out in enumerate(outs):
            error = done[tag].error
            if error is None:
                assert out.tobytes() == content[tag * PAGE : (tag + 11) * PAGE]
            else:
                assert error.errno == errno.ECANCELED
                assert tag % 2 == 0
        assert done[1].error is None


@pytest.mark.parametrize("wanted", [Backend.IO_URING, Backend.PREAD])
def test_a_file_system_of_large_blocks_is_read_through_buffers_of_ours(
    wanted: Backend, file: Path, content: bytes
) -> None:
    if wanted is Backend.IO_URING and (problem := ring_problem()):
        pytest.skip(problem)
    tuning = {"alignment_of": lambda _: (16 * PAGE, PAGE), "chunk_bytes": 8 * PAGE}
    with closing(open_here(wanted, [file], **tuning)) as reader:
        for offset in (0, 3 * PAGE, 16 * PAGE):
            assert read_one(reader, file, offset, 33)[1] == content[offset : offset + 33 * PAGE]
        figures = reader.figures()
        assert figures.num_bounced > 0
        assert figures.num_buffered == 0
        assert 0 < figures.bounce_buffers <= figures.num_bounced
    with closing(open_here(wanted, [file], **tuning, bounce_limit_bytes=0)) as reader:
        assert read_one(reader, file, 3 * PAGE, 33)[1] == content[3 * PAGE : 36 * PAGE]
        figures = reader.figures()
        assert (figures.num_bounced, figures.bounce_buffers) == (0, 0)
        assert figures.num_buffered == 5


@pytest.mark.skipif(not LINUX, reason="O_DIRECT")
@pytest.mark.parametrize("wanted", [Backend.IO_URING, Backend.PREAD])
def test_a_direct_read_that_is_refused_after_all_is_made_through_the_page_cache(
    wanted: Backend, file: Path, content: bytes
) -> None:
    # Told that no alignment is needed, we ask for an odd offset: the kernel answers EINVAL.
    if wanted is Backend.IO_URING and (problem := ring_problem()):
        pytest.skip(problem)
    with closing(open_here(wanted, [file], alignment_of=lambda _: (1, 1))) as reader:
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
def test_a_tmpfs_is_read_whatever_it_thinks_of_direct_reads(content: bytes) -> None:
    path = Path(f"/dev/shm/shoal-readers-{os.getpid()}")
    path.write_bytes(content)
    try:
        with closing(open_reader(None, None, [path])) as reader:
            assert read_one(reader, path, 8 * PAGE, 50)[1] == content[8 * PAGE : 58 * PAGE]
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
