"""What `StreamingStore.acquire` returns: experts held in memory, wave by wave."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from shoal.experts.cache.entries import Demand, Entry
from shoal.experts.store import Wave

Held = Sequence[tuple[int, Entry]]  # (position in what was asked for, its expert)


class Holder(Protocol):
    """What an acquisition asks of its store. Thread-safe."""

    def release(self, entries: list[Entry]) -> None: ...
    def withdraw(self, demand: Demand) -> None: ...
    def abandon(self, waiting: "WavedAcquisition", error: BaseException) -> None: ...
    def await_more(self, waiting: "WavedAcquisition") -> tuple[Held, float]:
        """Wait for more of a demand; return it, and the seconds that it took."""
        ...


class WholeAcquisition:
    """Everything was in memory: one wave. Most calls come here: it does no more than it must."""

    __slots__ = ("_entries", "_store")

    is_whole = True
    load_s = 0.0

    def __init__(self, store: Holder, entries: list[Entry]) -> None:
        self._store = store
        self._entries = entries

    def abandon(self, error: BaseException) -> None:
        """There is no wait to end."""

    def __iter__(self) -> Iterator[Wave]:
        entries = self._entries
        yield Wave(range(len(entries)), [entry.payload for entry in entries])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entries, self._entries = self._entries, []
        self._store.release(entries)


class WavedAcquisition:
    """Some experts are held, the others are being read.

    abandoned: the error that ends the wait; written under the store's lock.
    """

    __slots__ = ("_held", "_missing", "_store", "abandoned", "demand", "load_s")

    is_whole = False

    def __init__(self, store: Holder, held: Held, demand: Demand) -> None:
        self._store = store
        self._held = held
        self._missing = len(demand.waiting)
        self.demand = demand
        self.abandoned: BaseException | None = None
        self.load_s = 0.0

    def abandon(self, error: BaseException) -> None:
        """See `Acquisition.abandon`."""
        self._store.abandon(self, error)

    def __iter__(self) -> Iterator[Wave]:
        if self._held:
            yield self._wave()
        while self._missing:
            self._let_go()
            self._held, waited_s = self._store.await_more(self)
            self._missing -= len(self._held)
            self.load_s += waited_s
            yield self._wave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._let_go()
        self._store.withdraw(self.demand)

    def _wave(self) -> Wave:
        held = sorted(self._held, key=lambda pair: pair[0])
        return Wave([position for position, _ in held], [entry.payload for _, entry in held])

    def _let_go(self) -> None:
        held, self._held = self._held, ()
        if held:
            self._store.release([entry for _, entry in held])
