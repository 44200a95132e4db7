"""Matrix products and expert FFNs in float64, from the row-major blocks as GGUF defines them.

Independent of the native code: nothing here knows the kernel layout. Not for the path from ids to
tokens: NumPy's float bits differ between CPUs.

Source: gguf's format description (ggml/docs/gguf.md and ggml-quants.h), block by block.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.quant import Format, Scheme, round_up
from shoal.rows import Rows

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def dequantise(fmt: Format, source: U8) -> F64:
    """Return the exact values of row-major rows [n, row bytes]: [n, whole blocks of columns]."""
    if fmt is Format.BF16:
        bits = source.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    if fmt.is_float:
        return source.view(np.float32 if fmt is Format.F32 else np.float16).astype(np.float64)
    blocks = source.reshape(source.shape[0], -1, fmt.block_bytes)
    values = _BLOCKS[fmt](blocks)
    return values.reshape(source.shape[0], -1)


def _half(blocks: U8, offset: int) -> F64:
    """The f16 at a byte offset of each block, [n, blocks, 1]."""
    return (
        np.ascontiguousarray(blocks[..., offset : offset + 2]).view(np.float16).astype(np.float64)
    )


def _nibbles(packed: U8) -> F64:
    """Low nibbles, then high nibbles, along the last axis."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float64)


def _q8_0(blocks: U8) -> F64:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.float64)


def _q4_0(blocks: U8) -> F64:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:]) - 8)


def _q4_1(blocks: U8) -> F64:
    return _half(blocks, 0) * _nibbles(blocks[..., 4:]) + _half(blocks, 2)


# Levels of the table formats: value = d * level. Codes lie in GGUF's order of nibbles (Q4_T); for
# three bits in three rows of four bytes: row r has code 2r of each byte in bits 0-2, code 2r + 1
# in bits 3-5; the top two bits of rows 0 and 2 are the low bits of codes 6 and 7, whose high bits
# are bits 6 and 7 of row 1. Code c of byte i is column 4c + i.
_LEVELS_4: F64 = np.array(
    [-34, -28, -22, -17, -13, -9, -6, -3, 0, 3, 6, 10, 14, 18, 23, 30], np.float64
)
_LEVELS_3: F64 = np.array([-35, -20, -11, -4, 3, 10, 18, 29], np.float64)


def _q4_t(blocks: U8) -> F64:
    levels: F64 = _LEVELS_4[_nibbles(blocks[..., 2:]).astype(np.int64)]
    return _half(blocks, 0) * levels


def _q3_t(blocks: U8) -> F64:
    rows = blocks[..., 2:].reshape(*blocks.shape[:2], 3, 4).astype(np.int64)
    first, middle, last = rows[..., 0, :], rows[..., 1, :], rows[..., 2, :]
    codes = [row >> shift & 7 for row in (first, middle, last) for shift in (0, 3)]
    codes += [first >> 6 | (middle >> 6 & 1) << 2, last >> 6 | (middle >> 7) << 2]
    levels: F64 = _LEVELS_3[np.concatenate(codes, axis=-1)]
    return _half(blocks, 0) * levels


def _q4_k(blocks: U8) -> F64:
    packed = blocks[..., 4:16].astype(np.int64)
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=-1)
    mins = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=-1)
    quants = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    quants = quants.reshape(*blocks.shape[:2], 8, 32)
    scaled: F64 = (_half(blocks, 0) * scales)[..., None] * quants
    offsets: F64 = (_half(blocks, 2) * mins)[..., None]
    return np.subtract(scaled, offsets)


_BLOCKS = {
    Format.Q8_0: _q8_0,
    Format.Q4_0: _q4_0,
    Format.Q4_1: _q4_1,
    Format.Q4_K: _q4_k,
    Format.Q4_T: _q4_t,
    Format.Q3_T: _q3_t,
}


def row_values(rows: Rows) -> F64:
    """Return what the rows stand for, [T, dim]."""
    if rows.scheme is Scheme.F32:
        return rows.values.astype(np.float64)
    spans = rows.values.astype(np.float64).reshape(rows.num_rows, -1, rows.scheme.span)
    values: F64 = (spans * rows.scales.astype(np.float64)[..., None]).reshape(rows.num_rows, -1)
    return values[:, : rows.dim]


def quantise_rows(scheme: Scheme, x: F64) -> F64:
    """Return x [T, D] after a round trip through a scheme: steps of max|x| / 127 a span."""
    if scheme is Scheme.F32:
        return x
    num_rows, dim = x.shape
    padded = np.zeros((num_rows, round_up(dim, scheme.span)))
    padded[:, :dim] = x
    spans = padded.reshape(num_rows, -1, scheme.span)
    largest = np.abs(spans).max(axis=-1, keepdims=True)
    step = np.where(largest < 1e-30, 1.0, largest / 127)
    quants = np.where(largest < 1e-30, 0.0, np.rint(spans / step))
    return (quants * step).reshape(num_rows, -1)[:, :dim]


def matmul(weights: F64, x: F64, bias: F32 | None = None) -> F64:
    """Return x @ weights.T + bias for weights [rows, cols] and x [T, cols]."""
    product: F64 = x @ weights.T
    return product if bias is None else product + bias.astype(np.float64)


def swiglu(gate: F64, up: F64) -> F64:
    """Return up * gate / (1 + exp(-gate))."""
    activated: F64 = up * gate / (1 + np.exp(-gate))
    return activated


@dataclass(frozen=True)
class Expert:
    """The values of one expert: gate and up [I, D], down [D, I]."""

    gate: F64
    up: F64
    down: F64


def expert_ffn(expert: Expert, x: F64, hidden_scheme: Scheme) -> F64:
    """Return down(swiglu(gate(x), up(x))), [T, D]; h is quantised as down's scheme says."""
    hidden = swiglu(matmul(expert.gate, x), matmul(expert.up, x))
    return matmul(expert.down, quantise_rows(hidden_scheme, hidden))


def weighted_quanta(weights: F32, y: F32, grid: int) -> NDArray[np.int64]:
    """Return rne(w * y * 2^grid) of rows y [P, D] with a weight each; the product is float32."""
    product = weights[:, None] * y
    return np.rint(product.astype(np.float64) * 2.0**grid).astype(np.int64)
