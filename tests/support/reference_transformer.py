"""A decoder in float64 NumPy: what `coordinator.transformer` must come close to.

Written from the papers' formulas and ModelSpec, without `shoal.ops`, a cache, chunks or blocks, so
that it shares no mistake with the code under test. Quadratic and slow; for tiny models only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from shoal.families import family_of
from shoal.families.family import TensorSlice
from shoal.families.plan import plan_tensors
from shoal.model_spec import LayerSpec, ModelSpec, QkNorm, RouterKind, RouterSpec

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GatedFfn:
    """gate, up: [I, D]; down: [D, I]."""

    gate: F64
    up: F64
    down: F64

    def __call__(self, x: F64) -> F64:
        gate = x @ self.gate.T
        y: F64 = (gate / (1 + np.exp(-gate)) * (x @ self.up.T)) @ self.down.T
        return y


@dataclass(frozen=True, slots=True)
class ReferenceWeights:
    """tensors: by the artifact's names; ffns: by (layer, expert), expert None: the dense FFN."""

    tensors: Mapping[str, F64]
    ffns: Mapping[tuple[int, int | None], GatedFfn]


def reference_logits(spec: ModelSpec, weights: ReferenceWeights, token_ids: list[int]) -> F64:
    """Return the logits [T, V] that follow every prefix of the tokens."""
    tensors = weights.tensors
    hidden = tensors["embed"][token_ids]
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}."
        normed = _rms_norm(hidden, tensors[prefix + "attention.norm"], spec.norm_eps)
        hidden = hidden + _attention(spec, layer, tensors, prefix + "attention.", normed)
        normed = _rms_norm(hidden, tensors[prefix + "ffn.norm"], spec.norm_eps)
        hidden = hidden + _ffn(layer, weights, index, normed)
    normed = _rms_norm(hidden, tensors["norm"], spec.norm_eps)
    logits: F64 = normed @ tensors["embed" if spec.tie_embeddings else "lm_head"].T
    return logits


def _rms_norm(x: F64, weight: F64, eps: float) -> F64:
    normed: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return normed


def _softmax(x: F64) -> F64:
    exps: F64 = np.exp(x - x.max(axis=-1, keepdims=True))
    exps /= exps.sum(axis=-1, keepdims=True)
    return exps


def _project(tensors: Mapping[str, F64], name: str, x: F64) -> F64:
    bias = tensors.get(name + ".bias")
    projected: F64 = x @ tensors[name].T
    if bias is not None:
        projected += bias
    return projected


def _heads(
    spec: ModelSpec, tensors: Mapping[str, F64], prefix: str, which: str, x: F64, num_heads: int
) -> F64:
    """Project, norm, clip and split: [T, heads, head_dim]."""
    attention = spec.attention
    projected = _project(tensors, prefix + which, x)
    is_normed = which in ("q", "k")
    if is_normed and attention.qk_norm is QkNorm.PROJECTION:
        projected = _rms_norm(projected, tensors[f"{prefix}{which}_norm"], spec.norm_eps)
    heads = projected.reshape(len(x), num_heads, attention.head_dim)
    if is_normed and attention.qk_norm is QkNorm.HEAD:
        heads = _rms_norm(heads, tensors[f"{prefix}{which}_norm"], spec.norm_eps)
    limit = attention.clip_qkv
    return heads if limit is None else np.clip(heads, -limit, limit)


def _rope(spec: ModelSpec, inv_freq: F64, heads: F64) -> F64:
    half = spec.rotary_dim // 2
    angle = np.arange(len(heads))[:, None] * inv_freq[None, :]
    cos, sin = (f(angle)[:, None, :] * spec.rope_attention_factor for f in (np.cos, np.sin))
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _attention(
    spec: ModelSpec, layer: LayerSpec, tensors: Mapping[str, F64], prefix: str, x: F64
) -> F64:
    attention = spec.attention
    inv_freq = tensors["rope.inv_freq"]
    q = _rope(spec, inv_freq, _heads(spec, tensors, prefix, "q", x, attention.num_heads))
    k = _rope(spec, inv_freq, _heads(spec, tensors, prefix, "k", x, attention.num_kv_heads))
    v = _heads(spec, tensors, prefix, "v", x, attention.num_kv_heads)
    positions = np.arange(len(x))
    age = positions[:, None] - positions[None, :]
    visible = age >= 0
    if layer.window is not None:
        visible &= age < layer.window
    queries_per_kv = attention.num_heads // attention.num_kv_heads
    mixed = np.empty_like(q)
    for head in range(attention.num_heads):
        kv_head = head // queries_per_kv
        scores = q[:, head] @ k[:, kv_head].T * attention.scale
        mixed[:, head] = _softmax(np.where(visible, scores, -np.inf)) @ v[:, kv_head]
    return _project(tensors, prefix + "o", mixed.reshape(len(x), -1))


def _ffn(layer: LayerSpec, weights: ReferenceWeights, index: int, x: F64) -> F64:
    if layer.router is None:
        return weights.ffns[index, None](x)
    routing = _routing_weights(layer.router, weights.tensors, f"layers.{index}.router", x)
    total = np.zeros_like(x)
    for expert in range(layer.router.num_experts):
        total += routing[:, expert, None] * weights.ffns[index, expert](x)
    return total


def _routing_weights(router: RouterSpec, tensors: Mapping[str, F64], name: str, x: F64) -> F64:
    """Return [T, E], zero for the experts that were not chosen."""
    if router.kind is RouterKind.ALL:
        return np.ones((len(x), router.num_experts))
    probabilities = _softmax(x @ tensors[name].T)
    order = np.argsort(-probabilities, axis=-1, kind="stable")[:, : router.experts_per_token]
    chosen = np.zeros_like(probabilities)
    np.put_along_axis(chosen, order, np.take_along_axis(probabilities, order, axis=-1), axis=-1)
    return chosen / chosen.sum(axis=-1, keepdims=True) if router.renormalise else chosen


def load_checkpoint(folder: Path) -> tuple[ModelSpec, ReferenceWeights]:
    """Read a Hugging Face folder whose weights are float32; dense FFNs stay whole."""
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    spec = family.spec(config)
    raw: dict[str, NDArray[np.float32]] = {}
    for path in folder.glob("*.safetensors"):
        raw |= load_file(path)
    plan = plan_tensors(family, spec, {name: values.shape for name, values in raw.items()})

    def read(source: TensorSlice) -> F64:
        values = raw[source.tensor] if source.index is None else raw[source.tensor][source.index]
        rows = values[slice(*source.rows)]
        return (rows if source.cols is None else rows[:, slice(*source.cols)]).astype(np.float64)

    tensors = {rule.name: read(rule.source) for rule in plan.tensors}
    tensors["rope.inv_freq"] = family.inv_freq(config).astype(np.float64)
    ffns = {
        (rule.layer, rule.index): GatedFfn(read(rule.gate), read(rule.up), read(rule.down))
        for rule in plan.ffns
    }
    return spec, ReferenceWeights(tensors, ffns)
