"""WarmUp: owned experts read into memory before anybody asks for them, or beside those who do.

In the background its reads go behind every demand's, and few of them are under way: what a call
wants never waits for more than these. A call that wants an expert which is under way joins its
read, which is a demand from then on.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from shoal.errors import ExpertUnavailable
from shoal.experts.cache.entries import Demand, Entry
from shoal.experts.cache.expert_cache import MAX_LOADING_BYTES, ExpertCache
from shoal.experts.store import Key, WarmUpProgress
from shoal.limits import MIB

# Read and checked meanwhile, in the background: two processors take 15 ms for it, and a drive of
# 2.7 GB/s 12 ms. A call that comes waits as long at the worst.
MAX_BACKGROUND_BYTES = 24 * MIB


class StartReads(Protocol):
    """Begins to read these experts, which have their places. Under the store's lock."""

    def __call__(self, entries: Sequence[Entry], *, is_prefetch: bool) -> None: ...


class WarmUp:
    """At most one runs at a time, on whatever thread.

    Args:
        lock: the store's. cache: guarded by it.
        withdraw: forgets what a demand still waits for; takes the lock.
    """

    def __init__(
        self,
        lock: threading.Lock,
        cache: ExpertCache,
        start: StartReads,
        withdraw: Callable[[Demand], None],
    ) -> None:
        self._lock = lock
        self._cache = cache
        self._start = start
        self._withdraw = withdraw
        self._demand: Demand | None = None
        self._closed: BaseException | None = None

    def run(
        self,
        wanted: Sequence[Key],
        sizes: Mapping[Key, int],
        report: Callable[[WarmUpProgress], None],
        *,
        is_background: bool,
    ) -> None:
        """See `ExpertStore.warm_up`; `wanted`: owned experts, whose sizes these are."""
        began_s = time.perf_counter()
        ends = itertools.accumulate(sizes[key] for key in wanted)
        total = [end for end in ends if end <= self._cache.budget_bytes]
        waiting = deque(wanted[: len(total)])
        demand = self._demand = Demand()
        try:
            for position, done_bytes in enumerate(total, start=1):
                self._await(waiting, demand, len(total) - position, is_background=is_background)
                elapsed_s = time.perf_counter() - began_s
                report(WarmUpProgress(position, len(total), done_bytes, total[-1], elapsed_s))
        except BaseException:
            self._withdraw(demand)
            raise
        finally:
            self._demand = None

    def abandon(self, error: BaseException) -> None:
        """Have the one that runs raise `error`; nothing if there is none."""
        with self._lock:
            if self._demand is not None:
                self._demand.error = error
                if self._demand.payload is not None:
                    self._demand.payload.notify_all()

    def close(self, error: BaseException) -> None:
        """Have the one that runs, and any that begins later, raise `error`."""
        self._closed = error
        self.abandon(error)

    def _await(
        self, waiting: deque[Key], demand: Demand, may_be_left: int, *, is_background: bool
    ) -> None:
        # Keep reads under way until no more than `may_be_left` experts are still to come. One that
        # cannot be read is left out (the store remembers it): calls that want it will be told.
        with self._lock:
            while True:
                self._cache.release([entry for _, entry in self._cache.take(demand)])
                if isinstance(demand.error, ExpertUnavailable):
                    demand.error = None
                if error := self._closed or demand.error:
                    raise error
                started: list[Entry] = []
                while waiting and self._may_start(demand, is_background):
                    entry = self._cache.warm(waiting.popleft(), demand, is_demand=not is_background)
                    started += [entry] if entry is not None else []
                self._start(started, is_prefetch=is_background)
                if len(waiting) + len(demand.waiting) <= may_be_left:
                    return
                if demand.payload is None:
                    demand.payload = threading.Condition(self._lock)
                demand.payload.wait()

    def _may_start(self, demand: Demand, is_background: bool) -> bool:
        if not is_background:
            return self._cache.loading_bytes < MAX_LOADING_BYTES
        return sum(entry.num_bytes for entry in demand.waiting) < MAX_BACKGROUND_BYTES
