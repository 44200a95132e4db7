"""A forward pass over a text of ours while a shadow is made: how much each weight column matters.

An error in a weight costs as much as what meets it is large. Squares of a model's own activations
on ordinary text say how large; without them a 3-bit shadow of SmolLM2 is right about 65 % of its
tokens, with them about 73 % (docs/shadow.md). The first token matters most: many models give it
activations that are a thousand times the others', and all later tokens attend to it.

The pass goes layer by layer beside the maker, which reads every expert once anyway, so nothing is
loaded twice and memory stays bounded. It is statistics, in NumPy's floats: two CPUs may make
shadows that differ in a few bytes. Each has its identity, and no verified token depends on it.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.layer_weights import load_layer
from shoal.artifact.reader import Artifact
from shoal.limits import KV_BLOCK_TOKENS, MAX_SHADOW_TEXT_TOKENS
from shoal.quant import Scheme

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

TEXT_PATH = Path(__file__).with_name("shadow_text.txt")
# Of the median: no column counts for nothing because this text happens not to use it.
_LEAST_SHARE = 0.05
# Rows that an expert is taken to have seen besides those routed to it, each with the average of its
# columns: few rows say little about one column.
_EXTRA_ROWS = 8.0


class TextPass:
    """One text on its way through the layers: `enter` a layer, show its experts, `leave` it."""

    def __init__(self, target: Artifact, token_ids: NDArray[np.int32]) -> None:
        """Args: target: with its dense part; token_ids: [T], at most MAX_SHADOW_TEXT_TOKENS."""
        self._target, self._spec = target, target.spec
        self._hidden = ops.embed(target.matrix("embed"), token_ids)
        num_rows = len(token_ids)
        positions = np.arange(num_rows, dtype=np.int32)
        factor = self._spec.rope_attention_factor
        rope = ops.rope_table(target.vector("rope.inv_freq"), positions, factor)
        attention = self._spec.attention
        num_blocks = -(-num_rows // KV_BLOCK_TOKENS)
        shape = ops.kv_shape(num_blocks, attention.num_kv_heads, attention.head_dim)
        self._cache = np.zeros(shape[0], np.float32), np.zeros(shape[1], np.float32)
        block_table = np.arange(num_blocks, dtype=np.int32).reshape(1, -1)
        first = np.zeros_like(positions)
        self._places = ops.Places(rope, positions, first, positions, block_table)

    @staticmethod
    def of(target: Artifact) -> "TextPass | None":
        """Return the pass of our text; None for a model that has no tokenizer or no dense part."""
        file = target.text_file("tokenizer.json")
        if not target.manifest.has_dense or file is None or not file.present:
            return None
        from tokenizers import Tokenizer  # 40 ms that only a maker of shadows pays

        encoded = Tokenizer.from_file(str(target.tokenizer_path)).encode(TEXT_PATH.read_text())
        most = min(MAX_SHADOW_TEXT_TOKENS, target.spec.max_context)
        return TextPass(target, np.array(encoded.ids[:most], np.int32))

    @property
    def hidden(self) -> F32:
        """The residual [T, D] after the layers that were left."""
        return self._hidden

    def enter(self, layer: int) -> None:
        """Run the layer's attention; the rows that its experts see are ready."""
        weights = load_layer(self._target, layer)
        router = self._spec.layers[layer].router
        if router is None:
            assert weights.dense_ffn is not None, f"layer {layer} has no FFN"
            dense = ops.DenseLayer(weights.norms, weights.attention, *weights.dense_ffn)
            self._hidden, self._branch = dense.run(
                self._hidden, None, self._places, self._cache, None
            )
            return
        routed = ops.RoutedLayer(
            weights.norms, weights.attention, router, weights.router, Scheme.F32
        )
        self._hidden, self._rows, _, self._plan = routed.run(
            self._hidden, None, self._places, self._cache, None
        )
        self._branch = np.zeros_like(self._hidden)
        # An error counts relative to the residual that it is added to.
        squares = (self._hidden.astype(np.float64) ** 2).mean(axis=1, keepdims=True)
        self._row_weights = 1 / np.maximum(squares, 1e-30)

    def input_weights(self) -> F32:
        """Return how much each column of gate and up matters, [D]."""
        return _floored((self._row_weights * self._rows.astype(np.float64) ** 2).mean(axis=0))

    def through_expert(self, index: int, gate: F32, up: F32, down: F32) -> F32:
        """Run the rows that chose an expert through it; return how much its hidden columns matter.

        Args: gate, up: [I, D]; down: [D, I].
        """
        rows, choices = np.nonzero(self._plan.experts == index)
        x = self._rows[rows]
        pre = x @ gate.T
        with np.errstate(over="ignore"):
            hidden = (x @ up.T) * (pre / (1 + np.exp(-pre)))
        self._branch[rows] += (hidden @ down.T) * self._plan.weights[rows, choices, None]
        squares = self._row_weights[rows] * hidden.astype(np.float64) ** 2
        total = (
            squares.sum(axis=0) + _EXTRA_ROWS * squares.mean() if len(rows) else np.ones(len(gate))
        )
        return _floored(total)

    def leave(self) -> None:
        """Add what the experts of the layer made."""
        self._hidden = ops.add(self._hidden, self._branch)


def _floored(squares: F64) -> F32:
    least = _LEAST_SHARE * float(np.median(squares)) + 1e-6 * float(squares.mean()) + 1e-30
    scaled = np.maximum(squares, least)
    weights: F32 = (scaled / scaled.mean()).astype(np.float32)
    return weights
