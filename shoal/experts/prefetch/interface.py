"""What the executor tells a prefetcher, and what a prefetcher asks of a store (core).

    with store.acquire(layer, experts) as got:           # the call's own reads are queued
        prefetcher.on_call(call, experts, now_s, stream)     # guesses, reads ahead after these
        for wave in got:
            if this is the last one:
                prefetcher.on_loaded(layer, now_s, stream)   # the disk is idle from here on
            compute the wave
    prefetcher.on_done(layer, got.load_s, now_s, stream)

None of the three blocks or raises.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.experts.call import ExpertCall
from shoal.experts.options import Mode as Mode


class StoreBudget(Protocol):
    """The part of `StoreFigures` that a prefetcher looks at."""

    @property
    def budget_bytes(self) -> int: ...


class PrefetchStore(Protocol):
    """A store that can read ahead: a `StreamingStore`. Thread-safe; nothing here waits."""

    @property
    def num_bytes(self) -> int:
        """Bytes of everything owned."""
        ...

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return those of `experts` that are neither in memory nor being read, in that order."""
        ...

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Queue reads of absent experts, best first, behind all demand; return how many."""
        ...

    def cancel_prefetch(self, layer: int | None = None) -> None:
        """Give up that layer's prefetch reads that no call waits for and that can still stop."""
        ...

    def num_demand_reads(self) -> int:
        """How many demand reads are queued or in flight."""
        ...

    def prefetch_bytes(self) -> tuple[int, int, int]:
        """Return the bytes so far (issued, used by a call, dropped without use)."""
        ...

    def read_bandwidth(self) -> float:
        """Bytes a second that reads have lately come at; 0.0 before the first one."""
        ...

    def figures(self) -> StoreBudget: ...


@dataclass(frozen=True, slots=True)
class PredictorFigures:
    """How one predictor's guesses met the calls that came.

    Its top k are as many as the row wanted: recall = hits / wanted. What it would have had read
    ahead (all that the admission rule takes): precision = right / admitted.
    """

    wanted: int = 0
    hits: int = 0
    admitted: int = 0
    right: int = 0

    @property
    def recall(self) -> float:
        return self.hits / self.wanted if self.wanted else 0.0

    @property
    def precision(self) -> float:
        return self.right / self.admitted if self.admitted else 0.0


@dataclass(frozen=True, slots=True)
class PrefetchFigures:
    """Counters since the prefetcher was made.

    predictors: by name; "fused" is what is acted on.
    stall_saved_s: an estimate: what windows with prefetching cost less than those around them
        without, per call, times the calls with prefetching. May be negative.
    decode_state, prefill_state, hint_state: of the governors: learn, trial, on, off; "forced" where
        there is none.
    hinted_experts: of the issued ones, those that a hint had named.
    switches: how often a governor's verdict changed.
    """

    mode: Mode
    predictors: Mapping[str, PredictorFigures]
    issued_experts: int
    issued_bytes: int
    used_bytes: int
    wasted_bytes: int
    stall_saved_s: float
    decode_state: str
    prefill_state: str
    hint_state: str
    hinted_experts: int
    switches: int


class Prefetcher(Protocol):
    """Watches calls and reads ahead. Thread-safe."""

    def on_call(
        self, call: ExpertCall, experts: Sequence[int], now_s: float, stream: int = 0
    ) -> None:
        """Learn of a call whose own reads are queued; guess what comes next, maybe queue its reads.

        Args:
            experts: the call's distinct experts, ascending.
            now_s: a monotonic clock's time, as in the other two.
            stream: whose call it is: history is kept per stream.
        """
        ...

    def on_loaded(self, layer: int, now_s: float, stream: int = 0) -> None:
        """Learn that the call waits for no read any more."""
        ...

    def on_done(self, layer: int, load_s: float, now_s: float, stream: int = 0) -> None:
        """Learn that the call was computed and spent `load_s` waiting for reads."""
        ...

    def on_hint(self, layer: int, experts: Sequence[int], now_s: float, stream: int = 0) -> None:
        """Learn of owned experts that the stream's next call of a layer likely needs, best first.

        More than one hint may come before that call.
        """
        ...

    def figures(self) -> PrefetchFigures: ...

    def close(self) -> None:
        """Stop: nothing is begun after this."""
        ...
