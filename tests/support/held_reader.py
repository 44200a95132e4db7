"""HeldReader: a real reader whose reads end when the test says so, well or badly."""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from shoal.experts.options import Backend
from shoal.experts.readers import Done, Read, Reader, ReaderFigures
from shoal.experts.readers.open_reader import open_reader
from shoal.experts.readers.reader import U8
from shoal.limits import READER_CLOSE_S


class HeldReader:
    """Stands before a reader: reads wait here, in order, until they are let go or failed."""

    def __init__(self, paths: Collection[Path]) -> None:
        self._reader: Reader = open_reader(Backend.BUFFERED, None, paths)
        self._changed = threading.Condition()
        self._held: list[Read] = []
        self._ended: list[Done] = []
        self.is_free = False
        self.promoted: list[int] = []
        self.registered: list[list[int]] = []

    @property
    def backend(self) -> Backend:
        return self._reader.backend

    @property
    def why(self) -> str:
        return self._reader.why

    def submit(self, reads: Sequence[Read]) -> None:
        with self._changed:
            if self.is_free:
                self._reader.submit(reads)
                return
            self._held += reads
            self._changed.notify_all()

    def cancel(self, tags: Collection[int]) -> None:
        with self._changed:
            gone = [r for r in self._held if r.tag in tags and r.tag not in self.promoted]
            for read in gone:
                self._end(read, 125)  # ECANCELED

    def promote(self, tag: int) -> None:
        self.promoted.append(tag)

    def wait(self, timeout_s: float) -> list[Done]:
        done = self._reader.wait(timeout_s)
        with self._changed:
            done += self._ended
            self._ended = []
        return done

    def wake(self) -> None:
        self._reader.wake()

    def register(self, arenas: Sequence[U8]) -> None:
        self.registered.append([arena.nbytes for arena in arenas])
        self._reader.register(arenas)

    def reopen(self, paths: Collection[Path]) -> None:
        self._reader.reopen(paths)

    def set_queue_depth(self, depth: int) -> None:
        self._reader.set_queue_depth(depth)

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        self._reader.set_bandwidth(bytes_per_s)

    def figures(self) -> ReaderFigures:
        return self._reader.figures()

    def close(self, timeout_s: float = READER_CLOSE_S) -> bool:
        with self._changed:
            self._held = []
        return self._reader.close(timeout_s)

    # The test's side.

    def await_held(self, count: int) -> None:
        """Wait until that many reads are held."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._held) >= count, 30), self._held

    @property
    def num_held(self) -> int:
        with self._changed:
            return len(self._held)

    @property
    def held(self) -> list[Read]:
        with self._changed:
            return list(self._held)

    def let_go(self, count: int = 1) -> None:
        """Let the reader have the first of the held reads."""
        with self._changed:
            going, self._held = self._held[:count], self._held[count:]
        self._reader.submit(going)

    def let_all_go(self) -> None:
        """Hold nothing any more."""
        with self._changed:
            self.is_free = True
            going, self._held = self._held, []
        if going:
            self._reader.submit(going)

    def fail(self, code: int) -> None:
        """End the first held read with that error."""
        with self._changed:
            self._end(self._held[0], code)

    def _end(self, read: Read, code: int) -> None:
        self._held.remove(read)
        error = OSError(code, "as the test says", str(read.sources[0].path))
        self._ended.append(Done(read.tag, error, 0.0, 0))
        self._reader.wake()


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to bring something about."""
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it never came about"
        time.sleep(0.001)
