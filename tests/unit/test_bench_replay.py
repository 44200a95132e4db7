"""Recorded routing stands in for a larger model's, and goes where a router's would have gone."""

import numpy as np
import pytest

from bench.replay import ReplayDispatch, replayed_experts
from coordinator.dispatch_stats import DispatchStats
from shoal.experts.routing_trace import RoutingTrace, TraceSegment
from shoal.router import RoutingPlan
from shoal.rows import Rows


def random_trace(num_tokens: int) -> RoutingTrace:
    """Three layers, 4 of 32 experts."""
    rng = np.random.default_rng(0)
    chosen = rng.random((num_tokens, 3, 32)).argsort(axis=-1)[..., :4].astype(np.uint16)
    segment = TraceSegment("only", "random", np.sort(chosen, axis=-1))
    return RoutingTrace("0" * 64, 32, 4, (0, 1, 2), (segment,))


def test_a_small_models_choices_become_distinct_ones_of_all_experts() -> None:
    trace = random_trace(800)
    experts = replayed_experts(trace, 200, 5, 128, 8)
    assert experts.shape == (200, 5, 8)
    assert (np.diff(np.sort(experts, axis=-1), axis=-1) > 0).all()
    assert set(np.unique(experts)) == set(range(128))
    coarse = np.sort(experts[:, :3] // 4, axis=-1)[..., ::2]
    assert (coarse == trace.segments[0].experts[:200]).all()


def test_a_trace_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="4 of 32"):
        replayed_experts(random_trace(100), 10, 3, 64, 8)
    with pytest.raises(ValueError, match="400 are needed"):
        replayed_experts(random_trace(399), 200, 3, 128, 8)


class Sink:
    """Remembers the plans that reach it."""

    def __init__(self) -> None:
        self.stats = DispatchStats()
        self.plans: list[tuple[int, RoutingPlan]] = []

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> None:
        del rows
        self.plans.append((layer, plan))

    def close(self) -> None:
        self.plans.clear()


class Row:
    """As much of `Rows` as a replay looks at."""

    num_rows = 1


def test_every_token_and_layer_gets_its_recorded_experts_and_the_routers_weights() -> None:
    sink, experts = Sink(), replayed_experts(random_trace(100), 4, 3, 128, 8)
    replay = ReplayDispatch(sink, experts, [1, 4, 7])  # type: ignore[arg-type]
    weights = np.arange(8, dtype=np.float32)[None]
    for _ in range(4):
        for layer in (1, 4, 7):
            plan = RoutingPlan(np.zeros((1, 8), np.int32), weights)
            replay.start(layer, Row(), plan)  # type: ignore[arg-type]
    seen = np.array([plan.experts[0] for _, plan in sink.plans]).reshape(4, 3, 8)
    assert (seen == experts).all()
    assert all((plan.weights == weights).all() for _, plan in sink.plans)
