"""Eviction policies that count uses: LFU with dynamic aging, and with forgetting (core)."""

import heapq
from collections.abc import Callable

from shoal.experts.cache.policy import Key


class _Lowest:
    """Residents by value, the lowest first; values only ever rise while one is resident.

    A heap whose entries may be out of date: an entry below its resident's value is put back with
    the right one when it comes up.
    """

    def __init__(self) -> None:
        self.values: dict[Key, float] = {}  # of residents
        self._heap: list[tuple[float, int, Key]] = []
        self._num_pushed = 0  # equal values leave in the order of arrival

    def add(self, key: Key, value: float) -> None:
        self.values[key] = value
        self._push(key, value)

    def lowest(self, may_evict: Callable[[Key], bool]) -> Key | None:
        aside: list[tuple[float, int, Key]] = []
        found = None
        while self._heap and found is None:
            value, order, key = self._heap[0]
            current = self.values.get(key)
            if current is None or current < value:  # it left, and maybe came back lower
                heapq.heappop(self._heap)
            elif current > value:
                heapq.heapreplace(self._heap, (current, order, key))
            elif may_evict(key):
                found = key
            else:
                aside.append(heapq.heappop(self._heap))
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return found

    def remove(self, key: Key) -> float:
        value = self.values.pop(key)
        if len(self._heap) > 64 + 4 * len(self.values):  # mostly of experts that left
            self.rebuild()
        return value

    def rebuild(self) -> None:
        """After values were changed from outside."""
        self._heap = []
        for key, value in self.values.items():
            self._push(key, value)

    def _push(self, key: Key, value: float) -> None:
        self._num_pushed += 1
        heapq.heappush(self._heap, (value, self._num_pushed, key))


class LfuDa:
    """Evicts the lowest (uses + age), where age is what the last victim had.

    Source: Arlitt, Cherkasova et al., Evaluating content management techniques for web proxy
    caches, 1999 (LFU with dynamic aging).
    """

    def __init__(self, num_experts: int) -> None:
        self._residents = _Lowest()
        self._age = 0.0

    def resize(self, num_experts: int) -> None:
        """See CachePolicy."""

    def touch(self, key: Key) -> None:
        """See CachePolicy."""
        self._residents.values[key] += 1

    def insert(self, key: Key, is_prefetch: bool) -> None:
        """See CachePolicy."""
        self._residents.add(key, self._age + (0.0 if is_prefetch else 1.0))

    def victim(self, newcomer: Key, may_evict: Callable[[Key], bool]) -> Key | None:
        """See CachePolicy."""
        return self._residents.lowest(may_evict)

    def remove(self, key: Key) -> None:
        """See CachePolicy."""
        self._age = max(self._age, self._residents.remove(key))


class FadingLfu:
    """Evicts what was used least, where a use counts half after so many further uses of any expert.

    Uses are remembered for every expert ever seen, in memory or not: a model has few enough. With
    a short half-life this is LRU, with a long one LFU.

    Source: Lee et al., LRFU, IEEE Transactions on Computers 2001; the half-life by
    bench/bench_cache.py (docs/expert-cache.md).
    """

    HALF_LIFE = 16.0  # times the number of experts that fit
    _LARGE = 1e200  # of a use: then all weights are scaled down

    def __init__(self, num_experts: int, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._residents = _Lowest()
        self._gone: dict[Key, float] = {}
        self._use = 1.0  # what one use weighs now; it grows instead of all others fading
        self.resize(num_experts)

    def resize(self, num_experts: int) -> None:
        """See CachePolicy."""
        self._growth = 2.0 ** (1.0 / max(1.0, self._half_life * num_experts))

    def touch(self, key: Key) -> None:
        """See CachePolicy."""
        self._use *= self._growth
        self._residents.values[key] += self._use
        if self._use > self._LARGE:
            self._scale_down()

    def insert(self, key: Key, is_prefetch: bool) -> None:
        """See CachePolicy."""
        self._residents.add(key, self._gone.pop(key, 0.0))
        if not is_prefetch:
            self.touch(key)

    def victim(self, newcomer: Key, may_evict: Callable[[Key], bool]) -> Key | None:
        """See CachePolicy."""
        return self._residents.lowest(may_evict)

    def remove(self, key: Key) -> None:
        """See CachePolicy."""
        self._gone[key] = self._residents.remove(key)

    def _scale_down(self) -> None:
        scale = 1.0 / self._use
        self._use = 1.0
        self._gone = {key: weight * scale for key, weight in self._gone.items()}
        values = self._residents.values
        values.update({key: weight * scale for key, weight in values.items()})
        self._residents.rebuild()
