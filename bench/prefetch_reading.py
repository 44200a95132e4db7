"""Texts read token by token through a model in this process: for bench_prefetch.py."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.expert_dispatch import ExpertDispatch, LocalDispatch, PendingSums
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool
from coordinator.sequence import Sequence as TokenSequence
from coordinator.tokenizer import Tokenizer
from coordinator.transformer import exact_transformer
from shoal.artifact import Artifact
from shoal.experts.executor import ExpertExecutor
from shoal.experts.open_store import open_store
from shoal.experts.ownership import Ownership
from shoal.router import RoutingPlan
from shoal.rows import Rows

_KV_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class SeenCall:
    """A layer's call of one row: what a node gets, and what its router had chosen."""

    layer: int
    rows: Rows
    experts: NDArray[np.int64]  # ascending


def token_ids(artifact: Artifact, texts: Path, max_tokens: int) -> list[list[int]]:
    """Return the ids of the texts in a .jsonl file, each with its `kind`s taken in turn."""
    tokenizer = Tokenizer.open(artifact.tokenizer_path, artifact.generation_config)
    by_kind: dict[str, list[str]] = {}
    for line in texts.read_text().splitlines():
        item = json.loads(line)
        by_kind.setdefault(item["kind"], []).append(item["text"])
    longest = max(len(group) for group in by_kind.values())
    in_turn = [group[i] for i in range(longest) for group in by_kind.values() if i < len(group)]
    ids: list[list[int]] = []
    for text in in_turn:
        left = max_tokens - sum(map(len, ids))
        if left <= 0:
            break
        ids.append(tokenizer.encode_templated(text)[: min(left, artifact.spec.max_context)])
    return ids


class Reader:
    """Reads ids one row a pass, as decoding does; a text begins with an empty KV cache."""

    def __init__(self, artifact: Artifact, dispatch: ExpertDispatch) -> None:
        self._transformer = exact_transformer(artifact, dispatch)
        self._pool = KvBlockPool(_KV_BLOCKS)
        self._kv = KvArrays(artifact.spec, artifact.kv_dtype, _KV_BLOCKS)
        self._hash = blake3()

    @property
    def digest(self) -> str:
        """Of all logits so far."""
        return self._hash.hexdigest()

    def read(self, texts: Sequence[Sequence[int]]) -> Iterator[None]:
        """Read on by a token at each step."""
        for ids in texts:
            sequence = TokenSequence(self._pool)
            sequence.extend(list(ids))
            for _ in ids:
                assert sequence.try_reserve(sequence.num_cached + 1), "too few KV blocks"
                batch = make_batch([Piece(sequence, 1, num_logits=1)])
                logits = self._transformer.forward(batch, self._kv, Cancellation())
                self._hash.update(logits.tobytes())
                sequence.advance(1)
                yield
            sequence.truncate(0)


class _Recorder(LocalDispatch):
    def __init__(self, executor: ExpertExecutor) -> None:
        super().__init__(executor)
        self.seen: list[SeenCall] = []

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        copy = Rows(rows.scheme, rows.dim, rows.values.copy(), rows.scales.copy())
        self.seen.append(SeenCall(layer, copy, np.sort(plan.experts[0]).astype(np.int64)))
        return super().start(layer, rows, plan)


def record_calls(artifact: Artifact, texts: Sequence[Sequence[int]]) -> list[SeenCall]:
    """Return every call that reading the texts makes, in order."""
    store = open_store(artifact, Ownership(dict(artifact.owned_experts)))
    recorder = _Recorder(ExpertExecutor(artifact, store))
    try:
        for _ in Reader(artifact, recorder).read(texts):
            pass
    finally:
        store.close()
    return recorder.seen
