"""Readers on real files: every backend gives the same bytes, and errors instead of wrong ones."""

import ctypes
import errno
import os
import platform
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.experts.readers import (
    Backend,
    Done,
    Read,
    Reader,
    Source,
    Tuning,
    open_reader,
    thread_reader,
)
from shoal.experts.readers.queue_reader import Operation
from shoal.ops.reads import Ring
from support.readers import PAGE, aligned, collect, open_here, random_bytes, read_one, ring_problem

FILE_PAGES = 512
LINUX = sys.platform == "linux"


@pytest.fixture(params=list(Backend))
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    if chosen is Backend.IO_URING and (problem := ring_problem()):
        pytest.skip(problem)
    return chosen


@pytest.fixture(scope="module")
def content() -> bytes:
    return random_bytes(FILE_PAGES)


@pytest.fixture(scope="module")
def file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readers") / "experts"
    path.write_bytes(content)
    return path


@pytest.fixture
def reader(backend: Backend, file: Path) -> Iterator[Reader]:
    with closing(open_here(backend, [file])) as opened:
        yield opened


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
    tuning = Tuning(chunk_bytes=chunk_pages * PAGE, queue_depth=depth)
    with closing(open_here(backend, [file], tuning)) as reader:
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
    with closing(open_here(backend, [file], Tuning(chunk_bytes=PAGE, queue_depth=4))) as reader:
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
    with closing(open_here(backend, [file], Tuning(chunk_bytes=PAGE, queue_depth=1))) as reader:
        reader.set_bandwidth(1.0)
        blocker = Read(0, (Source(file, 0),), aligned(1))
        guesses = [Read(n, (Source(file, 0),), aligned(1), is_prefetch=True) for n in (1, 2, 3)]
        reader.submit([blocker])
        reader.submit(guesses)
        reader.promote(3)
        reader.set_bandwidth(None)
        order: list[int] = []
        while len(order) < 4:
            ended = reader.wait(30.0)
            assert ended
            order += [done.tag for done in ended]
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
    reader = open_here(backend, [file], Tuning(chunk_bytes=PAGE, queue_depth=2))
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
    with closing(open_here(backend, [file], Tuning(chunk_bytes=2 * PAGE, queue_depth=8))) as reader:
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


def test_prefetches_have_the_lowest_priority_of_those_that_cannot_starve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With io_uring in the entry that the kernel gets, with threads as the kernel says of them."""
    lowest = 2 << 13 | 7  # IOPRIO_CLASS_BE, level 7
    if not ring_problem():
        ring, memory = Ring(8), aligned(1)
        for is_prefetch, priority in ((True, lowest), (False, 0)):
            entry = ring.entry((1, 0, False, False, is_prefetch, 0, memory, 0, PAGE))
            assert struct.unpack_from("<H", entry, 2) == (priority,)  # sqe->ioprio
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    path = tmp_path / "file"
    path.write_bytes(random_bytes(4))
    seen: list[tuple[bool, int]] = []
    syscall, read = ctypes.CDLL(None).syscall, thread_reader._read

    def noted(operation: Operation) -> int:
        seen.append((operation.chunk.active.is_prefetch, syscall(252, 1, 0)))  # ioprio_get
        return read(operation)

    monkeypatch.setattr(thread_reader, "_read", noted)
    tuning = Tuning(queue_depth=1)
    with closing(open_reader(Backend.BUFFERED, None, [path], tuning=tuning)) as reader:
        for tag, is_prefetch in enumerate((False, True, False)):
            reader.submit([Read(tag, (Source(path, 0),), aligned(1), is_prefetch)])
            collect(reader, 1)
    own = syscall(252, 1, 0)
    assert seen == [(False, own), (True, lowest), (False, own)]
