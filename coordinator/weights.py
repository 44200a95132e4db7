"""The coordinator's weights: what an artifact's dense part becomes in memory, nothing twice."""

from dataclasses import dataclass

import numpy as np

from coordinator.array_types import F32
from shoal import ops
from shoal.artifact import Artifact
from shoal.model_spec import LayerSpec, QkNorm, RouterKind
from shoal.quant import LANES


def stacked(*parts: ops.Linear) -> tuple[ops.Linear, ...]:
    """Return one matrix of all rows, or the parts: where formats, biases or row groups differ.

    Stacking moves rows only: every output element is the same sequence of operations. One product
    of one row meets its threads once.
    """
    formats = {part.matrix.format for part in parts}
    has_bias = {part.bias is not None for part in parts}
    whole_groups = all(part.matrix.rows % LANES == 0 for part in parts)
    if len(formats) > 1 or len(has_bias) > 1 or not whole_groups:
        return parts
    data = ops.aligned_empty(sum(part.matrix.data.size for part in parts), huge=True)
    np.concatenate([part.matrix.data for part in parts], out=data)
    num_rows = sum(part.matrix.rows for part in parts)
    matrix = ops.Matrix(parts[0].matrix.format, num_rows, parts[0].matrix.cols, data)
    biases = [part.bias for part in parts if part.bias is not None]
    return (ops.Linear(matrix, np.concatenate(biases) if biases else None),)


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    norm: F32  # [D]
    qkv: tuple[ops.Linear, ...]  # q, k and v, or one on top of the other
    o: ops.Linear
    q_norm: F32 | None  # [head_dim], or [H * head_dim] for QkNorm.PROJECTION
    k_norm: F32 | None


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """A whole FFN in the layout of one expert."""

    layout: ops.ExpertLayout
    weights: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention: AttentionWeights
    ffn_norm: F32  # [D]
    router: ops.Linear | None  # [E, D] float32; None: no expert is chosen, or all of them always
    dense_ffn: DenseFfn | None  # None: the layer's FFN is its experts


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embed: ops.Matrix  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: F32  # [D]
    lm_head: ops.Linear  # [V, D]; `embed` itself when the model ties them
    inv_freq: F32  # [rotary_dim / 2]


def load_weights(artifact: Artifact) -> ModelWeights:
    """Read every dense tensor of the artifact.

    Raises: CorruptArtifact naming the tensor whose bytes are not what the manifest says.
    """
    embed = artifact.matrix("embed")
    tied = artifact.spec.tie_embeddings
    layers = tuple(
        _load_layer(artifact, f"layers.{index}.", layer)
        for index, layer in enumerate(artifact.spec.layers)
    )
    return ModelWeights(
        embed=embed,
        layers=layers,
        norm=artifact.vector("norm"),
        lm_head=ops.Linear(embed) if tied else _load_linear(artifact, "lm_head"),
        inv_freq=artifact.vector("rope.inv_freq"),
    )


def _load_layer(artifact: Artifact, prefix: str, layer: LayerSpec) -> LayerWeights:
    has_router = layer.router is not None and layer.router.kind is not RouterKind.ALL
    dense_ffn = None
    if layer.router is None:
        dense_ffn = DenseFfn(*artifact.dense_ffn(prefix + "ffn.dense"))
    return LayerWeights(
        attention=_load_attention(artifact, prefix + "attention."),
        ffn_norm=artifact.vector(prefix + "ffn.norm"),
        router=ops.Linear(artifact.matrix(prefix + "router")) if has_router else None,
        dense_ffn=dense_ffn,
    )


def _load_attention(artifact: Artifact, prefix: str) -> AttentionWeights:
    has_norms = artifact.spec.attention.qk_norm is not QkNorm.NONE
    return AttentionWeights(
        norm=artifact.vector(prefix + "norm"),
        qkv=stacked(*(_load_linear(artifact, prefix + name) for name in ("q", "k", "v"))),
        o=_load_linear(artifact, prefix + "o"),
        q_norm=artifact.vector(prefix + "q_norm") if has_norms else None,
        k_norm=artifact.vector(prefix + "k_norm") if has_norms else None,
    )


def _load_linear(artifact: Artifact, name: str) -> ops.Linear:
    bias = f"{name}.bias"
    vector = artifact.vector(bias) if artifact.has(bias) else None
    return ops.Linear(artifact.matrix(name), vector)
