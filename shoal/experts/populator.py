"""Populator: has the arena's free memory backed by pages before the first experts are read into it.

Memory that was never touched is given by the system at its first use: on a virtual machine whose
host does likewise that took 5 s a GiB (0.2 s where the host had it), while the drive and the call
waited. A thread of low priority goes ahead of that, from the lowest address on, which is also where
`Extents` places what comes next: who is placed is not waited for, and what others filled meanwhile
is passed over.
"""

import os
import sys
import threading
from collections.abc import Callable

from shoal.experts.cache.arena import U8, Arena
from shoal.experts.cache.extents import Extents
from shoal.limits import MIB
from shoal.log import get_logger
from shoal.ops.reads import populate

PART_BYTES = 2 * MIB  # of one step, a huge page: whoever waits for its end waits 10 ms at the worst
NICENESS = 5  # its thread's, on top of the process's: computing and reading go first
_log = get_logger("store")


class Populator:
    """Methods are called under the store's lock; the thread takes it between its steps.

    Args:
        lock: the store's. extents, arena: guarded by it.
        after_step: called under the lock after each step.
        populate: does one; returns 0 or an errno.
    """

    def __init__(
        self,
        lock: threading.Lock,
        extents: Extents,
        arena: Arena,
        after_step: Callable[[], None],
        populate: Callable[[U8], int] = populate,
    ) -> None:
        self.num_bytes = 0  # populated so far
        self._lock = lock
        self._extents = extents
        self._arena = arena
        self._after_step = after_step
        self._populate = populate
        self._position = 0  # all below was populated, or was in use
        self._part: U8 | None = None  # being populated
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    @property
    def is_busy(self) -> bool:
        """Whether some memory is being populated now: its pages cannot be given back."""
        return self._part is not None

    def go_on(self) -> None:
        """Populate what is free and was not yet, in the background."""
        if self._thread is None and not self._is_stopped:
            self._thread = threading.Thread(target=self._run, name="shoal-populate", daemon=True)
            self._thread.start()

    def note_given_back(self, limit: int) -> None:
        """Learn that addresses from `limit` on have lost their pages."""
        self._position = min(self._position, limit)

    def stop(self) -> threading.Thread | None:
        """Populate no more; return the thread that may still be at its last step, to be joined."""
        self._is_stopped = True
        return self._thread

    def _run(self) -> None:
        _lower_priority()
        while (part := self._next_part()) is not None:
            if code := self._populate(part):
                # Not fatal: whoever is placed there meets it too, or it has passed by then.
                _log.warning("no memory ahead of use", error=os.strerror(code))
                with self._lock:
                    self._is_stopped = True

    def _next_part(self) -> U8 | None:
        with self._lock:
            had_part, self._part = self._part is not None, None
            if had_part:
                self._after_step()
            free = None if self._is_stopped else self._extents.free_from(self._position)
            if free is None:
                self._thread = None
                return None
            address, num_bytes = free
            num_bytes = min(num_bytes, PART_BYTES - address % PART_BYTES)
            self._position = address + num_bytes
            self.num_bytes += num_bytes
            self._part = self._arena.view(address, num_bytes)
            return self._part


def _lower_priority() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))
