"""What the executor tells a prefetcher, and what a prefetcher asks of a store (core).

    executor:  with store.acquire(layer, experts) as got:     # the demand's reads are queued
                   prefetcher.on_call(call, experts, now_s, stream)
                   ... compute the waves ...
               prefetcher.on_done(call.layer, load_s, now_s, stream)

`on_call` comes after `acquire` has queued the call's own reads and before the first wave is waited
for or computed, so that its work hides behind those reads. It never blocks and never raises.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shoal.experts.call import ExpertCall
from shoal.experts.options import Mode as Mode
from shoal.experts.ownership import Ownership


class PrefetchStore(Protocol):
    """A store that can read ahead. Thread-safe; nothing here waits."""

    @property
    def ownership(self) -> Ownership: ...

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return those of `experts` that are neither in memory nor being read, in that order."""
        ...

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Begin reads of absent experts, best first; return how many were begun.

        Takes no room from what is pinned, in use or wanted by waiting demand; its reads yield to
        every demand read.
        """
        ...

    def cancel_prefetch(self, layer: int) -> None:
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


@dataclass(frozen=True, slots=True)
class PredictorFigures:
    """How one predictor's top k (k: as many as the call wanted) met the calls that came.

    recall is hits / wanted; precision is right / admitted: of what it would have read ahead.
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
    """Counters since the prefetcher was made; the governor's states are words."""

    mode: Mode
    predictors: dict[str, PredictorFigures] = field(default_factory=dict)
    issued_experts: int = 0
    issued_bytes: int = 0
    used_bytes: int = 0
    wasted_bytes: int = 0
    stall_saved_s: float = 0.0  # estimate: A-B-A difference of the windows it ran in
    decode_state: str = ""  # of the governor: trial, on, off; "" where there is none
    prefill_state: str = ""
    switches: int = 0  # how often a governor went on or off


class Prefetcher(Protocol):
    """Watches calls and reads ahead. Thread-safe; never raises, never blocks."""

    def on_call(
        self, call: ExpertCall, experts: Sequence[int], now_s: float, stream: int = 0
    ) -> None:
        """Learn of a call whose own reads are queued; maybe begin reads for the next layer's.

        Args:
            experts: the call's distinct experts, ascending.
            now_s: a monotonic clock's time.
            stream: whose call it is: history is kept per stream.
        """
        ...

    def on_done(self, layer: int, load_s: float, now_s: float, stream: int = 0) -> None:
        """Learn that the call was computed and spent `load_s` waiting for reads."""
        ...

    def figures(self) -> PrefetchFigures: ...

    def close(self) -> None:
        """Stop; nothing is begun after this."""
        ...
