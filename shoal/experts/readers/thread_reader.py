"""ThreadReader: positional reads by a pool of threads, for systems without io_uring."""

import errno
import os
import threading
import time
from collections.abc import Collection
from pathlib import Path

from shoal.experts.readers.queue_reader import MAX_WAIT_S, Operation, QueueReader, Tuning
from shoal.experts.readers.reader import Backend, Done
from shoal.limits import MAX_READ_THREADS, READER_CLOSE_S
from shoal.ops.reads import set_read_priority


class ThreadReader(QueueReader):
    """A `Reader` with as many threads as the queue is deep, started as they are needed."""

    def __init__(self, backend: Backend, why: str, paths: Collection[Path], tuning: Tuning) -> None:
        """backend: PREAD or BUFFERED. Raises OSError naming the file that cannot be opened."""
        super().__init__(backend, paths, tuning)
        self._why = why
        self._work = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._is_woken = False
        self._threads: list[threading.Thread] = []

    @property
    def why(self) -> str:
        """See `Reader.why`."""
        return self._why

    def wait(self, timeout_s: float) -> list[Done]:
        """See `Reader.wait`."""
        with self._lock:
            self._ended.wait_for(
                lambda: self._queue.has_done or self._is_woken or self._is_closed,
                min(timeout_s, MAX_WAIT_S),
            )
            self._is_woken = False
            return self._queue.take_done()

    def wake(self) -> None:
        """See `Reader.wake`."""
        with self._lock:
            self._is_woken = True
            self._ended.notify_all()

    def close(self, timeout_s: float = READER_CLOSE_S) -> bool:
        """See `Reader.close`. What a thread still reads, its frame keeps alive."""
        until_s = time.perf_counter() + timeout_s
        with self._lock:
            self._is_closed = True
            self._queue.drop_all(time.perf_counter())
            self._work.notify_all()
            self._ended.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.perf_counter()))
        with self._lock:
            self._files.close()
        return not any(thread.is_alive() for thread in self._threads)

    def _nudge(self) -> None:
        with self._lock:
            self._ended.notify_all()

    def _needs_wake(self) -> bool:
        return False  # the threads look after what time alone starts

    def set_queue_depth(self, depth: int) -> None:
        """See `Reader.set_queue_depth`; there are no more than MAX_READ_THREADS threads."""
        with self._lock:
            self._queue.set_queue_depth(min(depth, MAX_READ_THREADS))
            self._start_chunks()

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        """See `Reader.set_bandwidth`."""
        with self._lock:
            self._queue.bucket.set_rate(bytes_per_s)
            self._start_chunks()

    def _start_chunks(self) -> None:
        queue = self._queue
        num_queued = queue.num_queued
        wanted = min(queue.queue_depth, MAX_READ_THREADS, queue.in_flight + num_queued)
        while len(self._threads) < wanted:
            name = f"shoal-read-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
            self._threads[-1].start()
        self._work.notify(num_queued)
        if queue.has_done:
            self._ended.notify_all()

    def _run(self) -> None:
        was_prefetch = False
        with self._lock:
            while True:
                operation = self._take()
                if operation is None:
                    return
                is_prefetch = operation.chunk.active.is_prefetch
                self._lock.release()
                try:
                    if is_prefetch != was_prefetch:  # where the system has none, none is wanted
                        set_read_priority(is_prefetch)
                        was_prefetch = is_prefetch
                    result = _read(operation)
                finally:
                    self._lock.acquire()
                self._finish(operation, result)
                self._work.notify()  # what may start now: prefetches wait for the last demand
                if self._queue.has_done:
                    self._ended.notify_all()

    def _take(self) -> Operation | None:
        # The next operation, waited for; None when the reader closes.
        while not self._is_closed:
            now_s = time.perf_counter()
            for chunk in self._queue.next_chunks(now_s, limit=1):
                operation = self._prepare(chunk)
                if operation is not None:
                    return operation
                self._ended.notify_all()
                break
            else:
                self._work.wait(self._queue.delay_s(now_s))
        return None


def _read(operation: Operation) -> int:
    # The bytes read, or -errno.
    start, size = operation.start, operation.num_bytes
    try:
        view = operation.out[start : start + size].data
        return os.preadv(operation.descriptor, [view], operation.offset)
    except OSError as error:
        return -(error.errno or errno.EIO)
