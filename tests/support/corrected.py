"""A corrected pass over a tiny model, beside the exact one, and a dispatch that counts."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.corrected.corrected_pass import CorrectedPass
from coordinator.corrected.experts import CorrectedExperts
from coordinator.corrected.surrogate import Shadow
from coordinator.dispatch_stats import DispatchStats
from coordinator.expert_branch import DispatchedExperts
from coordinator.expert_dispatch import ExpertDispatch, LocalDispatch, PendingSums
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool
from coordinator.sequence import Sequence
from coordinator.transformer import Transformer
from coordinator.weights import load_weights
from shoal import limits
from shoal.artifact import Artifact
from shoal.errors import NodeError, NodeUnreachable
from shoal.router import RoutingPlan
from shoal.rows import Rows
from support.whole_store import whole_executor

F32 = NDArray[np.float32]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
MORE = [5, 3, 5, 8, 9]


class CountingDispatch:
    """A dispatch that writes down what is started, waited for and taken back.

    fails_in: the layer whose answer is lost, with `error`; None: no layer.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._inner = LocalDispatch(whole_executor(artifact))
        self.stats = DispatchStats()
        self.log: list[tuple[str, int]] = []
        self.fails_in: int | None = None
        self.error: NodeError = NodeUnreachable("it is gone")

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        self.log.append(("start", layer))
        return CountedSums(self, layer, self._inner.start(layer, rows, plan))

    def close(self) -> None:
        self._inner.close()


class CountedSums:
    def __init__(self, dispatch: CountingDispatch, layer: int, inner: PendingSums) -> None:
        self._dispatch, self._layer, self._inner = dispatch, layer, inner

    def wait(self) -> NDArray[np.int64]:
        self._dispatch.log.append(("wait", self._layer))
        if self._layer == self._dispatch.fails_in:
            raise self._dispatch.error
        return self._inner.wait()

    def abandon(self) -> None:
        self._dispatch.log.append(("abandon", self._layer))


class Passes:
    """One prompt, read exactly, and what follows, exactly or corrected."""

    def __init__(
        self,
        target: Path,
        shadow: Path,
        dispatch: ExpertDispatch | None = None,
        max_calls_ahead: int = limits.MAX_CALLS_AHEAD,
    ) -> None:
        """Args: dispatch: None: one that counts, in this process."""
        artifact, coarse = Artifact.open(target), Artifact.open(shadow)
        self.artifact, self.coarse = artifact, coarse
        self.counting = CountingDispatch(artifact)
        dispatch = dispatch or self.counting
        stand_in = Shadow(coarse, LocalDispatch(whole_executor(coarse)))
        weights = load_weights(artifact)
        self.experts = CorrectedExperts(artifact, dispatch, stand_in, max_calls_ahead)
        self.exact = Transformer(artifact.spec, weights, DispatchedExperts(artifact, dispatch))
        self.corrected = Transformer(artifact.spec, weights, self.experts)
        self.pool = KvBlockPool(32)
        self.kv = KvArrays(artifact.spec, artifact.kv_dtype, 32)

    def logits(self, num_sweeps: int | None, cancellation: Cancellation | None = None) -> F32:
        """Return the logits of MORE's rows, in one pass after the prompt's; None: exact ones."""
        sequence = Sequence(self.pool)
        sequence.extend(PROMPT + MORE)
        assert sequence.try_reserve(len(PROMPT + MORE))
        try:
            self.exact.forward(
                make_batch([Piece(sequence, len(PROMPT), 0)]), self.kv, Cancellation()
            )
            sequence.advance(len(PROMPT))
            self.counting.log.clear()
            batch = make_batch([Piece(sequence, len(MORE), len(MORE))])
            cancellation = cancellation or Cancellation()
            if num_sweeps is None:
                return self.exact.forward(batch, self.kv, cancellation)
            corrected = CorrectedPass(self.corrected, self.experts, num_sweeps)
            return corrected.forward(batch, self.kv, cancellation)
        finally:
            sequence.truncate(0)
