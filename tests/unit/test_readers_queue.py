"""The queue of reads: order, retries, the bandwidth limit, and seeded worlds of it all."""

import errno
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.experts.readers import LATENCY_BOUNDS_S, Read, Source
from shoal.experts.readers.read_queue import (
    FIRST_BACKOFF_S,
    MANY_READS,
    MAX_ATTEMPTS,
    PREFETCH_SHARE,
    Chunk,
    ReadQueue,
)
from shoal.experts.readers.token_bucket import BURST_S, TokenBucket

PAGE = 4096
ARENA = np.zeros(65 * PAGE, np.uint8)
PLACE = ARENA[-ARENA.__array_interface__["data"][0] % PAGE :][: 64 * PAGE]


def read(tag: int, pages: int = 3, *, prefetch: bool = False, copies: int = 1) -> Read:
    sources = tuple(Source(Path(f"/drive-{i}/file"), 10 * PAGE) for i in range(copies))
    return Read(tag, sources, PLACE[: pages * PAGE], prefetch)


def queue_of(*reads: Read, depth: int = 100) -> ReadQueue:
    queue = ReadQueue(chunk_bytes=PAGE, queue_depth=depth)
    queue.check(reads)
    queue.add(reads, 0.0)
    return queue


def tags(chunks: list[Chunk]) -> list[int]:
    return [chunk.active.read.tag for chunk in chunks]


def finish_all(queue: ReadQueue, chunks: list[Chunk], now_s: float = 0.0) -> None:
    for chunk in chunks:
        queue.finish(chunk, chunk.num_bytes, now_s)


def test_a_read_is_cut_into_chunks_that_cover_it_once() -> None:
    queue = queue_of(read(1, pages=3))
    chunks = queue.next_chunks(0.0)
    assert [(c.start, c.stop, c.offset) for c in chunks] == [
        (i * PAGE, (i + 1) * PAGE, (10 + i) * PAGE) for i in range(3)
    ]
    finish_all(queue, chunks[:2])
    assert queue.take_done() == []
    finish_all(queue, chunks[2:], 0.5)
    [done] = queue.take_done()
    assert (done.tag, done.error, done.seconds, done.num_bytes) == (1, None, 0.5, 3 * PAGE)


def test_demand_goes_before_prefetch_that_came_first() -> None:
    queue = queue_of(read(1, prefetch=True), read(2), read(3), depth=7)
    assert tags(queue.next_chunks(0.0)) == [2, 2, 2, 3, 3, 3]


