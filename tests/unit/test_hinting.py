"""A shadow's passes tell the target's nodes what they are about to be asked for."""

import numpy as np

from coordinator.dispatch_stats import DispatchStats
from coordinator.expert_dispatch import ExpertDispatch, PendingSums
from coordinator.speculation.hinting import with_hints
from shoal import ops
from shoal.quant import Scheme
from shoal.router import RoutingPlan
from shoal.rows import Rows

PLAN = RoutingPlan(np.array([[1, 3]], np.int32), np.full((1, 2), 0.5, np.float32))


class Log:
    """Takes hints, and is a dispatch that notes its calls."""

    def __init__(self) -> None:
        self.stats = DispatchStats()
        self.heard: list[tuple[str, int]] = []

    def hint(self, layer: int, plan: RoutingPlan) -> None:
        self.heard.append(("hint", layer))

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        self.heard.append(("start", layer))
        return self

    def wait(self) -> np.ndarray:
        return np.zeros((1, 1), np.int64)

    def abandon(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        self.heard.append(("close", 0))


def test_a_draft_s_layer_is_told_before_it_is_computed() -> None:
    target, own = Log(), Log()
    dispatch = with_hints(own, target)
    rows = ops.quantise_rows(Scheme.F32, np.ones((1, 4), np.float32))
    dispatch.start(5, rows, PLAN).wait()
    assert dispatch.stats is own.stats
    dispatch.close()
    assert target.heard == [("hint", 5)] and own.heard == [("start", 5), ("close", 0)]


def test_experts_in_this_process_are_told_nothing() -> None:
    class Plain:
        """A dispatch that takes no hints."""

        stats = DispatchStats()

        def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
            raise NotImplementedError

        def close(self) -> None:
            """Nothing is open."""

    own: ExpertDispatch = Log()
    assert with_hints(own, Plain()) is own
