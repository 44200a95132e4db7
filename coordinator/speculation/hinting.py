"""HintingDispatch: whoever drafts with a copy of the model tells the nodes what is coming.

A shadow routes a draft's rows layer by layer before the pass that verifies them: nodes that read
experts from drives hear of them a draft, and round trips, earlier than by the calls.
"""

from typing import Protocol, runtime_checkable

from coordinator.dispatch_stats import DispatchStats
from coordinator.expert_dispatch import ExpertDispatch, PendingSums
from shoal.router import RoutingPlan
from shoal.rows import Rows


@runtime_checkable
class TakesHints(Protocol):
    """A dispatch whose experts may have to be read: a `RemoteDispatch`."""

    def hint(self, layer: int, plan: RoutingPlan) -> None:
        """Hear that a pass to come will likely be routed like this. Nothing comes of it."""
        ...


class HintingDispatch:
    """A drafter's dispatch, and the target's that hears of its routing."""

    def __init__(self, inner: ExpertDispatch, target: TakesHints) -> None:
        self._inner, self._target = inner, target

    @property
    def stats(self) -> DispatchStats:
        return self._inner.stats

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        """Tell the target's nodes, and compute here."""
        self._target.hint(layer, plan)
        return self._inner.start(layer, rows, plan)

    def close(self) -> None:
        """Close the drafter's own."""
        self._inner.close()


def with_hints(inner: ExpertDispatch, target: ExpertDispatch) -> ExpertDispatch:
    """Return a drafter's dispatch, which gives hints if the target's takes them."""
    return HintingDispatch(inner, target) if isinstance(target, TakesHints) else inner