def test_a_prefetch_begins_when_the_last_demand_has_left_the_device() -> None:
    queue = queue_of(read(1, prefetch=True), read(2, pages=2), depth=7)
    chunks = queue.next_chunks(0.0)
    finish_all(queue, chunks[:1])
    assert queue.next_chunks(0.0) == [] and queue.delay_s(0.0) is None
    finish_all(queue, chunks[1:])
    assert queue.delay_s(0.0) == 0.0
    assert tags(queue.next_chunks(0.0)) == [1] * (7 // PREFETCH_SHARE)


def test_with_a_depth_of_their_own_prefetches_start_beside_demands_but_after_them() -> None:
    queue = ReadQueue(chunk_bytes=PAGE, queue_depth=7, prefetch_depth=2)
    queue.add([read(1, pages=9, prefetch=True), read(2, pages=4)], 0.0)
    chunks = queue.next_chunks(0.0)
    assert tags(chunks) == [2, 2, 2, 2, 1, 1]
    finish_all(queue, chunks[:4])
    assert queue.next_chunks(0.0) == [] and queue.delay_s(0.0) is None
    queue.add([read(3, pages=9)], 0.0)
    assert tags(queue.next_chunks(0.0)) == [3] * 5


def test_prefetches_hold_only_a_part_of_the_device() -> None:
    queue = queue_of(read(1, pages=30, prefetch=True), depth=2 * PREFETCH_SHARE)
    chunks = queue.next_chunks(0.0)
    assert len(chunks) == 2
    assert queue.delay_s(0.0) is None  # until one of them ends
    finish_all(queue, chunks[:1])
    assert len(queue.next_chunks(0.0)) == 1


def test_few_reads_come_one_after_the_other_and_many_fill_the_device() -> None:
    queue = ReadQueue(chunk_bytes=PAGE, queue_depth=40, steady_depth=2)
    queue.add([read(tag) for tag in range(MANY_READS + 2)], 0.0)
    chunks = queue.next_chunks(0.0)
    # Two whole reads are cut, then no more are queued than are few.
    assert tags(chunks) == [0, 0, 0, 1, 1, 1]
    finish_all(queue, chunks[:5])
    assert tags(queue.next_chunks(0.0)) == [2]


def test_who_halves_the_depth_halves_it_for_few_reads_as_well() -> None:
    queue = ReadQueue(chunk_bytes=PAGE, queue_depth=32, steady_depth=6)
    queue.add([read(tag) for tag in range(3)], 0.0)
    queue.set_queue_depth(16)
    chunks = queue.next_chunks(0.0)
    assert len(chunks) == 3
    queue.set_queue_depth(1)
    finish_all(queue, chunks)
    assert len(queue.next_chunks(0.0)) == 1
    queue.set_queue_depth(32)
    assert len(queue.next_chunks(0.0)) == 5


def test_a_promoted_prefetch_is_the_last_demand_in_line() -> None:
    queue = queue_of(read(1, prefetch=True), read(2), read(3, prefetch=True), depth=2)
    queue.promote(3)
    finish_all(queue, queue.next_chunks(0.0))
    assert tags(queue.next_chunks(0.0)) == [2, 3]
    queue.promote(4)  # nobody
    queue.promote(2)  # no prefetch


def test_a_promoted_prefetch_is_demand_for_what_other_prefetches_wait_for() -> None:
    guesses = [read(tag, pages=4, prefetch=True) for tag in (1, 2)]
    queue = queue_of(*guesses, depth=2 * PREFETCH_SHARE)
    assert tags(queue.next_chunks(0.0)) == [1, 1]
    queue.promote(1)
    chunks = queue.next_chunks(0.0)
    assert tags(chunks) == [1, 1]
    finish_all(queue, chunks)
    assert queue.next_chunks(0.0) == [], "two of its chunks are at the device still"


def test_a_cancelled_prefetch_ends_when_the_device_has_let_go_of_it() -> None:
    queue = queue_of(read(1, pages=30, prefetch=True), depth=8)
    chunks = queue.next_chunks(0.0)
    queue.cancel([1, 99], 0.0)
    assert queue.take_done() == []
    assert queue.next_chunks(0.0) == []
    finish_all(queue, chunks)
    [done] = queue.take_done()
    assert done.error is not None
    assert done.error.errno == errno.ECANCELED
    assert queue.counts.num_cancelled == 1


def test_a_prefetch_of_which_nothing_has_begun_is_cancelled_at_once() -> None:
    queue = queue_of(read(1, prefetch=True))
    queue.cancel([1], 0.0)
    assert [done.tag for done in queue.take_done()] == [1]
    assert queue.num_queued == 0


def test_neither_a_demand_nor_a_prefetch_wholly_at_the_device_is_cancelled() -> None:
    queue = queue_of(read(2, pages=1, prefetch=True))
    chunks = queue.next_chunks(0.0)
    queue.add([read(1)], 0.0)
    chunks += queue.next_chunks(0.0)
    queue.cancel([1, 2], 0.0)
    finish_all(queue, chunks)
    assert [done.error for done in queue.take_done()] == [None, None]


@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN, errno.ETIMEDOUT])
def test_what_may_pass_is_tried_again_after_a_pause_that_grows(code: int) -> None:
    queue = queue_of(read(1, pages=1))
    now_s = 0.0
    for attempt in range(1, MAX_ATTEMPTS):
        [chunk] = queue.next_chunks(now_s)
        queue.finish(chunk, -code, now_s)
        pause_s = FIRST_BACKOFF_S * 2 ** (attempt - 1)
        assert queue.delay_s(now_s) == pytest.approx(pause_s)
        assert queue.next_chunks(now_s + 0.9 * pause_s) == []
        now_s += pause_s
    [chunk] = queue.next_chunks(now_s)
    queue.finish(chunk, -code, now_s)
    [done] = queue.take_done()
    assert done.error is not None
    assert done.error.errno == code
    assert done.error.filename == "/drive-0/file"
    assert f"{errno.errorcode[code]} reading 4096 bytes at 40960, 3 attempts" in str(done.error)
    assert queue.counts.num_retries == MAX_ATTEMPTS - 1


