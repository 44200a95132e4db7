"""Where a layer's rows meet their experts: in this process, on nodes, or both.

The forward pass hands over a layer's rows and plan with `start`, does its own share (a shared
expert, a dense branch), then `wait`s for the sums. Sums are integers: whoever computed which part,
and in whatever order the parts came, the bits are the same.
"""

import time
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from coordinator.dispatch_stats import DispatchStats
from shoal import ops
from shoal.experts.background import BackgroundWarmUp
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.router import RoutingPlan
from shoal.rows import Rows

SHARD_WAIT_S = 30.0  # a node restarts and is met again within that

# Rows of one message on the bulk connection. A chunk of 512 makes two: the first one's reply
# travels while the node computes the second. Measured on 64 experts of Qwen3-30B-A3B's size, 4 a
# row: 256 rows at a time cost what 512 do, 128 cost 12 % more, 64 45 % (each expert's weights are
# read again for each message).
BULK_ROWS_PER_CALL = 256


class PendingSums(Protocol):
    """Sums on their way. `wait` is called once, on the thread that called `start`."""

    def wait(self) -> NDArray[np.int64]:
        """Return [T, D] int64: per row the sum over its experts of rne(weight * y * 2^grid).

        Raises:
            NodeError: a node is gone, hung or refused. NumericError: naming the rows at fault.
            ArtifactError: an expert of this process cannot be read.
        """
        ...

    def abandon(self) -> None:
        """Take the calls back instead of waiting. On the same thread."""
        ...


class ExpertDispatch(Protocol):
    """Sends rows to their experts."""

    @property
    def stats(self) -> DispatchStats: ...
    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums: ...
    def close(self) -> None:
        """Let go of connections and experts. Nothing may be pending."""
        ...


@runtime_checkable
class AnswersAtOnce(Protocol):
    """A dispatch with shorter ways for who has nothing else to do meanwhile."""

    def sums(self, layer: int, rows: Rows, plan: RoutingPlan) -> NDArray[np.int64]:
        """Return what `start` and `wait` do; raises what they do."""
        ...

    def run_layers(self, first: int, run: ops.LayerRun) -> ops.RanLayers | None:
        """Run layers, from `first` on, with their experts, as far as that goes; None: not one.

        Raises: as `sums`.
        """
        ...


class LocalDispatch:
    """All experts in this process, without a network."""

    def __init__(self, executor: ExpertExecutor, warm_up: BackgroundWarmUp | None = None) -> None:
        """Args: warm_up: of the executor's store; it may still be under way."""
        self._executor = executor
        self._warm_up = warm_up
        self.stats = DispatchStats()

    def check(self) -> None:
        """Raise CorruptArtifact if the warm-up has met an expert that is damaged."""
        if self._warm_up is not None:
            self._warm_up.check()

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        """See ExpertDispatch. Raises: as `check`: no layer begins once damage is known."""
        self.check()
        return _LocalSums(self._executor, self.stats, layer, rows, plan)

    def sums(self, layer: int, rows: Rows, plan: RoutingPlan) -> NDArray[np.int64]:
        """See AnswersAtOnce."""
        return self.start(layer, rows, plan).wait()

    def run_layers(self, first: int, run: ops.LayerRun) -> ops.RanLayers | None:
        """See AnswersAtOnce: while all experts of these layers are in memory.

        Raises: as `start`, too.
        """
        self.check()
        experts = self._executor.resident(range(first, first + len(run.layers)))
        if not experts:
            return None
        ran = run.in_memory(experts)
        for each_s in ran.expert_seconds if ran is not None else ():
            self.stats.record(each_s, each_s, 0, 0)
        return ran

    def close(self) -> None:
        self._executor.close()
        if self._warm_up is not None:
            self._warm_up.join()


class _LocalSums:
    # Made and asked once a layer and token: it does no more than it must.
    __slots__ = ("_asked", "_executor", "_stats")

    def __init__(
        self,
        executor: ExpertExecutor,
        stats: DispatchStats,
        layer: int,
        rows: Rows,
        plan: RoutingPlan,
    ) -> None:
        self._executor, self._stats = executor, stats
        self._asked = (layer, rows, plan)

    def wait(self) -> NDArray[np.int64]:
        started_s = time.perf_counter()
        sums, load_s = self._executor.compute_plan(*self._asked), 0.0
        if sums is None:
            computed = self._executor.open(call_of_plan(*self._asked)).compute()
            sums, load_s = computed.sums, computed.load_s
        elapsed_s = time.perf_counter() - started_s
        self._stats.record(elapsed_s, elapsed_s - load_s, 0, 0, load_s)
        return sums

    def abandon(self) -> None:
        """Nothing is under way before `wait`."""


def call_of_plan(layer: int, rows: Rows, plan: RoutingPlan) -> ExpertCall:
    """Return the call of a layer whose rows all go to one owner."""
    offsets = _even_offsets(*plan.experts.shape)
    return ExpertCall(layer, rows, offsets, plan.experts.reshape(-1), plan.weights.reshape(-1))


@lru_cache(64)
def _even_offsets(num_rows: int, per_row: int) -> NDArray[np.int32]:
    """Return the row offsets of rows with equally many experts; to be read only."""
    offsets = np.arange(0, num_rows * per_row + 1, per_row, dtype=np.int32)
    offsets.setflags(write=False)
    return offsets
