"""The coordinator's weights: what an artifact's dense part becomes in memory, nothing twice."""

from dataclasses import dataclass

import numpy as np

from coordinator.array_types import F32
from coordinator.row_forms import RowForms
from shoal import ops
from shoal.artifact import Artifact
from shoal.model_spec import LayerSpec, QkNorm, RouterKind
from shoal.quant import LANES, Scheme
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


class Qkv:
    """The q, k and v projections: one matrix where their formats allow, so one product a layer.

    Stacking moves rows only: every output element is the same sequence of operations.
    """

    __slots__ = ("_ends", "_parts")

    def __init__(self, q: Dense, k: Dense, v: Dense) -> None:
        stacked = try_stack([q, k, v])
        self._parts = [q, k, v] if stacked is None else [stacked]
        num_q, num_k = q.matrix.rows, k.matrix.rows
        self._ends = (num_q, num_q + num_k)

    def __call__(self, forms: RowForms) -> tuple[F32, F32, F32]:
        """Return q, k and v of the rows, [T, rows of each] float32, C-contiguous."""
        if len(self._parts) == 1:
            [stacked] = self._parts
            whole = stacked(forms.get(stacked.scheme))
            k_begin, v_begin = self._ends
            q, k, v = whole[:, :k_begin], whole[:, k_begin:v_begin], whole[:, v_begin:]
            if len(whole) == 1:
                return q, k, v
            return np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v)
        q, k, v = [part(forms.get(part.scheme)) for part in self._parts]
        return q, k, v


def try_stack(parts: list[Dense]) -> Dense | None:
    """Return one matrix of all rows; None where formats, biases or row groups do not line up."""
    formats = {part.matrix.format for part in parts}
    has_bias = {part.bias is not None for part in parts}
    whole_groups = all(part.matrix.rows % LANES == 0 for part in parts[:-1])
    if len(formats) > 1 or len(has_bias) > 1 or not whole_groups:
        return None
    data = ops.aligned_empty(sum(part.matrix.data.size for part in parts), huge=True)
    np.concatenate([part.matrix.data for part in parts], out=data)
    num_rows = sum(part.matrix.rows for part in parts)
    matrix = ops.Matrix(parts[0].matrix.format, num_rows, parts[0].matrix.cols, data)
    biases = [part.bias for part in parts if part.bias is not None]
    return Dense(matrix, np.concatenate(biases) if biases else None)


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    norm: F32  # [D]
    qkv: Qkv
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
        qkv=Qkv(*(_load_dense(artifact, prefix + name) for name in ("q", "k", "v"))),
        o=_load_dense(artifact, prefix + "o"),
        q_norm=artifact.vector(prefix + "q_norm") if has_norms else None,
        k_norm=artifact.vector(prefix + "k_norm") if has_norms else None,
    )


def _load_dense(artifact: Artifact, name: str) -> Dense:
    bias = f"{name}.bias"
    return Dense(artifact.matrix(name), artifact.vector(bias) if artifact.has(bias) else None)
