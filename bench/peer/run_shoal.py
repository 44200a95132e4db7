"""shoal as an engine of bench/peer: forward passes of any shape, in process or over nodes.

python -m bench.peer.run_shoal MODEL.shoal --max-context N [--moe-shards MAP]
    [--experts-per-token K]
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.peer.phases import FILL_ROWS, Phase, serve
from bench.steady import warm_up
from coordinator.app import CoordinatorConfig, Feedback, open_dispatch
from coordinator.batch import Batch
from coordinator.cancellation import Cancellation
from coordinator.expert_branch import DispatchedExperts
from coordinator.kv_arrays import KvArrays
from coordinator.transformer import Transformer
from coordinator.weights import load_weights
from shoal import limits, ops
from shoal.artifact import Artifact
from shoal.model_spec import ModelSpec


class Engine:
    """One sequence in a KV cache of our own making."""

    def __init__(
        self,
        model: Path,
        max_context: int,
        moe_shards: str | None = None,
        experts_per_token: int | None = None,
    ) -> None:
        artifact = Artifact.open(model)
        quiet = Feedback(lambda _: None, lambda _: None, lambda *_: nullcontext(lambda _: None))
        config = CoordinatorConfig(str(model), moe_shards, warmup=True)
        dispatch = open_dispatch(config, artifact, quiet)
        self._spec = visiting(artifact.spec, experts_per_token)
        experts = DispatchedExperts(artifact, dispatch)
        self._transformer = Transformer(self._spec, load_weights(artifact), experts)
        self._num_blocks = -(-max_context // limits.KV_BLOCK_TOKENS)
        self._made_ids: dict[tuple[int, int], NDArray[np.int32]] = {}
        self._cache = KvArrays(self._spec, artifact.kv_dtype, self._num_blocks)
        self._forward(FILL_ROWS, 0)
        filled = FILL_ROWS // limits.KV_BLOCK_TOKENS
        for block in range(filled, self._num_blocks):
            self._cache.copy_block(block % filled, block)

    def run(self, phase: Phase, mark: Callable[[], float]) -> None:
        """Do one phase. Passes overwrite what lies behind the context, with the same."""
        ops.set_threads(phase.threads)
        warm_up(lambda: self._forward(phase.rows, phase.context, phase.num_logits))
        mark()
        for _ in range(phase.steps):
            self._forward(phase.rows, phase.context, phase.num_logits)
            mark()

    def _forward(self, num_rows: int, context: int, num_logits: int = 1) -> None:
        positions = np.arange(context, context + num_rows, dtype=np.int32)
        ids = self._ids(num_rows, context)
        batch = Batch(
            token_ids=ids,
            positions=positions,
            row_sequence=np.zeros(num_rows, np.int32),
            slots=positions,
            block_tables=np.arange(self._num_blocks, dtype=np.int32)[None],
            logit_rows=np.arange(num_rows - num_logits, num_rows),
        )
        self._transformer.forward(batch, self._cache, Cancellation())

    def _ids(self, num_rows: int, context: int) -> NDArray[np.int32]:
        # Made once: a generator takes longer than a layer does between its matrices.
        ids = self._made_ids.get((num_rows, context))
        if ids is None:
            generator = np.random.default_rng(context)
            ids = generator.integers(self._spec.vocab_size, size=num_rows, dtype=np.int32)
            self._made_ids[num_rows, context] = ids
        return ids


def visiting(spec: ModelSpec, experts_per_token: int | None) -> ModelSpec:
    """Return the model with another number of experts a token; None: as it is."""
    if experts_per_token is None:
        return spec
    layers = tuple(
        replace(layer, router=replace(layer.router, experts_per_token=experts_per_token))
        if layer.router is not None
        else layer
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def main() -> None:
    """Load, then serve phases until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--max-context", type=int, required=True)
    parser.add_argument("--moe-shards")
    parser.add_argument("--experts-per-token", type=int)
    chosen = parser.parse_args()
    engine = Engine(chosen.model, chosen.max_context, chosen.moe_shards, chosen.experts_per_token)
    serve(engine.run)


if __name__ == "__main__":
    main()
