"""Stacking q, k and v changes no bit, and is left alone where it cannot be done."""

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.row_forms import RowForms
from coordinator.weights import Dense, Qkv, try_stack
from shoal import ops
from shoal.quant import Format
from support.checkpoints import random_values

F32 = NDArray[np.float32]
COLS = 64


def dense(seed: int, rows: int, has_bias: bool = False, fmt: Format = Format.F32) -> Dense:
    values = random_values(seed, "matrix", (rows, COLS))
    source = values if fmt is Format.F32 else values.astype(np.float16)
    matrix = ops.pack_matrix(fmt, source.view(np.uint8), rows, COLS)
    return Dense(matrix, random_values(seed, "bias", (rows,)) if has_bias else None)


def rows(num_rows: int) -> RowForms:
    return RowForms(random_values(9, "rows", (num_rows, COLS)))


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_product_gives_the_bits_of_three(num_rows: int, has_bias: bool) -> None:
    parts = [dense(seed, size, has_bias) for seed, size in enumerate((48, 16, 24))]
    assert try_stack(parts) is not None
    together = Qkv(*parts)(rows(num_rows))
    for part, got in zip(parts, together, strict=True):
        expected = part(rows(num_rows).get(part.scheme))
        assert got.shape == expected.shape
        assert got.flags.c_contiguous
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "parts",
    [
        [dense(0, 48), dense(1, 16), dense(2, 16, fmt=Format.F16)],
        [dense(0, 40), dense(1, 16), dense(2, 16)],
        [dense(0, 48), dense(1, 16, has_bias=True), dense(2, 16)],
    ],
    ids=["formats", "row groups", "biases"],
)
def test_what_does_not_line_up_stays_apart(parts: list[Dense]) -> None:
    assert try_stack(parts) is None
    for part, got in zip(parts, Qkv(*parts)(rows(3)), strict=True):
        assert got.tobytes() == part(rows(3).get(part.scheme)).tobytes()
