"""Eviction policies that know an order of use: LRU, S3-FIFO, W-TinyLFU (core).

`frequency.py` has those that count uses, `layers.py` the one that gives each layer its own budget.
docs/expert-cache.md compares them all on real routing.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from shoal.experts.cache.policy import Key


def first_that_may(keys: Iterable[Key], may_evict: Callable[[Key], bool]) -> Key | None:
    """Return the first of `keys` that may be evicted."""
    return next((key for key in keys if may_evict(key)), None)


class Lru:
    """Evicts what was not used for the longest time."""

    def __init__(self, num_experts: int) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()  # the least recently used first

    def touch(self, key: Key) -> None:
        """See CachePolicy."""
        self._order.move_to_end(key)

    def insert(self, key: Key, is_prefetch: bool) -> None:
        """See CachePolicy."""
        self._order[key] = None

    def victim(self, newcomer: Key, may_evict: Callable[[Key], bool]) -> Key | None:
        """See CachePolicy."""
        return first_that_may(self._order, may_evict)

    def remove(self, key: Key) -> None:
        """See CachePolicy."""
        del self._order[key]

    def resize(self, num_experts: int) -> None:
        """See CachePolicy."""


class S3Fifo:
    """Three FIFO queues: newcomers prove themselves in a small one before they enter the main one.

    An expert that leaves the small queue unused is remembered by name; if it comes back soon it
    goes straight to the main queue. Main gives each a further round for each use.

    Source: Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023.
    """

    SMALL_SHARE = 10  # percent of the places: the paper's
    MAX_FREQUENCY = 3  # the paper's two bits

    def __init__(self, num_experts: int) -> None:
        self._small: OrderedDict[Key, None] = OrderedDict()  # the oldest first
        self._main: OrderedDict[Key, None] = OrderedDict()
        self._ghosts: OrderedDict[Key, None] = OrderedDict()
        self._frequency: dict[Key, int] = {}
        self.resize(num_experts)

    def resize(self, num_experts: int) -> None:
        """See CachePolicy."""
        self._max_small = max(1, num_experts * self.SMALL_SHARE // 100)
        self._max_ghosts = max(1, num_experts)

    def touch(self, key: Key) -> None:
        """See CachePolicy."""
        if self._frequency[key] < self.MAX_FREQUENCY:
            self._frequency[key] += 1

    def insert(self, key: Key, is_prefetch: bool) -> None:
        """See CachePolicy."""
        self._frequency[key] = 0
        is_known = key in self._ghosts
        self._ghosts.pop(key, None)
        (self._main if is_known and not is_prefetch else self._small)[key] = None

    def victim(self, newcomer: Key, may_evict: Callable[[Key], bool]) -> Key | None:
        """See CachePolicy."""
        # Each step uses up a count or moves an expert out of the small queue, so after this many
        # every expert has been looked at without one.
        for _ in range((self.MAX_FREQUENCY + 2) * (len(self._frequency) + 1)):
            is_small = len(self._small) >= self._max_small or not self._main
            queue = self._small if is_small else self._main
            if not queue:
                return None
            key = next(iter(queue))
            if not may_evict(key):
                queue.move_to_end(key)
            elif self._frequency[key] == 0:
                return key
            elif is_small:
                del self._small[key]
                self._main[key] = None
                self._frequency[key] = 0
            else:
                self._frequency[key] -= 1
                queue.move_to_end(key)
        return first_that_may(self._frequency, may_evict)

    def remove(self, key: Key) -> None:
        """See CachePolicy."""
        del self._frequency[key]
        if key in self._small:
            del self._small[key]
            self._ghosts[key] = None
            while len(self._ghosts) > self._max_ghosts:
                self._ghosts.popitem(last=False)
        else:
            del self._main[key]


class WTinyLfu:
    """An LRU window for newcomers before a segmented LRU; who was used more often stays.

    Uses are counted for every expert ever seen (there are only so many: no sketch is needed) and
    halved now and then.

    Source: Einziger, Friedman, Manes, TinyLFU, ACM Transactions on Storage 2017.
    """

    WINDOW_SHARE = 1  # percent of the places; the protected segment has 80 % of the others
    PROTECTED_SHARE = 80
    SAMPLES_PER_PLACE = 10  # uses a place until the counts are halved: the paper's

    def __init__(self, num_experts: int) -> None:
        self._window: OrderedDict[Key, None] = OrderedDict()
        self._probation: OrderedDict[Key, None] = OrderedDict()
        self._protected: OrderedDict[Key, None] = OrderedDict()
        self._counts: dict[Key, int] = {}
        self._num_counted = 0
        self.resize(num_experts)

    def resize(self, num_experts: int) -> None:
        """See CachePolicy."""
        self._max_window = max(1, num_experts * self.WINDOW_SHARE // 100)
        self._max_protected = (num_experts - self._max_window) * self.PROTECTED_SHARE // 100
        self._max_counted = max(1, num_experts * self.SAMPLES_PER_PLACE)

    def touch(self, key: Key) -> None:
        """See CachePolicy."""
        self._count(key)
        if key in self._window:
            self._window.move_to_end(key)
        elif key in self._protected:
            self._protected.move_to_end(key)
        else:
            del self._probation[key]
            self._protected[key] = None
            if len(self._protected) > self._max_protected:
                demoted, _ = self._protected.popitem(last=False)
                self._probation[demoted] = None

    def insert(self, key: Key, is_prefetch: bool) -> None:
        """See CachePolicy."""
        if not is_prefetch:
            self._count(key)
        self._window[key] = None
        while len(self._window) > self._max_window:
            moved, _ = self._window.popitem(last=False)
            self._probation[moved] = None

    def victim(self, newcomer: Key, may_evict: Callable[[Key], bool]) -> Key | None:
        """See CachePolicy."""
        # The youngest of probation came from the window last: it duels with the oldest.
        oldest = first_that_may(self._probation, may_evict)
        youngest = first_that_may(reversed(self._probation), may_evict)
        if oldest is not None and youngest is not None:
            counts = self._counts
            return youngest if counts.get(youngest, 0) <= counts.get(oldest, 0) else oldest
        return first_that_may((*self._window, *self._protected), may_evict)

    def remove(self, key: Key) -> None:
        """See CachePolicy."""
        for segment in (self._window, self._probation, self._protected):
            segment.pop(key, None)

    def _count(self, key: Key) -> None:
        self._counts[key] = self._counts.get(key, 0) + 1
        self._num_counted += 1
        if self._num_counted >= self._max_counted:
            self._num_counted //= 2
            self._counts = {k: count // 2 for k, count in self._counts.items() if count > 1}
