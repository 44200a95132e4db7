"""The forward pass in the test's own process, with every expert in it, without an engine."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.expert_dispatch import ExpertDispatch, LocalDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool
from coordinator.sequence import Sequence
from coordinator.transformer import exact_transformer
from shoal.artifact import Artifact
from shoal.experts.executor import ExpertExecutor
from support.whole_store import whole_executor

F32 = NDArray[np.float32]


class ForwardPasses:
    """Sequences side by side in passes that the test composes; logits of every row."""

    def __init__(
        self,
        path: Path,
        num_blocks: int = 32,
        *,
        executor: ExpertExecutor | None = None,
        dispatch: ExpertDispatch | None = None,
    ) -> None:
        """Open the artifact. dispatch, executor: None: one with every expert in memory."""
        artifact = Artifact.open(path)
        if dispatch is None:
            dispatch = LocalDispatch(executor or whole_executor(artifact))
        self.transformer = exact_transformer(artifact, dispatch)
        self.pool = KvBlockPool(num_blocks)
        self.kv = KvArrays(artifact.spec, artifact.kv_dtype, num_blocks)

    def sequence(self, token_ids: list[int]) -> Sequence:
        sequence = Sequence(self.pool)
        sequence.extend(token_ids)
        return sequence

    def run(self, *pieces: tuple[Sequence, int]) -> F32:
        """Run the next rows of each sequence in one pass; logits of each one's last row."""
        for sequence, num_rows in pieces:
            assert sequence.try_reserve(sequence.num_cached + num_rows)
        batch = make_batch([Piece(sequence, rows, num_logits=1) for sequence, rows in pieces])
        logits = self.transformer.forward(batch, self.kv, Cancellation())
        for sequence, num_rows in pieces:
            sequence.advance(num_rows)
        return logits

    def logits_of_every_prefix(self, token_ids: list[int]) -> F32:
        """Return [T, V], one row a pass."""
        sequence = self.sequence(token_ids)
        return np.concatenate([self.run((sequence, 1)) for _ in token_ids])
