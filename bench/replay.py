"""Recorded routing in place of a router's: random weights route at random, real models do not.

`replayed_experts` turns a trace of a small real model into choices for a larger one, and
`ReplayDispatch` puts them into every plan on its way to the experts; weights stay the router's.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from coordinator.dispatch_stats import DispatchStats
from coordinator.expert_dispatch import ExpertDispatch, PendingSums
from shoal.experts.routing_trace import RoutingTrace
from shoal.router import RoutingPlan
from shoal.rows import Rows

I32 = NDArray[np.int32]
PAIRS = np.array([(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)])


def replayed_experts(
    trace: RoutingTrace, num_tokens: int, layers: int, num_experts: int, top_k: int
) -> I32:
    """Return [num_tokens, layers, top_k] distinct experts of a model larger than the trace's.

    Each recorded expert e stands for four, 4 e .. 4 e + 3, and each recorded choice for two of
    them; which two, another text's routing at the same place says. So both halves of a choice
    come and go as real ones do, every expert is used, and none is used more than in the trace.
    Layers beyond the trace's begin again at its first, with later texts.

    Raises: ValueError: the shapes do not fit, or the trace is too short.
    """
    if trace.num_experts * 4 != num_experts or trace.top_k * 2 != top_k:
        raise ValueError(
            f"a trace of {trace.top_k} of {trace.num_experts} experts does not stand for "
            f"{top_k} of {num_experts}"
        )
    recorded = len(trace.moe_layers)
    tokens = np.concatenate([segment.experts for segment in trace.segments]).astype(np.int32)
    rounds = -(-layers // recorded)
    if len(tokens) < 2 * rounds * num_tokens:
        raise ValueError(f"a trace of {len(tokens)} tokens: {2 * rounds * num_tokens} are needed")
    parts = []
    for turn in range(rounds):
        first, second = (tokens[(2 * turn + i) * num_tokens :][:num_tokens] for i in range(2))
        halves = PAIRS[second % len(PAIRS)]  # [T, L, k, 2]
        parts.append((first[..., None] * 4 + halves).reshape(num_tokens, recorded, top_k))
    return np.concatenate(parts, axis=1)[:, :layers].astype(np.int32)


class ReplayDispatch:
    """A dispatch that replaces the experts of every plan; token 0 is the prompt's first."""

    def __init__(self, inner: ExpertDispatch, experts: I32, layers: list[int]) -> None:
        """experts: [tokens, MoE layers, top_k]; layers: indices of the MoE layers, ascending."""
        self._inner, self._experts = inner, experts
        self._column = {layer: column for column, layer in enumerate(layers)}
        self._last, self._token = layers[-1], 0

    @property
    def stats(self) -> DispatchStats:
        return self._inner.stats

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        chosen = self._experts[self._token : self._token + rows.num_rows, self._column[layer]]
        assert chosen.shape == plan.experts.shape, "the trace is too short"
        if layer == self._last:
            self._token += rows.num_rows
        return self._inner.start(layer, rows, replace(plan, experts=np.ascontiguousarray(chosen)))

    def close(self) -> None:
        self._inner.close()
