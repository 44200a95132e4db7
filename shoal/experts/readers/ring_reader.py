"""RingReader: reads through one io_uring.

Whoever submits hands its chunks to the kernel itself, so that a demand does not wait for another
thread to run; whoever waits takes completions, and starts what then has room.
"""

import errno
import resource
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from shoal.experts.readers.files import OpenFile
from shoal.experts.readers.queue_reader import MAX_WAIT_S, Operation, QueueReader, Tuning
from shoal.experts.readers.read_queue import Chunk
from shoal.experts.readers.reader import U8, Backend, Done, ReaderFigures
from shoal.limits import MIB, READER_CLOSE_S
from shoal.ops.reads import Ring


class RingReader(QueueReader):
    """A `Reader` of registered files into registered memory."""

    def __init__(
        self, ring: Ring, paths: Collection[Path], arenas: Sequence[U8], tuning: Tuning
    ) -> None:
        """Raises OSError naming the file that cannot be opened."""
        super().__init__(Backend.IO_URING, paths, tuning)
        self._ring: Ring | None = ring
        self._is_woken = False
        self._waiting = threading.Lock()  # held by the thread that waits
        self._operations: dict[int, Operation] = {}
        self._next_id = 0
        self._places: dict[OpenFile, int] = {}  # of files in the kernel's table
        self._memory_error = self._file_error = 0  # errnos
        self._files_changed()
        self.register(arenas)

    @property
    def why(self) -> str:
        """See `Reader.why`."""
        ring = self._ring
        pin_error = ring.pin_error if ring is not None else 0
        code = self._memory_error or pin_error
        problems = [_memory_problem(code)] if code else []
        if self._file_error:
            name = errno.errorcode.get(self._file_error, str(self._file_error))
            problems.append(f"its files are not registered ({name})")
        return "; ".join(problems)

    def register(self, arenas: Sequence[U8]) -> None:
        """See `Reader.register`. Where it fails, `why` tells, and reads go on without."""
        ring = self._ring
        if ring is not None:
            _raise_memory_lock_limit()
            self._memory_error = ring.register_memory(list(arenas))

    def figures(self) -> ReaderFigures:
        """See `ReaderFigures`."""
        ring = self._ring
        return replace(super().figures(), pinned_bytes=0 if ring is None else ring.pinned_bytes)

    def wait(self, timeout_s: float) -> list[Done]:
        """See `Reader.wait`."""
        until_s = time.perf_counter() + timeout_s
        with self._waiting:
            ended: Sequence[tuple[int, int]] = ()
            while True:
                with self._lock:
                    self._finish_all(ended)
                    self._start_chunks()
                    now_s = time.perf_counter()
                    ring = self._ring
                    if self._queue.has_done or self._is_woken or ring is None or now_s >= until_s:
                        self._is_woken = False
                        return self._queue.take_done()
                    delay_s = self._queue.delay_s(now_s)
                wait_s = min(until_s - now_s, MAX_WAIT_S)
                ended = ring.wait(wait_s if delay_s is None else min(wait_s, delay_s))

    def wake(self) -> None:
        """See `Reader.wake`."""
        self._is_woken = True
        self._nudge()

    def close(self, timeout_s: float = READER_CLOSE_S) -> bool:
        """See `Reader.close`."""
        until_s = time.perf_counter() + timeout_s
        with self._lock:
            self._is_closed = True
            self._queue.drop_all(time.perf_counter())
        self.wake()
        with self._waiting:
            ring = self._ring
            while ring is not None and self._operations:
                left_s = until_s - time.perf_counter()
                if left_s <= 0.0:
                    ring.abandon([operation.out for operation in self._operations.values()])
                    break
                ended = ring.wait(min(left_s, MAX_WAIT_S))
                with self._lock:
                    self._finish_all(ended)
            with self._lock:
                self._ring = None  # whoever still wakes it keeps it alive until then
                self._files.close()
                return not self._operations

    def _nudge(self) -> None:
        ring = self._ring
        if ring is not None:
            ring.wake()

    def _finish_all(self, ended: Sequence[tuple[int, int]]) -> None:
        for number, result in ended:
            self._finish(self._operations.pop(number), result)

    def _start_chunks(self) -> None:
        if self._is_closed:
            return
        while chunks := self._queue.next_chunks(time.perf_counter()):
            self._start(chunks)

    def _start(self, chunks: Sequence[Chunk]) -> None:
        assert self._ring is not None
        operations = [op for chunk in chunks if (op := self._prepare(chunk)) is not None]
        numbers = range(self._next_id, self._next_id + len(operations))
        self._next_id += len(operations)
        self._operations.update(zip(numbers, operations, strict=True))
        taken = self._ring.submit(
            [self._entry(n, op) for n, op in zip(numbers, operations, strict=True)]
        )
        for number in numbers[taken:]:  # no memory in the kernel just now
            self._finish(self._operations.pop(number), -errno.EAGAIN)

    def _entry(
        self, number: int, operation: Operation
    ) -> tuple[int, int, bool, bool, bool, int, U8, int, int]:
        place = self._places.get(operation.file) if operation.is_direct else None
        return (
            number,
            operation.descriptor if place is None else place,
            place is not None,
            not operation.is_direct,
            operation.chunk.active.is_prefetch,
            operation.offset,
            operation.out,
            operation.start,
            operation.num_bytes,
        )

    def _files_changed(self) -> None:
        if self._ring is None:
            return
        direct = [file for file in self._files.all() if file.direct is not None]
        code = self._ring.register_files(
            [file.direct for file in direct if file.direct is not None]
        )
        self._places = {} if code else {file: place for place, file in enumerate(direct)}


def _raise_memory_lock_limit() -> None:
    # Pinned memory counts against it, unless the process may lock what it likes.
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def _memory_problem(code: int) -> str:
    text = f"its memory is not pinned ({errno.errorcode.get(code, str(code))})"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if code == errno.ENOMEM and limit != resource.RLIM_INFINITY:
        text += f": the limit of locked memory is {limit // MIB} MiB (ulimit -l)"
    return text
