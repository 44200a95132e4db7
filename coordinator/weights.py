"""The coordinator's weights: what an artifact's dense part becomes in memory, nothing twice."""

from dataclasses import dataclass

import numpy as np

from coordinator.array_types import F32
from shoal import ops
from shoal.artifact import Artifact
from shoal.model_spec import LayerSpec, QkNorm, RouterKind
from shoal.quant import Scheme
from shoal.rows import Rows


class Dense:
    """A matrix of the model with its bias, and the scheme that its rows are quantised to."""

    __slots__ = ("bias", "matrix", "scheme")

    def __init__(self, matrix: ops.Matrix, bias: F32 | None) -> None:
        self.matrix = matrix
        self.bias = bias
        self.scheme: Scheme = matrix.format.scheme  # asked for in every layer of every pass

    def __call__(self, rows: Rows) -> F32:
        """Return rows · matrixᵀ + bias, [T, matrix.rows] float32."""
        return ops.matmul(self.matrix, rows, self.bias)


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    norm: F32  # [D]
    q: Dense
    k: Dense
    v: Dense
    o: Dense
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
    router: Dense | None  # [E, D] float32; None: no expert is chosen, or all of them always
    dense_ffn: DenseFfn | None  # None: the layer's FFN is its experts


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embed: ops.Matrix  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: F32  # [D]
    lm_head: Dense  # [V, D]; `embed` itself when the model ties them
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
        lm_head=Dense(embed, None) if tied else _load_dense(artifact, "lm_head"),
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
        router=Dense(artifact.matrix(prefix + "router"), None) if has_router else None,
        dense_ffn=dense_ffn,
    )


def _load_attention(artifact: Artifact, prefix: str) -> AttentionWeights:
    has_norms = artifact.spec.attention.qk_norm is not QkNorm.NONE
    return AttentionWeights(
        norm=artifact.vector(prefix + "norm"),
        q=_load_dense(artifact, prefix + "q"),
        k=_load_dense(artifact, prefix + "k"),
        v=_load_dense(artifact, prefix + "v"),
        o=_load_dense(artifact, prefix + "o"),
        q_norm=artifact.vector(prefix + "q_norm") if has_norms else None,
        k_norm=artifact.vector(prefix + "k_norm") if has_norms else None,
    )


def _load_dense(artifact: Artifact, name: str) -> Dense:
    bias = f"{name}.bias"
    return Dense(artifact.matrix(name), artifact.vector(bias) if artifact.has(bias) else None)