def test_a_pause_does_not_hold_up_other_reads() -> None:
    queue = queue_of(read(1, pages=1), read(2, pages=2), depth=1)
    [chunk] = queue.next_chunks(0.0)
    queue.finish(chunk, -errno.EIO, 0.0)
    assert tags(queue.next_chunks(0.0)) == [2]


def test_an_interrupted_read_is_tried_again_at_once() -> None:
    queue = queue_of(read(1, pages=1))
    [chunk] = queue.next_chunks(0.0)
    queue.finish(chunk, -errno.EINTR, 0.0)
    assert queue.next_chunks(0.0) == [chunk]


def test_a_short_read_goes_on_where_it_stopped_until_the_file_ends() -> None:
    queue = ReadQueue(chunk_bytes=8 * PAGE)
    queue.add([read(1, pages=8)], 0.0)
    for got, start in ((5000, 0), (PAGE, PAGE), (1000, 2 * PAGE), (0, 2 * PAGE + 1000)):
        [chunk] = queue.next_chunks(0.0)
        assert chunk.start == start
        queue.finish(chunk, got, 0.0)
    [done] = queue.take_done()
    assert done.error is not None
    assert done.error.errno == errno.ENODATA
    assert "the file ends before reading" in str(done.error)


def test_what_will_not_pass_fails_at_once_and_takes_the_other_chunks_along() -> None:
    queue = queue_of(read(1, pages=3), depth=2)
    first, second = queue.next_chunks(0.0)
    queue.finish(first, -errno.EACCES, 0.0)
    assert queue.next_chunks(0.0) == []
    assert queue.take_done() == []  # the second chunk still writes into its memory
    queue.finish(second, PAGE, 0.0)
    [done] = queue.take_done()
    assert isinstance(done.error, PermissionError)


def test_a_failed_copy_is_replaced_by_the_next() -> None:
    queue = queue_of(read(1, pages=1, copies=2))
    [chunk] = queue.next_chunks(0.0)
    assert chunk.source.path == Path("/drive-0/file")
    queue.finish(chunk, -errno.EACCES, 0.0)
    assert queue.next_chunks(0.0) == [chunk]
    assert chunk.source.path == Path("/drive-1/file")
    finish_all(queue, [chunk])
    assert [done.error for done in queue.take_done()] == [None]


def test_chunks_are_dealt_over_the_copies() -> None:
    queue = queue_of(read(1, pages=4, copies=2), read(2, pages=1, copies=2))
    drives = [str(chunk.source.path) for chunk in queue.next_chunks(0.0)]
    zero, one = "/drive-0/file", "/drive-1/file"
    assert drives == [zero, one, zero, one, one]  # the next read begins on the other drive


def test_bandwidth_is_limited_on_average_and_for_demand_too() -> None:
    queue = queue_of(read(1, pages=64), read(2, pages=64))
    queue.bucket.set_rate(PAGE * 100.0)  # a page in 10 ms
    now_s, count = 0.0, 0
    while now_s < 0.5:
        chunks = queue.next_chunks(now_s)
        count += len(chunks)
        finish_all(queue, chunks, now_s)
        delay_s = queue.delay_s(now_s)
        assert delay_s is not None
        now_s += max(delay_s, 1e-6)
    assert 50 <= count <= 50 + 100 * BURST_S + 1


def test_a_bucket_grants_what_is_larger_than_its_burst() -> None:
    bucket = TokenBucket(1000.0)
    assert bucket.delay_s(0.0) == 0.0
    bucket.take(500, 0.0)
    assert bucket.delay_s(0.0) == pytest.approx(0.5)
    assert bucket.delay_s(0.5) == pytest.approx(0.0)
    bucket.set_rate(None)
    assert bucket.delay_s(0.5) == 0.0
    with pytest.raises(ValueError, match="positive"):
        bucket.set_rate(0.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Read(1, (), PLACE[:PAGE]), "no file"),
        (Read(1, (Source(Path("/x"), 0),), PLACE[1 : PAGE + 1]), "multiples of 4096"),
        (Read(1, (Source(Path("/x"), 0),), PLACE[:100]), "multiples of 4096"),
        (Read(1, (Source(Path("/x"), 0),), PLACE[:0]), "multiples of 4096"),
        (Read(1, (Source(Path("/x"), 0),), PLACE[: 2 * PAGE : 2]), "contiguous"),
        (read(7), "tag 7"),
    ],
)
def test_a_read_that_cannot_be_is_refused(bad: Read, message: str) -> None:
    queue = queue_of(read(7))
    with pytest.raises(ValueError, match=message):
        queue.check([bad])
    with pytest.raises(ValueError, match="tag 8"):
        queue.check([read(8), read(8)])


