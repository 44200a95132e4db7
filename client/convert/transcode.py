"""Rows of a checkpoint in the format asked for: copied where it is the same, else re-quantised.

What this file computes becomes part of the model's identity, so it is the same on every CPU: NumPy
arithmetic element by element (IEEE operations, no sums), integer work, and our own kernels.
"""

from dataclasses import dataclass

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType

from client.convert.source import F32, U8, SourceTensor
from shoal import ops
from shoal.errors import NonFiniteWeights
from shoal.families import TensorSlice, rope_row_order
from shoal.quant import LANES, Format, round_up, row_bytes

_CHUNK_VALUES = 1 << 20  # values in flight: 4 MiB as float32, and a few times that while quantising
# Below this a block's scale is zero in float16 anyway; the library's 1 / d would be infinite.
_TINY = np.float32(2.0**-40)
# A Q4_K minimum is at most 65504 (float16) times 63; the quantiser would clamp what lies beyond.
_LARGEST_Q4_K = np.float32(65504 * 63)


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a source tensor, read as rows in `format`.

    name: ours, for messages.
    """

    name: str
    tensor: SourceTensor
    where: TensorSlice
    format: Format

    @property
    def num_rows(self) -> int:
        return self.where.num_rows if self.where.cols is not None else 1

    @property
    def num_cols(self) -> int:
        return self.where.num_cols if self.where.cols is not None else self.where.num_rows

    @property
    def padded_cols(self) -> int:
        """Columns that the rows of `rows()` hold: whole quant blocks."""
        return round_up(self.num_cols, self.format.block_cols)

    @property
    def chunk_rows(self) -> int:
        """Rows to take at a time: whole row groups, a bounded number of values."""
        return max(LANES, _CHUNK_VALUES // self.padded_cols // LANES * LANES)

    def rows(self, first: int, last: int) -> U8:
        """Return rows [first, last) as [n, row bytes] in `format`, columns padded with zeros.

        Raises: NonFiniteWeights naming the tensor.
        """
        if self.format is self.tensor.format and self._is_block_aligned():
            data = self._raw(first, last, *self._cols())
            return self._finite(np.ascontiguousarray(data))
        values = self.values(first, last)
        if self.format is Format.Q4_K and np.abs(values).max() > _LARGEST_Q4_K:
            raise self._not_finite()
        return self._finite(encode(self.format, values))

    def values(self, first: int, last: int) -> F32:
        """Return rows [first, last) as [n, cols] float32. Raises NonFiniteWeights."""
        low, high = self._cols()
        block = self.tensor.block_cols
        outer = low // block * block
        raw = self._raw(first, last, outer, round_up(high, block))
        values = self.tensor.dequantise(np.ascontiguousarray(raw))
        values = np.ascontiguousarray(values[:, low - outer : high - outer])
        if not ops.check_finite(Format.F32, values.view(np.uint8)):
            raise self._not_finite()
        return values

    def _cols(self) -> tuple[int, int]:
        return self.where.cols if self.where.cols is not None else self.where.rows

    def _is_block_aligned(self) -> bool:
        low, high = self._cols()
        return low % self.format.block_cols == 0 and high % self.format.block_cols == 0

    def _raw(self, first: int, last: int, low: int, high: int) -> U8:
        matrix = self.tensor.matrix(self.where.index)
        block = self.tensor.block_cols
        block_bytes = matrix.shape[1] // (self.tensor.shape[-1] // block)
        cols = slice(low // block * block_bytes, high // block * block_bytes)
        if self.where.rope_heads and self.where.cols is None:  # a bias: its elements are the rows
            order = rope_row_order(self.where.num_rows, self.where.rope_heads)
            return matrix.reshape(-1, block_bytes)[order].reshape(1, -1)
        if self.where.rope_heads:
            order = rope_row_order(self.where.num_rows, self.where.rope_heads)
            return matrix[order[first:last], cols]
        start = self.where.rows[0] if self.where.cols is not None else 0
        return matrix[start + first : start + last, cols]

    def _finite(self, rows: U8) -> U8:
        if not ops.check_finite(self.format, rows):
            raise self._not_finite()
        return rows

    def _not_finite(self) -> NonFiniteWeights:
        return NonFiniteWeights(
            f"{self.name}: tensor {self.tensor.name} ({self.tensor.type_name}) has a NaN or an"
            f" infinity, or a value too large for {self.format.label}: the checkpoint is damaged"
        )


def encode(fmt: Format, values: F32) -> U8:
    """Return [n, cols] float32 as [n, row bytes], columns padded with zeros to whole blocks.

    A value too large for the format becomes an infinity, or a scale does, or (Q4_K) is clamped;
    the caller looks.
    """
    num_rows, cols = values.shape
    padded = round_up(cols, fmt.block_cols)
    if padded != cols:
        values = np.pad(values, ((0, 0), (0, padded - cols)))
    match fmt:
        case Format.F32:
            encoded = values.astype("<f4", copy=False).view(np.uint8)
        case Format.F16:
            with np.errstate(over="ignore"):
                encoded = values.astype("<f2").view(np.uint8)
        case Format.BF16:
            encoded = _to_bf16(values).view(np.uint8)
        case Format.Q4_K:
            encoded = ops.quantise_q4_k(values)
        case Format.Q4_T | Format.Q3_T:
            encoded = ops.quantise_table(fmt, values)
        case _:
            encoded = _quantise(fmt, values)
    return np.ascontiguousarray(encoded).reshape(num_rows, row_bytes(fmt, padded))


def _to_bf16(values: F32) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """Round to the nearest, ties to even; integer arithmetic on the bits of finite values."""
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype("<u2")


def _quantise(fmt: Format, values: F32) -> U8:
    blocks = values.reshape(-1, fmt.block_cols)
    is_tiny = np.abs(blocks).max(axis=1, keepdims=True) < _TINY
    if is_tiny.any():
        blocks = np.where(is_tiny, np.float32(0), blocks)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # a scale beyond float16: found by the caller
        encoded: U8 = quants.quantize(blocks.reshape(values.shape), GGMLQuantizationType[fmt.name])
    return encoded
