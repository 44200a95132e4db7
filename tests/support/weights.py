"""Random weights in GGUF blocks with the float64 values they stand for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.ops_reference import matrices as reference
from shoal.quant import Format, round_up

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

EveryFormat = tuple(Format)


def random_blocks(rng: np.random.Generator, fmt: Format, rows: int, cols: int) -> U8:
    """Return row-major rows of whole blocks: any quants, scales of either sign of some 0.01."""
    padded = round_up(cols, fmt.block_cols)
    if fmt.is_float:
        values = rng.normal(size=(rows, padded)).astype(np.float32) * np.float32(0.1)
        if fmt is Format.F32:
            return values.view(np.uint8)
        if fmt is Format.F16:
            return values.astype(np.float16).view(np.uint8)
        return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
    blocks = rng.integers(0, 256, (rows, padded // fmt.block_cols, fmt.block_bytes), np.uint8)
    two = fmt in (Format.Q4_1, Format.Q4_K)
    scale = {Format.Q8_0: 1e-3, Format.Q4_K: 3e-4, Format.Q4_T: 4e-3, Format.Q3_T: 4e-3}.get(
        fmt, 1e-2
    )
    for offset, size in ((0, scale), (2, 3e-2))[: 2 if two else 1]:
        halves = (rng.normal(size=blocks.shape[:2]) * size).astype(np.float16)
        blocks[..., offset : offset + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@dataclass(frozen=True)
class MadeMatrix:
    matrix: ops.Matrix
    values: F64  # [rows, cols]


def make_matrix(fmt: Format, rows: int, cols: int, seed: int) -> MadeMatrix:
    """Return a packed random matrix and its values."""
    source = random_blocks(np.random.default_rng(seed), fmt, rows, cols)
    values = reference.dequantise(fmt, source)[:, :cols]
    return MadeMatrix(ops.pack_matrix(fmt, source, rows, cols), values)


@dataclass(frozen=True)
class MadeExpert:
    layout: ops.ExpertLayout
    data: U8
    values: reference.Expert


def make_expert(gate_up: Format, down: Format, dim: int, ffn_dim: int, seed: int) -> MadeExpert:
    """Return a packed random expert and its values."""
    rng = np.random.default_rng(seed)
    layout = ops.ExpertLayout(dim, ffn_dim, gate_up, down)
    sources = (
        random_blocks(rng, gate_up, ffn_dim, dim),
        random_blocks(rng, gate_up, ffn_dim, dim),
        random_blocks(rng, down, dim, ffn_dim),
    )
    data = ops.aligned_empty(layout.num_bytes)
    ops.pack_expert(layout, *sources, data)
    gate, up = (reference.dequantise(gate_up, source)[:, :dim] for source in sources[:2])
    return MadeExpert(
        layout,
        data,
        reference.Expert(gate, up, reference.dequantise(down, sources[2])[:, :ffn_dim]),
    )


def random_rows(num_rows: int, dim: int, seed: int) -> F32:
    """Return rows of about unit rms."""
    return np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)


def assert_close(got: F32, exact: F64, tolerance: F64) -> None:
    """Assert that every element is within its own tolerance."""
    assert got.shape == exact.shape, (got.shape, exact.shape)
    worst = np.max(np.abs(got - exact) / tolerance)
    assert worst <= 1.0, f"{worst} times the tolerance"
