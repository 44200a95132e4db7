"""QueueReader: what all readers share: the queue under its lock, the files, the figures."""

import errno
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.experts.readers.files import AlignmentOf, BouncePool, OpenFile, OpenFiles
from shoal.experts.readers.read_queue import (
    CHUNK_BYTES,
    DEFAULT_QUEUE_DEPTH,
    STEADY_DEPTH,
    Chunk,
    ReadQueue,
)
from shoal.experts.readers.reader import U8, Backend, Done, Read, ReaderFigures
from shoal.limits import MAX_BOUNCE_BYTES, READER_CLOSE_S
from shoal.ops.reads import direct_alignment

MAX_WAIT_S = 60.0  # of one system call: whoever waits longer asks again


@dataclass(frozen=True, slots=True)
class Tuning:
    """What rarely needs to differ from what was measured.

    chunk_bytes: a multiple of 4096.
    queue_depth: to begin with, of all drives together, however many reads there are; None:
        DEFAULT_QUEUE_DEPTH a drive, and STEADY_DEPTH where few experts are asked for.
    prefetch_depth: see `ReadQueue`.
    keeps_page_cache: whether buffered reads leave their bytes there: for what is read once by a
        process that somebody starts again soon.
    bounce_limit_bytes: of buffers for chunks at misaligned places.
    alignment_of: what the file system asks of direct reads; a test hands in a stranger one.
    """

    chunk_bytes: int = CHUNK_BYTES
    queue_depth: int | None = None
    prefetch_depth: int | None = None
    bounce_limit_bytes: int = MAX_BOUNCE_BYTES
    alignment_of: AlignmentOf = direct_alignment
    keeps_page_cache: bool = False


@dataclass(slots=True, eq=False)
class Operation:
    """One chunk at the device: num_bytes at `offset` of the file into out[start:].

    bounce_alignment: `out` is not the read's own but a buffer of that alignment; otherwise 0.
    skip: bytes before the chunk's own that are read into it for the sake of alignment.
    """

    chunk: Chunk
    file: OpenFile
    is_direct: bool
    descriptor: int
    offset: int
    out: U8
    start: int
    num_bytes: int
    bounce_alignment: int = 0
    skip: int = 0


