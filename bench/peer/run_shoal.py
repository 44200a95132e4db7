"""shoal as an engine of bench/peer: forward passes of any shape, in process or over nodes.

python -m bench.peer.run_shoal MODEL.shoal --max-context N [--moe-shards MAP]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.peer.phases import FILL_ROWS, Phase, serve
from coordinator.app import CoordinatorConfig, Feedback, open_dispatch
from coordinator.batch import Batch
from coordinator.cancellation import Cancellation
from coordinator.kv_arrays import KvArrays
from coordinator.transformer import exact_transformer
from shoal import limits, ops
from shoal.artifact import Artifact


class Engine:
    """One sequence in a KV cache of our own making."""

    def __init__(self, model: Path, max_context: int, moe_shards: str | None) -> None:
        self._artifact = Artifact.open(model)
        quiet = Feedback(lambda _: None, lambda _: None, lambda *_: None)
        config = CoordinatorConfig(str(model), moe_shards)
        self._transformer = exact_transformer(
            self._artifact, open_dispatch(config, self._artifact, quiet)
        )
        self._num_blocks = -(-max_context // limits.KV_BLOCK_TOKENS)
        spec = self._artifact.spec
        self._cache = KvArrays(spec, self._artifact.kv_dtype, self._num_blocks)
        self._forward(FILL_ROWS, 0)
        filled = FILL_ROWS // limits.KV_BLOCK_TOKENS
        for block in range(filled, self._num_blocks):
            self._cache.copy_block(block % filled, block)

    def run(self, phase: Phase, mark: Callable[[], float]) -> None:
        """Do one phase. Passes overwrite what lies behind the context, with the same."""
        ops.set_threads(phase.threads)
        self._forward(phase.rows, phase.context, phase.num_logits)
        mark()
        for _ in range(phase.steps):
            self._forward(phase.rows, phase.context, phase.num_logits)
            mark()

    def _forward(self, num_rows: int, context: int, num_logits: int = 1) -> None:
        positions = np.arange(context, context + num_rows, dtype=np.int32)
        ids = np.random.default_rng(context).integers(self._artifact.spec.vocab_size, size=num_rows)
        batch = Batch(
            token_ids=ids.astype(np.int32),
            positions=positions,
            row_sequence=np.zeros(num_rows, np.int32),
            slots=positions,
            block_tables=np.arange(self._num_blocks, dtype=np.int32)[None],
            logit_rows=np.arange(num_rows - num_logits, num_rows),
        )
        self._transformer.forward(batch, self._cache, Cancellation())


def main() -> None:
    """Load, then serve phases until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--max-context", type=int, required=True)
    parser.add_argument("--moe-shards")
    chosen = parser.parse_args()
    serve(Engine(chosen.model, chosen.max_context, chosen.moe_shards).run)


if __name__ == "__main__":
    main()
