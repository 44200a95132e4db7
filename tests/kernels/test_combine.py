"""Integer sums: packed, unpacked, finished; hostile messages are refused and change nothing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal import ops
from support.isas import same_bits_everywhere

I64 = NDArray[np.int64]
EDGES = {2: 2**15, 3: 2**23, 4: 2**31}


def sums_of_every_width(dim: int = 77) -> I64:
    rng = np.random.default_rng(0)
    return np.concatenate(
        [
            rng.integers(-(2**bits), 2**bits, (2, dim))
            for bits in (0, 10, 15, 16, 23, 24, 31, 32, 55)
        ]
    )


def unpack(widths: NDArray[np.uint8], data: NDArray[np.uint8], dim: int) -> I64:
    """Rows of little-endian integers, by Python's own."""
    rows, at = [], 0
    for width in widths.tolist():
        raw = data[at : at + width * dim].tobytes()
        at += width * dim
        rows.append(
            [
                int.from_bytes(raw[i : i + width], "little", signed=True)
                for i in range(0, len(raw), width)
            ]
        )
    assert at == len(data)
    return np.array(rows, np.int64)


def test_what_is_packed_is_what_is_read() -> None:
    sums = sums_of_every_width()
    widths, data = ops.pack_sums(sums)
    assert set(widths.tolist()) == {2, 3, 4, 8}
    np.testing.assert_array_equal(unpack(widths, data, 77), sums)
    into = sums[::-1].copy()
    target = np.arange(len(sums), dtype=np.int32)[::-1].copy()
    ops.unpack_add_sums(widths, data, target, into)
    np.testing.assert_array_equal(into, 2 * sums[::-1])
    same_bits_everywhere(lambda: ops.pack_sums(sums))


@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_row_takes_the_smallest_width_that_holds_it(width: int) -> None:
    wider = {2: 3, 3: 4, 4: 8}[width]
    edge = EDGES[width]
    sums = np.array([[0, edge - 1], [-edge, 0], [edge, 0], [0, -edge - 1]], np.int64)
    assert ops.pack_sums(sums)[0].tolist() == [width, width, wider, wider]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**56) + 1, 2**56 - 1), min_size=1, max_size=40))
def test_any_row_survives_the_message(values: list[int]) -> None:
    sums = np.array([values], np.int64)
    widths, data = ops.pack_sums(sums)
    into = np.zeros_like(sums)
    ops.unpack_add_sums(widths, data, np.zeros(1, np.int32), into)
    np.testing.assert_array_equal(into, sums)


def test_splitting_a_sum_changes_nothing() -> None:
    """The sums of three nodes, added in any order, are those of one node that did it all."""
    rng = np.random.default_rng(1)
    parts = [rng.integers(-(2**40), 2**40, (5, 9)) for _ in range(3)]
    for order in ((0, 1, 2), (2, 0, 1)):
        into = np.zeros((5, 9), np.int64)
        for part in order:
            ops.unpack_add_sums(*ops.pack_sums(parts[part]), np.arange(5, dtype=np.int32), into)
        np.testing.assert_array_equal(into, parts[0] + parts[1] + parts[2])


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ("width 5", "row 1: 5 bytes"),
        ("width 0", "row 1: 0 bytes"),
        ("row -1", "row 0 belongs to row -1"),
        ("row too large", "row 0 belongs to row 3"),
        ("a byte missing", "bytes of sums"),
        ("a byte too many", "bytes of sums"),
        ("dishonest", r"2\^56"),
    ],
)
def test_a_malformed_message_is_refused_and_changes_nothing(slip: str, message: str) -> None:
    sums = np.array([[1, 2], [2**40, -5]], np.int64)
    if slip == "dishonest":
        sums[1, 0] = 2**56
    widths, data = ops.pack_sums(sums)
    rows = np.arange(2, dtype=np.int32)
    match slip.split():
        case ["width", value]:
            widths[1] = int(value)
        case ["row", "-1"]:
            rows[0] = -1
        case ["row", *_]:
            rows[0] = 3
        case ["a", "byte", "missing"]:
            data = data[:-1].copy()
        case ["a", "byte", *_]:
            data = np.append(data, np.uint8(0))
    into = np.full((3, 2), 7, np.int64)
    with pytest.raises(ValueError, match=message):
        ops.unpack_add_sums(widths, data, rows, into)
    assert (into == 7).all()


