"""StreamingStore: experts from files into one arena within a budget, read while others compute.

Bytes go from the file straight into their place in the arena and are checked there against the
manifest's hash; nothing is parsed or copied. What failed its check is never given out. The cache
core (`shoal.experts.cache`) decides, under one lock; whoever changes something starts the reads
that follow from it; one thread waits for reads to end, a few others check hashes.
"""

import atexit
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from shoal.errors import CallCancelled, ExpertUnavailable, ShoalError, UsageError
from shoal.experts.acquisition import Held, WavedAcquisition, WholeAcquisition
from shoal.experts.cache.arena import Arena
from shoal.experts.cache.entries import Demand, Entry
from shoal.experts.cache.expert_cache import ExpertCache
from shoal.experts.cache.policy import CachePolicy
from shoal.experts.catalogue import Catalogue, Listing
from shoal.experts.checks import Checker, read_failure
from shoal.experts.options import Verify
from shoal.experts.ownership import Ownership
from shoal.experts.populator import Populator
from shoal.experts.readers import Done, Read, Reader
from shoal.experts.resident_layers import ResidentLayers
from shoal.experts.store import Acquisition, ExpertFiles, Key, StoreFigures, WarmUpProgress
from shoal.experts.throughput import Throughput
from shoal.experts.warm_up import WarmUp
from shoal.experts.workers import Workers
from shoal.limits import READER_CLOSE_S
from shoal.log import get_logger

IDLE_WAIT_S = 60.0  # of the loader; a wake ends it
MAX_CHECKERS = 4  # threads that hash, 2.4 GB/s each: a drive of 10 GB/s
_log = get_logger("store")


