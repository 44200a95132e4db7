"""Integer sums: packed, unpacked, finished; hostile messages are refused and change nothing."""

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