@pytest.mark.parametrize("grid", [-60, -3, 0, 13, 20, 100])
def test_a_finished_sum_is_rounded_once(grid: int) -> None:
    sums = sums_of_every_width()
    expected = sums.astype(np.float32) * np.float32(2.0**-grid)
    assert ops.finish_sums(sums, grid).tobytes() == expected.tobytes()
    # Through float64 this would lose its last bit and then be a tie.
    halfway = np.array([[2**54 + 2**30 + 1]], np.int64)
    assert ops.finish_sums(halfway, 0)[0, 0] == np.float32(2**54 + 2**31), "rounded twice"
    same_bits_everywhere(lambda: [ops.finish_sums(sums, grid)])


def test_a_grid_that_is_no_float_is_refused() -> None:
    for grid in (-127, 127):
        with pytest.raises(ValueError, match="grid"):
            ops.finish_sums(np.zeros((1, 1), np.int64), grid)


def nearest_bf16(value: float) -> float:
    """Round to bfloat16 by Python's own integers: eight digits, ties to even."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


@pytest.mark.parametrize("grid", [-64, -1, 0, 13, 20, 96])
def test_bf16_rounds_to_nearest_even_and_comes_back_as_quanta(grid: int) -> None:
    sums = sums_of_every_width()
    ties = [[255, 256, 257, 258, 259, 2**20 + 2**12, 2**20 + 3 * 2**12, -511]]
    sums[:1, :8] = ties
    data = ops.pack_bf16(sums, grid)
    wanted = [[int(nearest_bf16(value)) for value in row] for row in sums.tolist()]
    into = np.full_like(sums, 7)
    ops.unpack_add_bf16(data, grid, np.arange(len(sums), dtype=np.int32), into)
    np.testing.assert_array_equal(into - 7, np.array(wanted, np.int64))
    as_floats = (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(sums.shape)
    np.testing.assert_array_equal(as_floats.astype(np.float64), np.array(wanted) * 2.0**-grid)
    assert (into - 7 != sums).mean() > 0.4, "it is not exact, and not said to be"
    same_bits_everywhere(lambda: [ops.pack_bf16(sums, grid)])


def test_bf16_of_another_grid_is_rounded_to_quanta() -> None:
    data = np.array([0x3F80, 0x3FC0, 0x4020, 0xBF00, 0x3B00], "<u2").view(np.uint8)
    into = np.zeros((1, 5), np.int64)
    ops.unpack_add_bf16(data, 0, np.zeros(1, np.int32), into)
    assert into.tolist() == [[1, 2, 2, 0, 0]], "1, 1.5, 2.5, -0.5, 0.002"


@pytest.mark.parametrize(
    ("bits", "row", "message"),
    [
        (0x7F80, 0, "row 0: a value that is not finite"),
        (0xFFC0, 0, "row 0: a value that is not finite"),
        (0x0001, 0, "row 0: a value"),
        (0x5B80, 0, "2.56"),
        (0x3F80, 2, "row 0 belongs to row 2"),
        (0x3F80, -1, "row 0 belongs to row -1"),
    ],
)
def test_malformed_bf16_is_refused_and_changes_nothing(bits: int, row: int, message: str) -> None:
    data = np.array([0x3F80, bits], "<u2").view(np.uint8)
    into = np.full((2, 2), 7, np.int64)
    with pytest.raises(ValueError, match=message):
        ops.unpack_add_bf16(data, 0, np.array([row], np.int32), into)
    with pytest.raises(ValueError, match="two bytes"):
        ops.unpack_add_bf16(data[:3], 0, np.zeros(1, np.int32), into)
    with pytest.raises(ValueError, match="grid"):
        ops.unpack_add_bf16(data, 97, np.zeros(1, np.int32), into)
    assert (into == 7).all()
