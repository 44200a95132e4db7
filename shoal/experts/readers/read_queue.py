"""ReadQueue: which chunk is read next, and what becomes of one that failed (core).

Demand is first come, first served, chunk by chunk, so that the expert asked for first is whole
first. A prefetch chunk starts only when no demand waits or is at the device, which does side by
side what it is given; and prefetches never hold more than a part of the device's queue: what is
already there cannot be called back, and would delay a demand. (With a `prefetch_depth` they start
beside demands at the device: where all will be read, what a demand leaves unused is lost time.)

A chunk that fails for a reason that may pass is tried again after a pause; when its attempts are
used up, or the reason stays, it is tried on the next copy of the file, and then its read fails.
"""

import errno
import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from shoal.experts.readers.reader import LATENCY_BOUNDS_S, Done, FileState, Read, Source
from shoal.experts.readers.token_bucket import TokenBucket
from shoal.limits import KIB, MAX_READ_QUEUE_DEPTH, READ_ALIGNMENT

# bench/bench_reads.py: smaller chunks cost bandwidth on a cold disk and time of ours, larger ones
# parallelism within an expert.
CHUNK_BYTES = 1024 * KIB
DEFAULT_QUEUE_DEPTH = 32  # of that some are never empty while the processors are busy
# A drive does side by side all that it is given: of 32 chunks it brought six experts together at
# the end (4.3 ms), of 6 the first two after 1.8 ms, and computing goes on beside the other reads:
# a token of bench_streaming.py took 10 % less. Two chunks keep the bandwidth up (2.7 GB/s).
STEADY_DEPTH = 6
MANY_READS = 8  # queued ones, beyond which bandwidth counts alone: a warm-up, a chunk of a prompt
MAX_ATTEMPTS = 3  # on one copy
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.005, 0.05
# ECANCELED: a kernel takes queued requests back when the thread that submitted them ends.
PASSING = frozenset({errno.EIO, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT, errno.ECANCELED})
AT_ONCE = frozenset({errno.EINTR, errno.ECANCELED})
PREFETCH_SHARE = 3  # prefetches hold at most one in so many places at the device: two of six


@dataclass(slots=True, eq=False)
class ActiveRead:
    """A read that is not done."""

    read: Read
    ordinal: int
    submitted_s: float
    is_prefetch: bool
    cursor: int = 0  # bytes of `out` that were cut into chunks
    in_flight: int = 0  # its chunks at the device
    waiting: int = 0  # its chunks that will be tried again
    error: OSError | None = None
    origin: set[tuple[int, FileState]] | None = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.in_flight + self.waiting == 0 and self.cursor == self.read.out.nbytes


@dataclass(slots=True, eq=False)
class Chunk:
    """Bytes [start, stop) of a read's `out`, from one of its sources."""

    active: ActiveRead
    start: int
    stop: int
    position: int  # of the source
    copies_left: int  # sources that were not tried
    attempts: int = 0  # that failed, on this source
    began_s: float = 0.0

    @property
    def source(self) -> Source:
        """Where it is read from now."""
        return self.active.read.sources[self.position]

    @property
    def offset(self) -> int:
        """Its first byte in that file."""
        return self.source.offset + self.start

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class QueueCounts:
    """Sums since the queue was made; ReaderFigures says what they mean."""

    num_reads: int = 0
    num_bytes: int = 0
    prefetch_bytes: int = 0
    num_errors: int = 0
    num_retries: int = 0
    num_cancelled: int = 0
    chunk_latency_sum_s: float = 0.0
    read_latency_sum_s: float = 0.0
    chunk_latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    read_latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))


