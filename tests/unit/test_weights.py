"""Stacking q, k and v changes no bit, and is left alone where it cannot be done."""

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.layer_weights import stacked
from shoal.quant import Format, Scheme
from support.checkpoints import random_values

F32 = NDArray[np.float32]
COLS = 64


def linear(seed: int, rows: int, has_bias: bool = False, fmt: Format = Format.F32) -> ops.Linear:
    values = random_values(seed, "matrix", (rows, COLS))
    source = values if fmt is Format.F32 else values.astype(np.float16)
    matrix = ops.pack_matrix(fmt, source.view(np.uint8), rows, COLS)
    return ops.Linear(matrix, random_values(seed, "bias", (rows,)) if has_bias else None)


def product(part: ops.Linear, num_rows: int) -> F32:
    rows = ops.quantise_rows(Scheme.F32, random_values(9, "rows", (num_rows, COLS)))
    return ops.matmul(part.matrix, rows, part.bias)


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_product_gives_the_bits_of_three(num_rows: int, has_bias: bool) -> None:
    parts = [linear(seed, size, has_bias) for seed, size in enumerate((48, 16, 32))]
    [together] = stacked(ops.HugeArena(), *parts)
    expected = np.concatenate([product(part, num_rows) for part in parts], axis=1)
    assert product(together, num_rows).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "parts",
    [
        (linear(0, 48), linear(1, 16), linear(2, 16, fmt=Format.F16)),
        (linear(0, 40), linear(1, 16), linear(2, 16)),
        (linear(0, 48), linear(1, 16, has_bias=True), linear(2, 16)),
    ],
    ids=["formats", "row groups", "biases"],
)
def test_what_does_not_line_up_stays_apart(parts: tuple[ops.Linear, ...]) -> None:
    apart = stacked(ops.HugeArena(), *parts)
    for kept, part in zip(apart, parts, strict=True):
        assert product(kept, 3).tobytes() == product(part, 3).tobytes()