def test_a_depth_below_one_is_one() -> None:
    queue = queue_of(read(1), depth=0)
    assert len(queue.next_chunks(0.0)) == 1


def test_latencies_fall_into_the_bucket_that_bounds_them() -> None:
    queue = queue_of(read(1, pages=1), read(2, pages=1))
    fast, slow = queue.next_chunks(0.0)
    queue.finish(fast, PAGE, LATENCY_BOUNDS_S[2])
    queue.finish(slow, PAGE, LATENCY_BOUNDS_S[-1] * 2)
    expected = [0] * (len(LATENCY_BOUNDS_S) + 1)
    expected[2] = expected[-1] = 1
    assert queue.counts.chunk_latency == queue.counts.read_latency == expected


class World:
    """A device that ends chunks in any order with any result, and callers who do anything."""

    RESULTS = (errno.EIO, errno.EINTR, errno.EAGAIN, errno.EACCES, errno.ECANCELED)

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.depth = self.rng.randrange(1, 9)
        self.queue = ReadQueue(chunk_bytes=2 * PAGE, queue_depth=self.depth)
        if self.rng.random() < 0.3:
            self.queue.bucket.set_rate(1e6)
        self.now_s = 0.0
        self.sizes: dict[int, int] = {}
        self.covered: dict[int, int] = {}
        self.at_device: list[Chunk] = []
        self.ended: dict[int, OSError | None] = {}

    def step(self) -> None:
        match self.rng.randrange(6):
            case 0:
                self.submit()
            case 1:
                self.queue.promote(self.any_tag())
            case 2:
                self.queue.cancel([self.any_tag(), self.any_tag()], self.now_s)
            case 3:
                self.now_s += self.rng.random() * 0.02
            case _:
                self.work()

    def any_tag(self) -> int:
        return self.rng.randrange(len(self.sizes) + 1)

    def submit(self) -> None:
        tag, pages = len(self.sizes), self.rng.randrange(1, 10)
        one = read(tag, pages, prefetch=self.rng.random() < 0.5, copies=self.rng.randrange(1, 4))
        self.queue.check([one])
        self.queue.add([one], self.now_s)
        self.sizes[tag], self.covered[tag] = pages * PAGE, 0

    def work(self) -> None:
        started = self.queue.next_chunks(self.now_s)
        self.at_device += started
        assert self.queue.in_flight == len(self.at_device) <= self.depth
        ids = [(id(chunk.active), chunk.start) for chunk in self.at_device]
        assert len(set(ids)) == len(ids), "two chunks write into one place"
        self.rng.shuffle(self.at_device)
        for _ in range(self.rng.randrange(len(self.at_device) + 1)):
            self.end(self.at_device.pop())

    def end(self, chunk: Chunk) -> None:
        result = chunk.num_bytes
        match self.rng.randrange(8):
            case 0:
                result = -self.rng.choice(self.RESULTS)
            case 1:
                result = self.rng.randrange(chunk.num_bytes)
        if result > 0:
            whole = result == chunk.num_bytes
            used = result if whole else (result // PAGE * PAGE or result)
            self.covered[chunk.active.read.tag] += used
        self.queue.finish(chunk, result, self.now_s)

    def collect(self) -> None:
        for done in self.queue.take_done():
            assert done.tag not in self.ended, "done twice"
            assert not [c for c in self.at_device if c.active.read.tag == done.tag]
            self.ended[done.tag] = done.error
            if done.error is None:
                assert self.covered[done.tag] == self.sizes[done.tag]


@given(st.integers(0, 2**32))
def test_every_read_is_done_once_whatever_happens(seed: int) -> None:
    world = World(seed)
    for _ in range(120):
        world.step()
        world.collect()
    for _ in range(20_000):
        world.work()
        world.collect()
        if len(world.ended) == len(world.sizes):
            break
        delay_s = world.queue.delay_s(world.now_s)
        assert world.at_device or delay_s is not None, "nothing would ever happen again"
        world.now_s += delay_s or 0.0
    assert world.ended.keys() == world.sizes.keys()
    assert (world.queue.in_flight, world.queue.num_queued) == (0, 0)
    counts = world.queue.counts
    assert counts.num_reads + counts.num_errors + counts.num_cancelled == len(world.sizes)