class ReadQueue:
    """Decides; whoever holds it reads. Not thread-safe. Times are seconds of any steady clock."""

    def __init__(
        self,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        queue_depth: int = DEFAULT_QUEUE_DEPTH,
        steady_depth: int = MAX_READ_QUEUE_DEPTH,
        prefetch_depth: int | None = None,
    ) -> None:
        """Make an empty queue.

        Args:
            chunk_bytes: a positive multiple of 4096.
            queue_depth: chunks at the device at most; `steady_depth`, if that is less, while no
                more than MANY_READS are queued.
            prefetch_depth: prefetch chunks at the device at most, beside demands, too; None: a part
                of the steady depth, and none beside demands.
        """
        assert chunk_bytes > 0 and chunk_bytes % READ_ALIGNMENT == 0, chunk_bytes
        self.chunk_bytes = chunk_bytes
        self.counts = QueueCounts()
        self.bucket = TokenBucket(None)
        self.in_flight = 0
        full = _legal_depth(queue_depth)
        self._full_depths = (full, min(steady_depth, full))
        self._depth, self._steady_depth = self._full_depths
        self._prefetch_depth = prefetch_depth
        self._prefetch_in_flight = 0
        self._active: dict[int, ActiveRead] = {}
        # Reads with bytes not yet cut into chunks, by tag, in the order of their turn.
        self._demand: dict[int, ActiveRead] = {}
        self._prefetch: dict[int, ActiveRead] = {}
        self._again: list[tuple[float, int, Chunk]] = []  # a heap by due time
        self._done: list[Done] = []
        self._ordinal = 0

    @property
    def queue_depth(self) -> int:
        return self._depth

    def set_queue_depth(self, depth: int) -> None:
        """Start chunks up to that many in flight from now on; clamped to what is legal.

        The steady depth keeps its proportion: who paces a drive paces few reads as well.
        """
        self._depth = _legal_depth(depth)
        full, steady = self._full_depths
        self._steady_depth = min(self._depth, max(1, steady * self._depth // full))

    def check(self, reads: Iterable[Read]) -> None:
        """Raise ValueError for a read that could not be added."""
        tags = set(self._active)
        for read in reads:
            if read.tag in tags:
                raise ValueError(f"tag {read.tag}: a read with it is not done")
            tags.add(read.tag)
            out = read.out
            address = out.__array_interface__["data"][0]
            if not (out.flags.c_contiguous and out.flags.writeable and out.dtype == "u1"):
                raise ValueError(f"tag {read.tag}: not a contiguous, writable array of bytes")
            if address % READ_ALIGNMENT or out.nbytes % READ_ALIGNMENT or not out.nbytes:
                raise ValueError(
                    f"tag {read.tag}: {out.nbytes} bytes at {address:#x}: both must be multiples of"
                    f" {READ_ALIGNMENT}"
                )
            if not read.sources:
                raise ValueError(f"tag {read.tag}: no file to read it from")

    def add(self, reads: Iterable[Read], now_s: float) -> None:
        """Queue reads that passed `check`."""
        for read in reads:
            active = ActiveRead(read, self._ordinal, now_s, read.is_prefetch)
            self._ordinal += 1
            self._active[read.tag] = active
            (self._prefetch if read.is_prefetch else self._demand)[read.tag] = active

    def promote(self, tag: int) -> None:
        """Make a prefetch a demand; the last in line."""
        active = self._active.get(tag)
        if active is None or not active.is_prefetch or active.error is not None:
            return
        active.is_prefetch = False
        self._prefetch_in_flight -= active.in_flight
        if self._prefetch.pop(tag, None) is not None:
            self._demand[tag] = active

    def cancel(self, tags: Collection[int], now_s: float) -> None:
        """Give up the prefetches among these reads that are not wholly at the device."""
        for tag in tags:
            active = self._active.get(tag)
            if active is None or not active.is_prefetch or active.error is not None:
                continue
            if active.cursor == active.read.out.nbytes and not active.waiting:
                continue  # its last chunk is on its way
            self._give_up(active, OSError(errno.ECANCELED, "this prefetch was cancelled"), now_s)

    def drop_all(self, now_s: float) -> None:
        """Give up every read; those with chunks at the device are done when these are finished."""
        for active in list(self._active.values()):
            if active.error is None:
                error = OSError(errno.ECANCELED, "the reader was closed")
                self._give_up(active, error, now_s)

    def next_chunks(self, now_s: float, limit: int = MAX_READ_QUEUE_DEPTH) -> list[Chunk]:
        """Return the chunks to start now, in order; each must be given back to `finish`."""
        chunks: list[Chunk] = []
        while len(chunks) < limit and self.in_flight < self.depth_now:
            if self.bucket.delay_s(now_s) > 0.0:
                break
            chunk = self._pick(now_s)
            if chunk is None:
                break
            self.bucket.take(chunk.num_bytes, now_s)
            chunk.began_s = now_s
            self.in_flight += 1
            chunk.active.in_flight += 1
            self._prefetch_in_flight += chunk.active.is_prefetch
            chunks.append(chunk)
        return chunks

    def delay_s(self, now_s: float) -> float | None:
        """Return after how long `next_chunks` has something if nothing finishes; None: never."""
        if self.in_flight >= self.depth_now:
            return None
        if self._demand or (self._prefetch and self._may_prefetch):
            return self.bucket.delay_s(now_s)
        if self._again:
            return max(self._again[0][0] - now_s, self.bucket.delay_s(now_s), 0.0)
        return None

    def note_origin(self, chunk: Chunk, state: FileState) -> None:
        """Learn, before a chunk is read, in which state its file is (see `Done.origin`)."""
        if chunk.active.origin is not None:
            chunk.active.origin.add((chunk.start, state))

    def finish(self, chunk: Chunk, result: int, now_s: float) -> None:
        """Take back a chunk: `result` is the number of bytes read, or -errno."""
        active = chunk.active
        self._left_device(active)
        counts = self.counts
        seconds = now_s - chunk.began_s
        counts.chunk_latency_sum_s += seconds
        counts.chunk_latency[_bucket(seconds)] += 1
        if active.error is not None or result == chunk.num_bytes:
            self._end_if_over(active, now_s)
            return
        active.origin = None
        if result > 0:  # a device may do less than it was asked: the rest is a chunk of its own
            aligned = result // READ_ALIGNMENT * READ_ALIGNMENT
            chunk.start += aligned or result
            self._try_again(chunk, now_s)
            return
        code = -result if result < 0 else errno.ENODATA
        chunk.attempts += 1
        if code in PASSING and chunk.attempts < MAX_ATTEMPTS:
            pause_s = min(FIRST_BACKOFF_S * 2 ** (chunk.attempts - 1), MAX_BACKOFF_S)
            self._try_again(chunk, now_s + (0.0 if code in AT_ONCE else pause_s))
        elif chunk.copies_left:
            chunk.copies_left -= 1
            chunk.position = (chunk.position + 1) % len(active.read.sources)
            chunk.attempts = 0
            self._try_again(chunk, now_s)
        else:
            self._give_up(active, _error(chunk, code), now_s)

    def put_back(self, chunk: Chunk, now_s: float) -> None:
        """Take back a chunk that was not read, to be started again at once."""
        self._left_device(chunk.active)
        chunk.active.origin = None
        if chunk.active.error is None:
            self._try_again(chunk, now_s)
        else:
            self._end_if_over(chunk.active, now_s)

    def take_done(self) -> list[Done]:
        """Return the reads that ended since the last call."""
        done, self._done = self._done, []
        return done

    @property
    def has_done(self) -> bool:
        return bool(self._done)

    @property
    def num_queued(self) -> int:
        """Chunks that wait for a place at the device, or to be tried again."""
        waiting = [*self._demand.values(), *self._prefetch.values()]
        uncut = (active.read.out.nbytes - active.cursor for active in waiting)
        return len(self._again) + sum(-(-size // self.chunk_bytes) for size in uncut)

    @property
    def depth_now(self) -> int:
        """Chunks that may be at the device, by how many reads are queued now."""
        return self._steady_depth if len(self._demand) <= MANY_READS else self._depth

    @property
    def _may_prefetch(self) -> bool:
        if self._prefetch_depth is not None:
            return self._prefetch_in_flight < self._prefetch_depth
        has_demand = self.in_flight > self._prefetch_in_flight
        limit = max(1, self._steady_depth // PREFETCH_SHARE)
        return not has_demand and self._prefetch_in_flight < limit

    def _pick(self, now_s: float) -> Chunk | None:
        if self._again and self._again[0][0] <= now_s:
            chunk = heapq.heappop(self._again)[2]
            chunk.active.waiting -= 1
            return chunk
        if self._demand:
            return self._cut(self._demand)
        if self._prefetch and self._may_prefetch:
            return self._cut(self._prefetch)
        return None

    def _cut(self, queue: dict[int, ActiveRead]) -> Chunk:
        active = next(iter(queue.values()))
        start = active.cursor
        size = active.read.out.nbytes
        active.cursor = min(start + self.chunk_bytes, size)
        if active.cursor == size:
            del queue[active.read.tag]
        num_sources = len(active.read.sources)
        position = (active.ordinal + start // self.chunk_bytes) % num_sources
        return Chunk(active, start, active.cursor, position, num_sources - 1)

    def _left_device(self, active: ActiveRead) -> None:
        self.in_flight -= 1
        active.in_flight -= 1
        self._prefetch_in_flight -= active.is_prefetch

    def _try_again(self, chunk: Chunk, due_s: float) -> None:
        self.counts.num_retries += 1
        chunk.active.waiting += 1
        self._ordinal += 1
        heapq.heappush(self._again, (due_s, self._ordinal, chunk))

    def _give_up(self, active: ActiveRead, error: OSError, now_s: float) -> None:
        active.error = error
        active.cursor = active.read.out.nbytes
        self._demand.pop(active.read.tag, None)
        self._prefetch.pop(active.read.tag, None)
        if active.waiting:
            self._again = [item for item in self._again if item[2].active is not active]
            heapq.heapify(self._again)
            active.waiting = 0
        self._end_if_over(active, now_s)

    def _end_if_over(self, active: ActiveRead, now_s: float) -> None:
        if not active.is_over:
            return
        del self._active[active.read.tag]
        seconds = now_s - active.submitted_s
        size = active.read.out.nbytes
        counts = self.counts
        if active.error is None:
            counts.num_reads += 1
            counts.num_bytes += size
            counts.prefetch_bytes += size * active.is_prefetch
            counts.read_latency_sum_s += seconds
            counts.read_latency[_bucket(seconds)] += 1
        elif active.error.errno == errno.ECANCELED:
            counts.num_cancelled += 1
        else:
            counts.num_errors += 1
        origin = None if active.origin is None else frozenset(active.origin)
        self._done.append(Done(active.read.tag, active.error, seconds, size, origin))


def _legal_depth(depth: int) -> int:
    return min(max(depth, 1), MAX_READ_QUEUE_DEPTH)


def _bucket(seconds: float) -> int:
    for position, bound in enumerate(LATENCY_BOUNDS_S):
        if seconds <= bound:
            return position
    return len(LATENCY_BOUNDS_S)


def _error(chunk: Chunk, code: int) -> OSError:
    where = f"reading {chunk.num_bytes} bytes at {chunk.offset}"
    if code == errno.ENODATA:
        text = f"the file ends before {where}: truncated, or replaced by a shorter one"
    else:
        times = f", {chunk.attempts} attempts" if chunk.attempts > 1 else ""
        text = f"{errno.errorcode.get(code, 'an unknown error')} {where}{times}"
    return OSError(code, text, str(chunk.source.path))
