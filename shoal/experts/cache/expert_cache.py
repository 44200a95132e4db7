"""ExpertCache: which experts are in memory, who holds them, and what is read next (core).

    absent --want----------> QUEUED --room--> LOADING --loaded--> READY --evict--> absent
       `---prefetch, warm--------------room----^  `---failed--> absent

- The places of LOADING and READY experts lie in one arena; there is no other memory. Room for a
  newcomer is made by evicting READY experts that nobody holds and that are not pinned.
- One read an expert, however many want it: it is granted (held) to each of them as it is loaded.
- Calls take turns at starting reads, an expert a turn, so that a short call is not behind a long
  one. Only so many bytes are under way at a time: what a call wants last is evicted for last.
- A prefetch never makes room where a demand lacks it, and unused prefetches fill at most a part.
- An expert that is not owned any more, or lies in a part of the arena that was closed, is doomed:
  no new call finds it, and its place is freed when the last call lets go of it.

Nothing waits for ever: a call waits only while it holds nothing (going on to the next wave lets go
of the last one, and what was granted meanwhile is taken without waiting). So each held expert
belongs to a call that computes and then lets go, or to a table of a layer (resident_layers.py),
which goes when a demand `lacks_room`; each read ends; then all but the pins can be evicted, and
pins leave places for two of the largest experts. So the first demand gets its place.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from shoal.errors import ExpertUnavailable
from shoal.experts.cache.budget import check_budget
from shoal.experts.cache.entries import Counters, Demand, Entry
from shoal.experts.cache.extents import Extents
from shoal.experts.cache.policy import CachePolicy, Key
from shoal.limits import MIB

# Demand reads under way: 64 chunks of 1 MiB keep the deepest queue of a drive full.
MAX_LOADING_BYTES = 64 * MIB
MAX_UNUSED_PREFETCH_SHARE = 4  # one part in so many of the budget may hold unused prefetches


class ExpertCache:
    """Driven by a shell that holds a lock around every method and does the reading.

    Args:
        sizes: owned expert -> bytes, multiples of 4096.
        policy: chooses victims.
    """

    def __init__(self, sizes: Mapping[Key, int], policy: CachePolicy) -> None:
        self.counters = Counters()
        self.extents = Extents()
        self.budget_bytes = 0
        self.resident_bytes = 0  # places of LOADING, READY and doomed experts
        self.lacks_room = False  # the last `next_loads` ended because nothing could be evicted
        self.is_contended = True  # not everything fits: the policy must know of uses
        self._policy = policy
        self._sizes = dict(sizes)
        self._num_owned = Counter(layer for layer, _ in sizes)
        self._former: dict[Key, int] = {}  # owned before the last `own`
        self._largest = max(self._sizes.values(), default=0)
        self._total = sum(self._sizes.values())
        self._entries: dict[Key, Entry] = {}
        self._ready: dict[int, dict[int, Entry]] = {}
        self._doomed: set[Entry] = set()
        self._turns: deque[Demand] = deque()
        self.loading_bytes = 0  # of demands' reads under way
        self._num_loading = 0
        self._unused: dict[Key, Entry] = {}  # prefetches, the oldest first
        self._unused_bytes = 0
        self._wanted_pins: tuple[Key, ...] = ()
        self._pins: set[Key] = set()

    # Calls -----------------------------------------------------------------------------------

    def hold(self, layer: int, experts: Sequence[int]) -> list[Entry] | None:
        """Hold all of these experts if all are READY. `release` them."""
        ready = self._ready.get(layer)
        if ready is None:
            return None
        try:
            entries = [ready[index] for index in experts]
        except KeyError:
            return None
        for entry in entries:
            entry.refs += 1
        if self._unused:
            for entry in entries:
                if entry.is_prefetch:
                    self._note_used(entry)
        if self.is_contended:
            touch = self._policy.touch
            for entry in entries:
                touch(entry.key)
        self.counters.hits += len(entries)
        return entries

    def hold_layer(self, layer: int) -> list[Entry] | None:
        """Hold all owned experts of a layer if all are READY and nothing has to make room for more.

        That is no use of them: None, too, where one was read ahead and its first use is to come.
        """
        ready = self._ready.get(layer)
        if ready is None or self.is_contended or len(ready) != self._num_owned[layer]:
            return None
        entries = list(ready.values())
        if any(entry.is_prefetch for entry in entries):
            return None
        for entry in entries:
            entry.refs += 1
        return entries

    def want(
        self, layer: int, experts: Sequence[int]
    ) -> tuple[list[tuple[int, Entry]], Demand, list[Entry]]:
        """Hold those of these distinct experts that are READY, and queue the others.

        They are owned, or were (a call that was let in before `own`).

        Returns:
            (position, entry) of what is held now; the demand for the rest, to be taken from or
            withdrawn; reads under way that went behind demands, and are such themselves now.
        """
        held: list[tuple[int, Entry]] = []
        promoted: list[Entry] = []
        demand = Demand()
        for position, index in enumerate(experts):
            key = (layer, index)
            entry = self._entries.get(key)
            if entry is not None and entry.is_ready:
                self.counters.hits += 1
                self._use(entry)
                held.append((position, entry))
                continue
            self.counters.misses += 1
            if entry is None:
                entry = self._new_entry(key)
            elif entry.is_loading:
                self.counters.joined += 1
                if not entry.is_demanded:
                    promoted.append(entry)
                    if entry.is_prefetch:
                        self._note_used(entry)
                    self._count_loading(entry)
            if not entry.is_loading:
                demand.queued.append(entry)
            entry.waiters.append(demand)
            demand.waiting[entry] = position
        if demand.queued:
            self._turns.append(demand)
        return held, demand, promoted

    def take(self, demand: Demand) -> list[tuple[int, Entry]]:
        """Return what has come for a demand since the last time: held from now on by the call."""
        taken, demand.granted = demand.granted, []
        return taken

    def release(self, entries: Sequence[Entry]) -> None:
        """Let go of experts that were held. If `has_queue` then, ask for `next_loads`."""
        for entry in entries:
            entry.refs -= 1
        if self._doomed:
            for entry in self._doomed.intersection(entries):
                if entry.refs == 0:
                    self._free(entry)

    @property
    def has_queue(self) -> bool:
        """Whether demands wait for room or for their turn."""
        return bool(self._turns)

    def withdraw(self, demand: Demand) -> None:
        """Forget a demand: what was granted is let go of, what only it wanted is not read."""
        self.release([entry for _, entry in self.take(demand)])
        for entry in demand.waiting:
            entry.waiters.remove(demand)
            if not entry.waiters and not entry.is_loading and not entry.is_doomed:
                del self._entries[entry.key]
        demand.waiting = {}
        demand.queued.clear()

    # Reads -----------------------------------------------------------------------------------

    def next_loads(self) -> list[Entry]:
        """Return the demands' experts whose reads must start now; they are LOADING."""
        started: list[Entry] = []
        self.lacks_room = False
        while self._turns:
            demand = self._turns[0]
            while demand.queued and not demand.queued[0].is_queued:
                demand.queued.popleft()  # another demand had its turn first, or none wants it
            if not demand.queued:
                self._turns.popleft()
                continue
            entry = demand.queued[0]
            if self.loading_bytes and self.loading_bytes + entry.num_bytes > MAX_LOADING_BYTES:
                break
            if not self._place(entry, self._may_evict):
                self.lacks_room = True
                break
            demand.queued.popleft()
            self._turns.rotate(-1)
            self._count_loading(entry)
            started.append(entry)
        return started

    def loaded(self, entry: Entry) -> list[Demand]:
        """Its bytes are there and right. Returns the demands that it is granted to."""
        self._end_loading(entry)
        entry.is_ready = True
        granted, entry.waiters = entry.waiters, []
        for demand in granted:
            entry.refs += 1
            demand.granted.append((demand.waiting.pop(entry), entry))
        if entry.is_doomed:
            if not granted:
                self._free(entry)
            return granted
        layer, index = entry.key
        self._ready.setdefault(layer, {})[index] = entry
        self._policy.insert(entry.key, entry.is_prefetch)
        if entry.key in self._pins and not self._leaves_places():
            self._pins.discard(entry.key)
        return granted

    def failed(self, entry: Entry, error: BaseException) -> list[Demand]:
        """It could not be read. Returns the demands that learn of it; the next one tries again."""
        self._end_loading(entry)
        self._leave(entry)
        told, entry.waiters = entry.waiters, []
        for demand in told:
            del demand.waiting[entry]
            if demand.error is None or isinstance(demand.error, ExpertUnavailable):
                demand.error = error  # what will not pass outweighs what may
        return told

    def retry(self, entry: Entry) -> None:
        """Its prefetch was given up just before a demand came for it: it is read first of all."""
        assert entry.waiters, "nobody wants it"
        self._end_loading(entry)
        self._free(entry)
        turn = Demand()
        turn.queued.append(entry)
        self._turns.appendleft(turn)

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[Entry]:
        """Return those of these experts whose reads start now, for nobody; they are LOADING."""
        started: list[Entry] = []
        if self._turns:
            return started
        for index in experts:
            key = (layer, index)
            if key in self._entries or key not in self._sizes:
                continue
            entry = Entry(key, self._sizes[key])
            has_room = self._has_room_to_guess(entry.num_bytes)
            if not (has_room and self._place(entry, self._may_evict)):
                break
            self._entries[key] = entry
            entry.is_prefetch = True
            self._unused[key] = entry
            self._unused_bytes += entry.num_bytes
            self.counters.prefetch_issued += 1
            self.counters.prefetch_issued_bytes += entry.num_bytes
            started.append(entry)
        return started

    def warm(self, key: Key, demand: Demand, *, is_demand: bool = True) -> Entry | None:
        """Start to read an owned expert, for `demand`, if it is absent and there is free room.

        Evicts nothing. is_demand: its read goes with those of calls. None: nothing was started.
        """
        if key in self._entries:
            return None
        entry = Entry(key, self._sizes[key])
        if not self._place(entry, None):
            return None
        self._entries[key] = entry
        entry.waiters.append(demand)
        demand.waiting[entry] = 0
        if is_demand:
            self._count_loading(entry)
        return entry

    def unwanted_prefetches(self, layer: int | None = None) -> list[Entry]:
        """Return the prefetches under way (of that layer) that no demand has come for."""
        return [
            entry
            for key, entry in self._unused.items()
            if entry.is_loading and (layer is None or key[0] == layer)
        ]

    # What is in memory -----------------------------------------------------------------------

    def is_resident(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether all of these are READY. May be asked without the lock."""
        ready = self._ready.get(layer)
        return ready is not None and all(index in ready for index in experts)

    def absent(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Return those that are neither in memory nor wanted, in that order."""
        return [index for index in experts if (layer, index) not in self._entries]

    @property
    def num_ready(self) -> int:
        return sum(map(len, self._ready.values()))

    @property
    def num_pending(self) -> int:
        """Experts that are QUEUED or LOADING for a demand (or more, where several queue for it)."""
        return self._num_loading + sum(len(demand.queued) for demand in self._turns)

    @property
    def num_pinned(self) -> int:
        """Experts that will not be evicted, in memory or not."""
        return len(self._pins)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the pinned experts that are in memory."""
        return sum(e.num_bytes for key in self._pins if (e := self._entries.get(key)) is not None)

    # Configuration ---------------------------------------------------------------------------

    def check_budget(self, num_bytes: int, sizes: Mapping[Key, int] | None = None) -> None:
        """Raise UsageError if that budget is too small for what is (or would be) owned."""
        check_budget(num_bytes, self._sizes if sizes is None else sizes, self.extents)

    def set_budget(self, num_bytes: int) -> None:
        """Use the first `num_bytes` of the arena, whose segments must be there already.

        What lies beyond is evicted now, or when it is let go of (`extents.is_closed_part_free`).
        """
        self.budget_bytes = num_bytes
        self.extents.set_open_bytes(num_bytes)
        for entry in list(self._entries.values()):
            has_place = entry.is_loading or entry.is_ready
            if has_place and entry.address + entry.num_bytes > self.extents.limit:
                self._doom(entry)
        self._configure()

    def own(self, sizes: Mapping[Key, int]) -> None:
        """Own these experts from now on; what is not among them leaves."""
        self._former |= self._sizes
        self._sizes = dict(sizes)
        self._num_owned = Counter(layer for layer, _ in sizes)
        self._largest = max(self._sizes.values(), default=0)
        self._total = sum(self._sizes.values())
        for key, entry in list(self._entries.items()):
            if key not in self._sizes:
                self._doom(entry)
        self._configure()

    def pin(self, keys: Collection[Key]) -> int:
        """Pin these, the first the most wanted, and no others. Returns how many can be."""
        self._wanted_pins = tuple(keys)
        self._pins = set()
        left = self.budget_bytes - (2 * self._largest if self.is_contended else 0)
        for key in self._wanted_pins:
            if key in self._sizes and key not in self._pins:
                left -= self._sizes[key]
                if left < 0:
                    break
                self._pins.add(key)
        while self._pins and not self._leaves_places():
            self._pins.pop()
        return len(self._pins)

    def check_integrity(self) -> None:
        """Assert the rules of this file."""
        placed = [e for e in self._entries.values() if e.is_loading or e.is_ready]
        placed += self._doomed
        self.extents.check_integrity([(e.address, e.num_bytes) for e in placed])
        assert self.resident_bytes == sum(entry.num_bytes for entry in placed)
        inside = [e for e in placed if not e.is_doomed]
        assert sum(entry.num_bytes for entry in inside) <= self.budget_bytes
        assert all(e.address + e.num_bytes <= self.extents.limit for e in inside)
        for key, entry in self._entries.items():
            assert entry.key == key and not entry.is_doomed and entry.refs >= 0
            assert not (entry.is_loading and entry.is_ready)
            assert entry.is_loading or entry.is_ready or entry.waiters, f"{key}: queued for nobody"
            assert not (entry.is_ready and entry.waiters), f"{key}: granted to nobody"
            assert entry.is_ready or entry.refs == 0, f"{key}: held before it is there"
            assert (self._ready.get(key[0], {}).get(key[1]) is entry) == entry.is_ready
            assert (key in self._unused) == entry.is_prefetch
        for entry in self._doomed:
            assert entry.is_doomed and (entry.is_loading or entry.refs), "a place was lost"
        queued = {id(entry) for demand in self._turns for entry in demand.queued}
        for entry in self._entries.values():
            assert entry.is_loading or entry.is_ready or id(entry) in queued, "it never gets a turn"
        assert self._unused_bytes == sum(entry.num_bytes for entry in self._unused.values())

    # Inside ----------------------------------------------------------------------------------

    def _configure(self) -> None:
        self.is_contended = self.budget_bytes < self._total
        mean = self._total // max(1, len(self._sizes))
        self._policy.resize(max(2, self.budget_bytes // max(1, mean)))
        self.pin(self._wanted_pins)

    def _may_evict(self, key: Key) -> bool:
        return self._entries[key].refs == 0 and key not in self._pins

    def _place(self, entry: Entry, may_evict: Callable[[Key], bool] | None) -> bool:
        while (address := self.extents.place(entry.num_bytes)) is None:
            key = self._policy.victim(entry.key, may_evict) if may_evict is not None else None
            if key is None:
                return False
            self._evict(self._entries[key])
        entry.address = address
        entry.is_loading = True
        self.resident_bytes += entry.num_bytes
        if entry.is_doomed:
            self._doomed.add(entry)
        return True

    def _end_loading(self, entry: Entry) -> None:
        entry.is_loading = False
        if entry.is_demanded:
            entry.is_demanded = False
            self.loading_bytes -= entry.num_bytes
            self._num_loading -= 1

    def _count_loading(self, entry: Entry) -> None:
        entry.is_demanded = True
        self.loading_bytes += entry.num_bytes
        self._num_loading += 1

    def _evict(self, entry: Entry) -> None:
        self.counters.evictions += 1
        self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        # Nobody holds it: neither a call nor a read. (A doomed one is in no list any more.)
        if not entry.is_doomed:
            self._forget(entry)
        self._free(entry)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.key]
        if entry.is_ready:
            layer, index = entry.key
            del self._ready[layer][index]
            self._policy.remove(entry.key)
        if entry.is_prefetch:
            self._end_guess(entry)
            self.counters.prefetch_wasted += 1
            self.counters.prefetch_wasted_bytes += entry.num_bytes

    def _free(self, entry: Entry) -> None:
        entry.is_ready = False
        entry.payload = None
        self._doomed.discard(entry)
        self.extents.give(entry.address, entry.num_bytes)
        self.resident_bytes -= entry.num_bytes

    def _doom(self, entry: Entry) -> None:
        self._forget(entry)
        entry.is_doomed = True
        if entry.is_loading or entry.refs:
            self._doomed.add(entry)
        elif entry.is_ready:
            self._free(entry)

    def _new_entry(self, key: Key) -> Entry:
        size = self._sizes.get(key)
        if size is not None:
            entry = self._entries[key] = Entry(key, size)
        else:
            entry = Entry(key, self._former[key])
            entry.is_doomed = True
        return entry

    def _use(self, entry: Entry) -> None:
        entry.refs += 1
        if entry.is_prefetch:
            self._note_used(entry)
        if self.is_contended:
            self._policy.touch(entry.key)

    def _note_used(self, entry: Entry) -> None:
        self._end_guess(entry)
        self.counters.prefetch_used += 1
        self.counters.prefetch_used_bytes += entry.num_bytes

    def _end_guess(self, entry: Entry) -> None:
        entry.is_prefetch = False
        del self._unused[entry.key]
        self._unused_bytes -= entry.num_bytes

    def _has_room_to_guess(self, num_bytes: int) -> bool:
        # Old guesses that nobody wanted make room for new ones.
        most = self.budget_bytes // MAX_UNUSED_PREFETCH_SHARE
        while self._unused_bytes + num_bytes > most:
            stale = next((e for e in self._unused.values() if e.is_ready), None)
            if stale is None:
                return False
            self._evict(stale)
        return True

    def _leaves_places(self) -> bool:
        pinned = [self._entries[key] for key in self._pins if key in self._entries]
        kept = [(entry.address, entry.num_bytes) for entry in pinned if not entry.is_queued]
        places = self.extents.num_places_beside(kept, self._largest)
        return places >= 2 or not self.is_contended
