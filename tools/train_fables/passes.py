"""Texts read through shoal itself: logits and exact routing of every token, no PyTorch."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.expert_dispatch import LocalDispatch, PendingSums
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool
from coordinator.sequence import Sequence as TokenSequence
from coordinator.transformer import Transformer, exact_transformer
from shoal.artifact import Artifact
from shoal.experts.executor import ExpertExecutor
from shoal.experts.open_store import open_store
from shoal.experts.ownership import Ownership
from shoal.router import RoutingPlan
from shoal.rows import Rows

LANES = 16  # texts side by side in a pass: the same bits as one by one, and quicker
_KV_BLOCKS = LANES * 24


@dataclass(frozen=True)
class Reading:
    """One text as the model read it.

    log_probs: [T - 1] float64, of each token after the first. logits: [T, V] float32, or empty.
    routing: [T, MoE layers, top_k] int32, each row in descending order of the router's value.
    """

    index: int
    log_probs: NDArray[np.float64]
    logits: NDArray[np.float32]
    routing: NDArray[np.int32]


class _RecordingDispatch(LocalDispatch):
    """Experts in this process; keeps each layer's plan until it is taken."""

    def __init__(self, executor: ExpertExecutor) -> None:
        super().__init__(executor)
        self.plans: list[NDArray[np.int32]] = []

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        self.plans.append(plan.experts.copy())
        return super().start(layer, rows, plan)


class Reader:
    """An artifact that reads texts, each from an empty cache."""

    def __init__(self, path: Path) -> None:
        self.artifact = Artifact.open(path)
        self._pool = KvBlockPool(_KV_BLOCKS)
        self._kv = KvArrays(self.artifact.spec, self.artifact.kv_dtype, _KV_BLOCKS)

    def read(
        self, texts: Sequence[Sequence[int]], *, keep_logits: bool = False
    ) -> Iterator[Reading]:
        """Yield each text's reading, shortest first."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        store = open_store(self.artifact, Ownership(self.artifact.owned_experts))
        with closing(_RecordingDispatch(ExpertExecutor(self.artifact, store))) as dispatch:
            transformer = exact_transformer(self.artifact, dispatch)
            for at in range(0, len(order), LANES):
                lanes = order[at : at + LANES]
                yield from self._read_lanes(transformer, dispatch, texts, lanes, keep_logits)

    def _read_lanes(
        self,
        transformer: Transformer,
        dispatch: _RecordingDispatch,
        texts: Sequence[Sequence[int]],
        lanes: list[int],
        keep_logits: bool,
    ) -> Iterator[Reading]:
        sequences = {lane: TokenSequence(self._pool) for lane in lanes}
        log_probs: dict[int, list[float]] = {lane: [] for lane in lanes}
        logits: dict[int, list[NDArray[np.float32]]] = {lane: [] for lane in lanes}
        routing: dict[int, list[NDArray[np.int32]]] = {lane: [] for lane in lanes}
        for lane in lanes:
            sequences[lane].extend(list(texts[lane]))
        for position in range(max(len(texts[lane]) for lane in lanes)):
            live = [lane for lane in lanes if position < len(texts[lane])]
            rows, experts = self._step(transformer, dispatch, [sequences[lane] for lane in live])
            for row, lane in enumerate(live):
                routing[lane].append(experts[row])
                if keep_logits:
                    logits[lane].append(rows[row])
                if position + 1 < len(texts[lane]):
                    log_probs[lane].append(_log_softmax_at(rows[row], texts[lane][position + 1]))
        for lane in lanes:
            sequences[lane].truncate(0)
            yield Reading(
                lane,
                np.array(log_probs[lane]),
                np.array(logits[lane], np.float32),
                np.array(routing[lane], np.int32),
            )

    def _step(
        self, transformer: Transformer, dispatch: _RecordingDispatch, live: list[TokenSequence]
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Read one token of each; return logits [R, V] and experts [R, layers, top_k]."""
        for sequence in live:
            assert sequence.try_reserve(sequence.num_cached + 1), "too few KV blocks"
        batch = make_batch([Piece(sequence, 1, num_logits=1) for sequence in live])
        dispatch.plans.clear()
        logits = transformer.forward(batch, self._kv, Cancellation())
        for sequence in live:
            sequence.advance(1)
        return logits, np.stack(dispatch.plans, axis=1)


def _log_softmax_at(logits: NDArray[np.float32], token: int) -> float:
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(wide[token] - top - np.log(np.exp(wide - top).sum()))
