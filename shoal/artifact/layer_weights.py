"""The dense weights of one decoder layer, as `ops` runs them."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.reader import Artifact
from shoal.model_spec import QkNorm, RouterKind
from shoal.quant import LANES

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    norms: tuple[F32, F32]  # [D] each: before the attention, before the FFN
    attention: ops.GroupedQuery
    router: ops.Linear | None  # [E, D] float32; None: no expert is chosen, or all of them always
    dense_ffn: tuple[ops.ExpertLayout, U8] | None  # None: the layer's FFN is its experts


def load_layer(artifact: Artifact, index: int, memory: ops.HugeArena | None = None) -> LayerWeights:
    """Read a layer's dense tensors.

    Args: memory: where its matrices are to lie, with those of other layers; None: by themselves.
    Raises: CorruptArtifact naming the tensor whose bytes are not what the manifest says.
    """
    memory = memory or ops.HugeArena()
    prefix = f"layers.{index}."
    router = artifact.spec.layers[index].router
    has_gate = router is not None and router.kind is not RouterKind.ALL
    return LayerWeights(
        norms=(artifact.vector(f"{prefix}attention.norm"), artifact.vector(f"{prefix}ffn.norm")),
        attention=_load_attention(artifact, index, f"{prefix}attention.", memory),
        router=_kept(ops.Linear(artifact.matrix(f"{prefix}router")), memory) if has_gate else None,
        dense_ffn=artifact.dense_ffn(f"{prefix}ffn.dense") if router is None else None,
    )


def load_linear(artifact: Artifact, name: str) -> ops.Linear:
    """Read a matrix and its bias, if it has one. Raises as `load_layer`."""
    bias = f"{name}.bias"
    vector = artifact.vector(bias) if artifact.has(bias) else None
    return ops.Linear(artifact.matrix(name), vector)


def stacked(memory: ops.HugeArena, *parts: ops.Linear) -> tuple[ops.Linear, ...]:
    """Return one matrix of all rows, or the parts: where formats, biases or row groups differ.

    Args: memory: where they are copied to.

    Stacking moves rows only: every output element is the same sequence of operations. One product
    of one row meets its threads once.
    """
    formats = {part.matrix.format for part in parts}
    has_bias = {part.bias is not None for part in parts}
    whole_groups = all(part.matrix.rows % LANES == 0 for part in parts)
    if len(formats) > 1 or len(has_bias) > 1 or not whole_groups:
        return tuple(_kept(part, memory) for part in parts)
    data = memory.take(sum(part.matrix.data.size for part in parts))
    np.concatenate([part.matrix.data for part in parts], out=data)
    num_rows = sum(part.matrix.rows for part in parts)
    matrix = ops.Matrix(parts[0].matrix.format, num_rows, parts[0].matrix.cols, data)
    biases = [part.bias for part in parts if part.bias is not None]
    return (ops.Linear(matrix, np.concatenate(biases) if biases else None),)


def _kept(linear: ops.Linear, memory: ops.HugeArena) -> ops.Linear:
    """Return the same with its matrix copied there."""
    matrix = linear.matrix
    data = memory.take(matrix.data.size)
    data[:] = matrix.data
    return replace(linear, matrix=replace(matrix, data=data))


def _load_attention(
    artifact: Artifact, index: int, prefix: str, memory: ops.HugeArena
) -> ops.GroupedQuery:
    spec = artifact.spec
    has_norms = spec.attention.qk_norm is not QkNorm.NONE
    return ops.GroupedQuery(
        spec.attention,
        spec.norm_eps,
        spec.layers[index].window,
        stacked(memory, *(load_linear(artifact, prefix + name) for name in ("q", "k", "v"))),
        _kept(load_linear(artifact, f"{prefix}o"), memory),
        artifact.vector(f"{prefix}q_norm") if has_norms else None,
        artifact.vector(f"{prefix}k_norm") if has_norms else None,
    )