class StreamingStore:
    """An `ExpertStore` on a `Reader`. Thread-safe. `open_store` makes one.

    Args:
        files: whose experts; catalogue: where they are.
        cache_bytes: the budget; None: all that is owned.
        open_reader: called once with the files' paths.
        checker: of hashes; None: one that checks each expert once.
    """

    def __init__(
        self,
        files: ExpertFiles,
        ownership: Ownership,
        make_catalogue: Callable[[ExpertFiles, Ownership], Catalogue],
        policy: CachePolicy,
        open_reader: Callable[[Collection[Path]], Reader],
        *,
        cache_bytes: int | None = None,
        checker: Checker | None = None,
    ) -> None:
        self.ownership = ownership
        self._files = files
        self._make_catalogue = make_catalogue
        self._catalogue = make_catalogue(files, ownership)
        self._former: dict[Key, Listing] = {}  # not owned any more, but calls may still want them
        self._cache_bytes = cache_bytes
        self._checker = checker or Checker(Verify.FIRST)
        self._cache = ExpertCache(self._catalogue.sizes, policy)
        self._arena = Arena()
        self._lock = threading.Lock()
        self._populator = Populator(self._lock, self._cache.extents, self._arena, self._go_on)
        self._resident = ResidentLayers(self._lock, self._cache, self._go_on)
        self.tables = self._resident.tables
        self._checkers = Workers(min(MAX_CHECKERS, os.cpu_count() or 1), "shoal-check")
        self._tags = itertools.count()
        self._reading: dict[int, tuple[Entry, Listing]] = {}
        self._tag_of: dict[Entry, int] = {}
        self._throughput = Throughput()
        self._stall_s = 0.0
        self._num_waiting = 0
        self._unavailable: dict[Key, str] = {}
        self._allows_prefetch = True
        self._has_closed_part = False
        self._warm_up = WarmUp(self._lock, self._cache, self._start, self.withdraw)
        self._is_closed = False
        self.leaves_reads = False  # `close` went without reads that did not end
        self._set_budget()
        self._reader = open_reader(self._catalogue.paths)
        self._own_queue_depth = self._reader.figures().queue_depth
        self._register()
        with self._lock:
            self._populate()
        # A daemon, closed at exit: a store that nobody closed does not keep the process.
        self._loader = threading.Thread(target=self._load, name="shoal-loader", daemon=True)
        self._loader.start()
        atexit.register(self.close)

    @property
    def num_bytes(self) -> int:
        """See `ExpertStore.num_bytes`."""
        return self._catalogue.num_bytes

    # Calls -----------------------------------------------------------------------------------

    def acquire(self, layer: int, experts: Sequence[int]) -> Acquisition:
        """See `ExpertStore.acquire`."""
        with self._lock:
            entries = self._cache.hold(layer, experts)
            if entries is None:
                return self._want(layer, experts)
            if not self._cache.is_contended:
                self._resident.offer(layer, self._files.expert_layout)
        return WholeAcquisition(self, entries)

    def try_acquire(self, layer: int, experts: Sequence[int]) -> Acquisition | None:
        """See `ExpertStore.try_acquire`."""
        with self._lock:
            entries = self._cache.hold(layer, experts)
            if entries is None:
                return None
            if not self._cache.is_contended:
                self._resident.offer(layer, self._files.expert_layout)
        return WholeAcquisition(self, entries)

    def is_resident(self, layer: int, experts: Sequence[int]) -> bool:
        """See `ExpertStore.is_resident`."""
        return self._cache.is_resident(layer, experts)

    def release(self, entries: list[Entry]) -> None:
        """Let go of what an acquisition held."""
        with self._lock:
            self._cache.release(entries)
            if self._cache.has_queue or self._has_closed_part:
                self._go_on()

    def withdraw(self, demand: Demand) -> None:
        """Forget what an acquisition did not take."""
        with self._lock:
            self._cache.withdraw(demand)
            self._go_on()

    def await_more(self, waiting: WavedAcquisition) -> tuple[Held, float]:
        """Wait for more of a demand; return it, and the seconds that it took."""
        demand = waiting.demand
        began_s = time.perf_counter()
        with self._lock:
            while True:
                if waiting.abandoned is not None:
                    raise waiting.abandoned
                if demand.error is not None:  # each caller gets one of its own
                    raise type(demand.error)(*demand.error.args) from demand.error
                if held := self._cache.take(demand):
                    waited_s = time.perf_counter() - began_s
                    self._stall_s += waited_s
                    return held, waited_s
                if demand.payload is None:
                    demand.payload = threading.Condition(self._lock)
                self._num_waiting += 1
                demand.payload.wait()
                self._num_waiting -= 1

    def abandon(self, waiting: WavedAcquisition, error: BaseException) -> None:
        """End an acquisition's wait by raising `error` from it."""
        with self._lock:
            waiting.abandoned = error
            self._tell((waiting.demand,))

    # Reading ahead ---------------------------------------------------------------------------

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """See `ExpertStore.prefetch`."""
        with self._lock:
            if not self._allows_prefetch or self._is_closed:
                return 0
            entries = self._cache.prefetch(layer, experts)
            self._start(entries, is_prefetch=True)
            return len(entries)

    def cancel_prefetch(self, layer: int | None = None) -> None:
        """See `ExpertStore.cancel_prefetch`; `layer`: only that layer's."""
        with self._lock:
            self._cancel(self._cache.unwanted_prefetches(layer))

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return those that are neither in memory nor being read, in that order."""
        return self._cache.absent(layer, experts)

    def num_demand_reads(self) -> int:
        """How many demand reads are queued or under way."""
        with self._lock:
            return self._cache.num_pending

    def prefetch_bytes(self) -> tuple[int, int, int]:
        """Return the bytes so far (issued, used by a call, dropped without use)."""
        counters = self._cache.counters
        return (
            counters.prefetch_issued_bytes,
            counters.prefetch_used_bytes,
            counters.prefetch_wasted_bytes,
        )

    def read_bandwidth(self) -> float:
        """Bytes a second that reads have lately come at; 0.0 before the first one."""
        return self._throughput.bytes_per_s

    def warm_up(
        self,
        report: Callable[[WarmUpProgress], None],
        order: Sequence[Key] | None = None,
        *,
        is_background: bool = False,
    ) -> None:
        """See `ExpertStore.warm_up`."""
        sizes = self._catalogue.sizes
        wanted = [key for key in (sizes if order is None else order) if key in sizes]
        self._warm_up.run(wanted, sizes, report, is_background=is_background)

    def abandon_warm_up(self, error: BaseException) -> None:
        """See `ExpertStore.abandon_warm_up`."""
        self._warm_up.abandon(error)

    # Configuration ---------------------------------------------------------------------------

    def resize(self, num_bytes: int | None) -> None:
        """See `ExpertStore.resize`."""
        with self._lock:
            self._cache.check_budget(self._budget(num_bytes, self._catalogue))
            self._resident.withdraw()
            self._cache_bytes = num_bytes
            self._set_budget()
            self._register()
            self._go_on()
            self._populate()

    def set_verify(self, verify: Verify) -> None:
        """See `ExpertStore.set_verify`."""
        self._checker.verify = verify

    def set_pace(
        self, queue_depth: int | None, bytes_per_s: float | None, *, allows_prefetch: bool
    ) -> None:
        """See `ExpertStore.set_pace`."""
        self._reader.set_queue_depth(queue_depth or self._own_queue_depth)
        self._reader.set_bandwidth(bytes_per_s)
        with self._lock:
            self._allows_prefetch = allows_prefetch
            if not allows_prefetch:
                self._cancel(self._cache.unwanted_prefetches())

    def pin(self, keys: Collection[Key]) -> int:
        """See `ExpertStore.pin`."""
        with self._lock:
            return self._cache.pin(keys)

    def rebind(self, files: ExpertFiles, ownership: Ownership) -> None:
        """See `ExpertStore.rebind`."""
        if files.identity != self._files.identity:
            raise UsageError(
                f"{files.path} is another model: its identity is {files.identity[:12]}, the one "
                f"that is served {self._files.identity[:12]}: start a node of its own for it"
            )
        catalogue = self._make_catalogue(files, ownership)
        with self._lock:
            budget = self._budget(self._cache_bytes, catalogue)
            self._cache.check_budget(budget, catalogue.sizes)
        self._reader.reopen(catalogue.paths)
        with self._lock:
            self._resident.withdraw()
            self._former |= self._catalogue.listings
            self._files, self._catalogue = files, catalogue
            self.ownership = ownership
            self._cache.own(catalogue.sizes)
            self._set_budget()
            self._register()
            self._go_on()
            self._populate()

    def figures(self) -> StoreFigures:
        """See `StoreFigures`."""
        reader = self._reader.figures()
        with self._lock:
            cache, counters = self._cache, self._cache.counters
            return StoreFigures(
                hits=counters.hits + self._resident.num_hits,
                misses=counters.misses,
                joined=counters.joined,
                num_bytes=reader.num_bytes,
                evictions=counters.evictions,
                stall_s=self._stall_s,
                num_resident=cache.num_ready,
                resident_bytes=cache.resident_bytes,
                pinned_bytes=cache.pinned_bytes,
                budget_bytes=cache.budget_bytes,
                populated_bytes=self._populator.num_bytes,
                num_waiting=self._num_waiting,
                num_loading=cache.num_pending,
                prefetch_issued=counters.prefetch_issued,
                prefetch_used=counters.prefetch_used,
                prefetch_wasted=counters.prefetch_wasted,
                prefetch_issued_bytes=counters.prefetch_issued_bytes,
                prefetch_used_bytes=counters.prefetch_used_bytes,
                prefetch_wasted_bytes=counters.prefetch_wasted_bytes,
                num_verified=self._checker.num_verified,
                num_corrupt=self._checker.num_corrupt,
                unavailable=tuple(self._unavailable.items()),
                reader=reader,
            )

    def close(self, timeout_s: float = READER_CLOSE_S) -> None:
        """See `ExpertStore.close`. Safe to call again.

        Args:
            timeout_s: for reads at the device; `leaves_reads` says whether it was too short.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._resident.withdraw()
            populating = self._populator.stop()
        self._warm_up.close(CallCancelled("the store is closed"))
        self._reader.wake()
        self._loader.join()
        self._checkers.close()
        self.leaves_reads = not self._reader.close(timeout_s)
        if populating is not None:
            populating.join()
        atexit.unregister(self.close)

    # Inside, under the lock unless said ------------------------------------------------------

    def _want(self, layer: int, experts: Sequence[int]) -> Acquisition:
        listed = self._catalogue.listings
        if not all((layer, i) in listed or (layer, i) in self._former for i in experts):
            self.ownership.check(layer, experts)
        if self._is_closed:
            raise ExpertUnavailable("the store is closed")
        held, demand, promoted = self._cache.want(layer, experts)
        for entry in promoted:
            self._reader.promote(self._tag_of[entry])
        self._go_on()
        return WavedAcquisition(self, held, demand)

    def _go_on(self) -> None:
        # Start what can start now, and give back what can be given back.
        if self._is_closed:
            return
        if self._cache.has_queue:
            self._start(self._cache.next_loads())
            if self._cache.lacks_room:
                self._cancel(self._cache.unwanted_prefetches())
                if self.tables:  # what is free lies in pieces that are too small
                    self._resident.withdraw()
                    self._start(self._cache.next_loads())
        may_give_back = self._has_closed_part and not self._populator.is_busy
        if may_give_back and self._cache.extents.is_closed_part_free():
            self._has_closed_part = False
            self._give_back()

    def _start(self, entries: Sequence[Entry], *, is_prefetch: bool = False) -> None:
        reads: list[Read] = []
        for entry in entries:
            listing = self._catalogue.listings.get(entry.key) or self._former[entry.key]
            tag = next(self._tags)
            entry.payload = self._arena.view(entry.address, entry.num_bytes)
            self._reading[tag] = (entry, listing)
            self._tag_of[entry] = tag
            reads.append(Read(tag, listing.sources, entry.payload, is_prefetch))
        if reads:
            self._reader.submit(reads)

    def _cancel(self, entries: Collection[Entry]) -> None:
        if entries:
            self._reader.cancel([self._tag_of[entry] for entry in entries])

    def _tell(self, demands: Collection[Demand]) -> None:
        for demand in demands:
            if demand.payload is not None:
                demand.payload.notify_all()

    def _budget(self, cache_bytes: int | None, catalogue: Catalogue) -> int:
        total = catalogue.num_bytes
        return total if cache_bytes is None else min(cache_bytes, total)

    def _set_budget(self) -> None:
        budget = self._budget(self._cache_bytes, self._catalogue)
        self._cache.check_budget(budget)
        extents = self._cache.extents
        if budget > extents.capacity:
            size = budget - extents.capacity
            self._arena.grow(extents.grow(size), size)
        self._cache.set_budget(budget)
        self._has_closed_part = budget < extents.capacity

    def _register(self) -> None:
        # What is read once gains nothing from it; what was registered before must not stay.
        limit = self._cache.extents.limit if self._cache_bytes is not None else 0
        self._reader.register(self._arena.parts_below(limit))

    def _give_back(self) -> None:
        self._register()  # before the pages go: registered memory would keep them
        for address in self._cache.extents.drop_closed_segments():
            self._arena.drop(address)
        self._arena.give_back_from(self._cache.extents.limit)
        self._populator.note_given_back(self._cache.extents.limit)

    def _populate(self) -> None:
        # What has no bound of its own grows as it is read, at the start, and then never again.
        if self._cache_bytes is not None:
            self._populator.go_on()

    def _load(self) -> None:
        # The loader's thread, without the lock.
        while not self._is_closed:
            for done in self._reader.wait(IDLE_WAIT_S):
                entry, listing = self._reading[done.tag]
                if done.error is not None:
                    self._end(entry, listing, done, read_failure(entry.key, listing, done.error))
                elif self._checker.is_due(entry.key, done.origin):
                    self._checkers.submit(partial(self._check, entry, listing, done))
                else:
                    self._end(entry, listing, done, None)

    def _check(self, entry: Entry, listing: Listing, done: Done) -> None:
        # A checker's thread, without the lock: hashing takes time.
        error: BaseException | None = None
        try:
            is_alone = not self._checkers.is_crowded
            memory, origin = entry.payload, done.origin
            self._checker.check(entry.key, listing, memory, origin, is_alone=is_alone)
        except ShoalError as problem:
            error = problem
        except Exception as problem:  # noqa: BLE001  the top of a thread: calls wait for its word
            _log.exception("bug", expert=entry.key)
            error = ExpertUnavailable(f"expert {entry.key[1]} of layer {entry.key[0]}: {problem!r}")
        self._end(entry, listing, done, error)

    def _end(self, entry: Entry, listing: Listing, done: Done, error: BaseException | None) -> None:
        is_cancelled = done.error is not None and done.error.errno == errno.ECANCELED
        with self._lock:
            del self._reading[done.tag], self._tag_of[entry]
            told: list[Demand] = []
            if error is None:
                self._throughput.note(done.num_bytes, done.seconds, time.perf_counter())
                self._unavailable.pop(entry.key, None)
                entry.payload = entry.payload[: listing.used_bytes]
                told = self._cache.loaded(entry)
            elif is_cancelled and entry.waiters:
                self._cache.retry(entry)
            else:
                if not is_cancelled:
                    self._unavailable[entry.key] = str(error)
                told = self._cache.failed(entry, error)
            self._tell(told)
            self._go_on()
