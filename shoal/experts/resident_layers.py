"""ResidentLayers: layers that are in memory whole, computed on without asking the cache each time.

While nothing has to make room for anything, a layer whose owned experts are all in memory gets a
table that holds every one of them. A call on it asks no lock and lets go of nothing. Before memory
is used for something else (another budget, other experts, a demand without room) all tables are
withdrawn: no call begins on them any more, and what they held is let go of once the last call that
is under way has ended.
"""

import threading
from collections.abc import Callable

from shoal import ops
from shoal.experts.cache.entries import Entry
from shoal.experts.cache.expert_cache import ExpertCache


class ResidentLayers:
    """Methods are called under the store's lock; `tables` may be read without it.

    Args:
        lock: the store's. cache: guarded by it.
        after_release: called under the lock when calls that were under way have let go of memory.
    """

    def __init__(
        self, lock: threading.Lock, cache: ExpertCache, after_release: Callable[[], None]
    ) -> None:
        self.tables: dict[int, ops.ExpertTable] = {}
        self._lock = lock
        self._cache = cache
        self._after_release = after_release
        self._held: dict[int, list[Entry]] = {}
        self._leaving: list[ops.ExpertTable] = []
        self._former_hits = 0

    @property
    def num_hits(self) -> int:
        """Experts that calls on tables visited, each once a call."""
        tables = [*self.tables.values(), *self._leaving]
        return self._former_hits + sum(table.num_hits for table in tables)

    def offer(self, layer: int, layout_of: Callable[[int], ops.ExpertLayout]) -> None:
        """Make the table of a layer if it may have one and has none."""
        if layer in self.tables:
            return
        entries = self._cache.hold_layer(layer)
        if entries is not None:
            weights = {entry.key[1]: entry.payload for entry in entries}
            self._held[layer] = entries
            self.tables[layer] = ops.expert_table(layout_of(layer), weights)

    def withdraw(self) -> None:
        """Take all tables back."""
        tables = dict(self.tables)
        self.tables.clear()
        for layer, table in tables.items():
            entries = self._held.pop(layer)
            self._leaving.append(table)
            # The lock is held until both are done, so the last call cannot be told in between.
            if table.withdraw(lambda table=table, entries=entries: self._end(table, entries)):
                self._let_go(table, entries)

    def _end(self, table: ops.ExpertTable, entries: list[Entry]) -> None:
        # The last call's thread, without the lock.
        with self._lock:
            self._let_go(table, entries)
            self._after_release()

    def _let_go(self, table: ops.ExpertTable, entries: list[Entry]) -> None:
        self._leaving.remove(table)
        self._former_hits += table.num_hits
        self._cache.release(entries)
