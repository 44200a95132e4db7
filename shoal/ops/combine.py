"""Sums of expert outputs as integers: packed for a message, added up, turned back into floats.

Typed fronts of the native kernels. A sum is that of q = rne(weight * y * 2^grid) over experts
(exactness rule 5), so neither order nor split of the adding matters.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal import _kernels

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


class Sums(NamedTuple):
    """A branch of the residual [T, D], as integers: values * 2^-grid, rounded once."""

    values: I64
    grid: int


def finish_sums(sums: I64, grid: int) -> F32:
    """Return float32(sums) * 2^-grid, [T, D]; grid in -126..126."""
    out = np.empty(sums.shape, np.float32)
    _kernels.finish_sums(sums, grid, out)
    return out


def pack_sums(sums: I64) -> tuple[U8, U8]:
    """Return (widths, data) of sums [T, D].

    widths[t] is the smallest of 2, 3, 4, 8 bytes that holds every value of row t; data is the rows
    one after the other, little-endian two's complement.
    """
    widths = np.empty(len(sums), np.uint8)
    data = np.empty(_kernels.sum_widths(sums, widths), np.uint8)
    _kernels.pack_sums(sums, widths, data)
    return widths, data


def unpack_add_sums(widths: U8, data: U8, rows: NDArray[np.int32], into: I64) -> None:
    """Add packed row t to row rows[t] of `into` [T, D].

    Raises:
        ValueError: a width, row or size that cannot be, or a sum of 2^56 or more; `into` is then
            unchanged. The arrays may come from a stranger.
    """
    _kernels.unpack_add_sums(widths, data, rows, into)


def pack_bf16(sums: I64, grid: int) -> U8:
    """Return bfloat16(sums * 2^-grid), rounded to nearest even, little-endian. Not exact.

    Args:
        sums: [T, D], each below 2^56 in magnitude.
        grid: in -64..96.
    """
    data = np.empty(2 * sums.size, np.uint8)
    _kernels.pack_bf16(sums, grid, data)
    return data


def unpack_add_bf16(data: U8, grid: int, rows: NDArray[np.int32], into: I64) -> None:
    """Add rne(row t of bfloat16 values * 2^grid) to row rows[t] of `into` [T, D].

    Raises:
        ValueError: a row or size that cannot be, or a value that is not finite or of 2^56 quanta
            or more; `into` is then unchanged. The arrays may come from a stranger.
    """
    _kernels.unpack_add_bf16(data, grid, rows, into)