class QueueReader(ABC):
    """A `Reader` less its device."""

    def __init__(self, backend: Backend, paths: Collection[Path], tuning: Tuning) -> None:
        """Open the files. Raises OSError naming the one that cannot be opened."""
        self.backend = backend
        num_drives = max(1, _num_drives(paths))
        self._queue = ReadQueue(
            chunk_bytes=tuning.chunk_bytes,
            queue_depth=tuning.queue_depth or DEFAULT_QUEUE_DEPTH * num_drives,
            steady_depth=tuning.queue_depth or STEADY_DEPTH * num_drives,
            prefetch_depth=tuning.prefetch_depth,
        )
        self._lock = threading.Lock()
        self._alignment_of = None if backend is Backend.BUFFERED else tuning.alignment_of
        self._files = OpenFiles(paths, self._alignment_of)
        self._keeps_page_cache = tuning.keeps_page_cache
        self._bounce = BouncePool(tuning.bounce_limit_bytes, tuning.chunk_bytes)
        self._num_buffered = 0
        self._num_bounced = 0
        self._is_closed = False

    @property
    @abstractmethod
    def why(self) -> str: ...

    @abstractmethod
    def wait(self, timeout_s: float) -> list[Done]: ...

    @abstractmethod
    def wake(self) -> None: ...

    @abstractmethod
    def close(self, timeout_s: float = READER_CLOSE_S) -> bool: ...

    @abstractmethod
    def _start_chunks(self) -> None:
        """Start what may be started; called under the lock whenever that may have changed."""

    @abstractmethod
    def _nudge(self) -> None:
        """Make the thread that waits look again; called without the lock."""

    def submit(self, reads: Sequence[Read]) -> None:
        """See `Reader.submit`."""
        with self._lock:
            if self._is_closed:
                raise ValueError("the reader is closed")
            self._queue.check(reads)
            self._queue.add(reads, time.perf_counter())
            self._start_chunks()
            needs_wake = self._needs_wake()
        if needs_wake:
            self._nudge()

    def cancel(self, tags: Collection[int]) -> None:
        """See `Reader.cancel`."""
        with self._lock:
            self._queue.cancel(tags, time.perf_counter())
            has_done = self._queue.has_done
        if has_done:
            self._nudge()

    def promote(self, tag: int) -> None:
        """See `Reader.promote`."""
        with self._lock:
            self._queue.promote(tag)
            self._start_chunks()
            needs_wake = self._needs_wake()
        if needs_wake:
            self._nudge()

    def set_queue_depth(self, depth: int) -> None:
        """See `Reader.set_queue_depth`."""
        with self._lock:
            self._queue.set_queue_depth(depth)
        self._nudge()

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        """See `Reader.set_bandwidth`."""
        with self._lock:
            self._queue.bucket.set_rate(bytes_per_s)
        self._nudge()

    def register(self, arenas: Sequence[U8]) -> None:
        """See `Reader.register`: only io_uring has something to gain."""
        del arenas

    def reopen(self, paths: Collection[Path]) -> None:
        """See `Reader.reopen`."""
        files = OpenFiles(paths, self._alignment_of)
        with self._lock:
            old, self._files = self._files, files
            self._files_changed()
            old.close()

    def figures(self) -> ReaderFigures:
        """See `ReaderFigures`."""
        with self._lock:
            queue, counts = self._queue, self._queue.counts
            return ReaderFigures(
                backend=self.backend,
                why=self.why,
                num_reads=counts.num_reads,
                num_bytes=counts.num_bytes,
                prefetch_bytes=counts.prefetch_bytes,
                num_errors=counts.num_errors,
                num_retries=counts.num_retries,
                num_cancelled=counts.num_cancelled,
                in_flight=queue.in_flight,
                queued=queue.num_queued,
                queue_depth=queue.queue_depth,
                depth_now=queue.depth_now,
                bytes_per_s=queue.bucket.per_s,
                num_buffered=self._num_buffered,
                num_bounced=self._num_bounced,
                bounce_buffers=self._bounce.num_buffers,
                is_bounce_exhausted=self._bounce.is_exhausted,
                num_unbounced=self._bounce.num_refused,
                chunk_latency=tuple(counts.chunk_latency),
                chunk_latency_sum_s=counts.chunk_latency_sum_s,
                read_latency=tuple(counts.read_latency),
                read_latency_sum_s=counts.read_latency_sum_s,
                fallbacks=self._files.fallbacks(),
            )

    def _files_changed(self) -> None:
        """The files are others now; called under the lock."""
        return

    def _needs_wake(self) -> bool:
        # Somebody must come back for what time alone will start, and for what is already over.
        return self._queue.has_done or self._queue.delay_s(time.perf_counter()) is not None

    def _prepare(self, chunk: Chunk) -> Operation | None:
        # How to read a chunk; None: not at all, and the queue knows. Under the lock.
        try:
            file = self._files.get(chunk.source.path)
            operation = self._plan(chunk, file)
            self._queue.note_origin(chunk, file.state_of(operation.descriptor))
            file.begin_use()
            return operation
        except OSError as error:
            self._queue.finish(chunk, -(error.errno or errno.EIO), time.perf_counter())
            return None

    def _plan(self, chunk: Chunk, file: OpenFile) -> Operation:
        out, start, size, offset = chunk.active.read.out, chunk.start, chunk.num_bytes, chunk.offset
        if file.direct is None:
            self._num_buffered += self.backend is not Backend.BUFFERED
            return Operation(chunk, file, False, file.buffered(), offset, out, start, size)
        address = out.__array_interface__["data"][0] + start
        step = file.offset_alignment
        if offset % step == size % step == address % file.memory_alignment == 0:
            return Operation(chunk, file, True, file.direct, offset, out, start, size)
        alignment = max(step, file.memory_alignment)
        buffer = self._bounce.take(alignment)
        if buffer is None:
            return Operation(chunk, file, False, file.buffered(), offset, out, start, size)
        self._num_bounced += 1
        skip = offset % step
        whole = -(-(skip + size) // step) * step
        begin = offset - skip
        return Operation(chunk, file, True, file.direct, begin, buffer, 0, whole, alignment, skip)

    def _finish(self, operation: Operation, result: int) -> None:
        # Tell the queue how an operation ended. Under the lock.
        chunk, file = operation.chunk, operation.file
        now_s = time.perf_counter()
        if operation.bounce_alignment:
            if result >= 0:
                result = min(max(result - operation.skip, 0), chunk.num_bytes)
                got = operation.out[operation.skip : operation.skip + result]
                chunk.active.read.out[chunk.start : chunk.start + result] = got
            self._bounce.give_back(operation.out, operation.bounce_alignment)
        elif not operation.is_direct and result > 0 and not self._keeps_page_cache:
            file.forget(operation.offset, result)
        file.end_use()
        if result != -errno.EINVAL or not operation.is_direct:
            self._queue.finish(chunk, result, now_s)
            return
        # Some file systems open a file with O_DIRECT and then refuse the read.
        try:
            if not file.is_closing:
                file.give_up_direct("a direct read was refused (EINVAL)")
                self._files_changed()
            self._queue.put_back(chunk, now_s)
        except OSError as error:
            self._queue.finish(chunk, -(error.errno or errno.EIO), now_s)


def _num_drives(paths: Collection[Path]) -> int:
    return len({path.stat().st_dev for path in paths})
