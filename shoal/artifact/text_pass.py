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
from shoal.artifact.reader import Artifact
from shoal.limits import KV_BLOCK_TOKENS, MAX_SHADOW_TEXT_TOKENS
from shoal.model_spec import LayerSpec, QkNorm
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
        self._positions = np.arange(num_rows, dtype=np.int32)
        factor = self._spec.rope_attention_factor
        self._cos, self._sin = ops.rope_table(
            target.vector("rope.inv_freq"), self._positions, factor
        )
        attention = self._spec.attention
        num_blocks = -(-num_rows // KV_BLOCK_TOKENS)
        shape = ops.kv_shape(num_blocks, attention.num_kv_heads, attention.head_dim)
        self._keys, self._values = np.zeros(shape[0], np.float32), np.zeros(shape[1], np.float32)
        self._block_table = np.arange(num_blocks, dtype=np.int32).reshape(1, -1)

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
        spec = self._spec
        name = f"layers.{layer}."
        normed = ops.rms_norm(
            self._hidden, self._target.vector(f"{name}attention.norm"), spec.norm_eps
        )
        self._hidden = ops.add(self._hidden, self._attention(name, spec.layers[layer], normed))
        self._rows = ops.rms_norm(
            self._hidden, self._target.vector(f"{name}ffn.norm"), spec.norm_eps
        )
        self._branch = np.zeros_like(self._hidden)
        # An error counts relative to the residual that it is added to.
        squares = (self._hidden.astype(np.float64) ** 2).mean(axis=1, keepdims=True)
        self._row_weights = 1 / np.maximum(squares, 1e-30)
        router = spec.layers[layer].router
        if router is None:
            layout, weights = self._target.dense_ffn(f"{name}ffn.dense")
            rows = ops.quantise_rows(layout.scheme, self._rows)
            self._branch += ops.expert_ffn(layout, weights, rows)
            return
        logits = np.zeros((len(self._rows), router.num_experts), np.float32)
        if self._target.has(f"{name}router"):
            gate = self._target.matrix(f"{name}router")
            logits = ops.matmul(gate, ops.quantise_rows(Scheme.F32, self._rows))
        self._plan = ops.route(router.kind, logits, router.experts_per_token, router.renormalise)

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

    def _attention(self, name: str, layer: LayerSpec, normed: F32) -> F32:
        attention = self._spec.attention
        q = self._heads(name, "q", normed, attention.num_heads)
        k = self._heads(name, "k", normed, attention.num_kv_heads)
        v = self._heads(name, "v", normed, attention.num_kv_heads)
        ops.rope(q, self._cos, self._sin)
        ops.rope(k, self._cos, self._sin)
        ops.kv_write(self._keys, self._values, k, v, self._positions)
        mixed = ops.attention(
            q, self._keys, self._values, self._block_table, np.zeros_like(self._positions),
            self._positions, attention.scale, layer.window,
        )  # fmt: skip
        return self._project(f"{name}attention.o", mixed.reshape(len(normed), -1))

    def _heads(self, name: str, letter: str, normed: F32, num_heads: int) -> F32:
        attention = self._spec.attention
        values = self._project(f"{name}attention.{letter}", normed)
        heads = (len(normed), num_heads, attention.head_dim)
        norm = f"{name}attention.{letter}_norm"
        if self._target.has(norm):
            whole = attention.qk_norm is QkNorm.PROJECTION
            shaped = values if whole else values.reshape(heads)
            values = ops.rms_norm(shaped, self._target.vector(norm), self._spec.norm_eps)
        if attention.clip_qkv is not None:
            values = ops.clamp(values, attention.clip_qkv)
        return np.ascontiguousarray(values.reshape(heads))

    def _project(self, name: str, rows: F32) -> F32:
        matrix = self._target.matrix(name)
        bias = self._target.vector(f"{name}.bias") if self._target.has(f"{name}.bias") else None
        return ops.matmul(matrix, ops.quantise_rows(matrix.scheme, rows), bias)


def _floored(squares: F64) -> F32:
    least = _LEAST_SHARE * float(np.median(squares)) + 1e-6 * float(squares.mean()) + 1e-30
    scaled = np.maximum(squares, least)
    weights: F32 = (scaled / scaled.mean()).astype(np.float32)
    return weights
