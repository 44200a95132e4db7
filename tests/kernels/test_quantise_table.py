"""Our table quantiser: bytes fixed for ever, error smaller than what an obvious scale leaves."""

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.ops_reference import matrices as reference
from shoal.quant import Format

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
TABLES = (Format.Q4_0, Format.Q4_T, Format.Q3_T)
COLS = 160  # sixteen blocks at a time cross the end of a row


def weights(rows: int = 12) -> F32:
    """Bell-shaped values from integers and IEEE arithmetic alone: the same on every machine."""
    rng = np.random.Generator(np.random.PCG64(5))
    uniform = rng.integers(-(2**23), 2**23, (4, rows, COLS)).astype(np.float32) / np.float32(2**23)
    bell: F32 = ((uniform[0] + uniform[1]) + (uniform[2] + uniform[3])) * np.float32(0.03)
    return bell


def importance() -> F32:
    return np.tile(np.array([0.25, 1, 64, 4], np.float32), COLS // 4)


def levels(fmt: Format) -> F64:
    """The values of a block of scale 1, ascending."""
    codes = np.zeros((256, fmt.block_bytes), np.uint8)
    codes[:, :2] = np.array([1], np.float16).view(np.uint8)
    codes[:, 2:] = np.arange(256, dtype=np.uint8)[:, None]
    return np.unique(reference.dequantise(fmt, codes))


def error(fmt: Format, values: F32, blocks: NDArray[np.uint8], weigh: F32 | None = None) -> float:
    squares = (reference.dequantise(fmt, blocks) - values) ** 2
    return float(np.sum(squares if weigh is None else squares * weigh))


def searched(fmt: Format, values: F32) -> float:
    """The least error of 400 scales a block, each of either sign, with the nearest levels."""
    table, blocks = levels(fmt), values.reshape(-1, 32).astype(np.float64)
    largest = np.abs(blocks).max(axis=1, keepdims=True) / np.abs(table).max()
    best = np.full(len(blocks), np.inf)
    for part in np.linspace(0.5, 1.3, 200):
        for scale in (part * largest, -part * largest):
            nearest = np.abs((blocks / scale)[..., None] - table).argmin(axis=-1)
            best = np.minimum(best, ((scale * table[nearest] - blocks) ** 2).sum(axis=1))
    return float(best.sum())


@pytest.mark.parametrize("fmt", TABLES)
def test_the_error_is_close_to_that_of_a_dense_search(fmt: Format) -> None:
    values = weights()
    ours, best = error(fmt, values, ops.quantise_table(fmt, values)), searched(fmt, values)
    assert len(levels(fmt)) == (8 if fmt is Format.Q3_T else 16)
    assert best * 0.97 < ours < best * 1.03, (ours, best)


@pytest.mark.parametrize("fmt", TABLES)
def test_importance_moves_the_error_to_where_it_costs_less(fmt: Format) -> None:
    values, weigh = weights(), importance()
    plain, weighed = ops.quantise_table(fmt, values), ops.quantise_table(fmt, values, weigh)
    assert error(fmt, values, weighed, weigh) < 0.9 * error(fmt, values, plain, weigh)
    assert error(fmt, values, weighed) > error(fmt, values, plain)
    alike = np.full(COLS, 4, np.float32)
    assert ops.quantise_table(fmt, values, alike).tobytes() == plain.tobytes()


def test_the_bytes_are_fixed_on_every_instruction_set_and_thread_count() -> None:
    """They decide an artifact's identity: a change of a digest is a new format version."""
    values, isa, threads = weights(), ops.isa(), ops.num_threads()
    found: dict[Format, set[str]] = {fmt: set() for fmt in TABLES}
    for name in ops.available_isas():
        for n in (1, 3):
            ops.set_isa(name)
            ops.set_threads(n)
            for fmt in TABLES:
                data = ops.quantise_table(fmt, values, importance()).tobytes()
                found[fmt].add(hashlib.sha256(data).hexdigest()[:16])
    ops.set_isa(isa)
    ops.set_threads(threads)
    assert found == {
        Format.Q4_0: {"0a18afbcec482737"},
        Format.Q4_T: {"e3f1eb06d79fa7e3"},
        Format.Q3_T: {"ecbdd7bf7f1783ca"},
    }


@pytest.mark.parametrize("fmt", TABLES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, 1e-38])
def test_constant_and_extreme_blocks_stay_finite_and_close(fmt: Format, value: float) -> None:
    values = np.full((1, 32), value, np.float32)
    blocks = ops.quantise_table(fmt, values)
    assert ops.check_finite(fmt, blocks)
    if abs(value) in (0.0, 1.0):
        assert np.all(np.abs(reference.dequantise(fmt, blocks) - values) <= 1e-3)


@pytest.mark.parametrize("fmt", TABLES)
def test_values_on_the_grid_are_kept(fmt: Format) -> None:
    rng = np.random.default_rng(2)
    table = levels(fmt)
    values = (table[rng.integers(0, len(table), (6, 64))] * 0.0625).astype(np.float32)
    values[:, ::32], values[:, 1::32] = table[0] * 0.0625, table[-1] * 0.0625
    assert np.array_equal(reference.dequantise(fmt, ops.quantise_table(fmt, values)), values)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="must be q4_0, q4_t or q3_t"):
        ops.quantise_table(Format.Q8_0, np.zeros((1, 32), np.float32))
    with pytest.raises(ValueError, match="length of importance: expected 32, got 31"):
        ops.quantise_table(Format.Q4_T, np.zeros((1, 32), np.float32), np.ones(31, np.float32))
