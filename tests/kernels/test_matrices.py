"""Matrix products and expert FFNs against the float64 oracle, on every instruction set here."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal import ops
from shoal.ops_reference import matrices as reference
from shoal.quant import Format, Scheme, row_bytes
from support.weights import (
    EveryFormat,
    assert_close,
    make_expert,
    make_matrix,
    random_blocks,
    random_rows,
)

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@pytest.fixture(params=ops.available_isas(), autouse=True)
def on_every_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = ops.isa()
    ops.set_isa(request.param)
    yield
    ops.set_isa(before)


@pytest.mark.parametrize("fmt", EveryFormat)
@pytest.mark.parametrize("rows, cols", [(16, 256), (5, 40), (49, 288), (1, 33)])
def test_unpacking_gives_the_stored_values_rounded_at_most_once(
    fmt: Format, rows: int, cols: int
) -> None:
    made = make_matrix(fmt, rows, cols, seed=rows)
    assert np.unique(made.values).size > made.values.size // 20, "inputs are degenerate"
    assert np.array_equal(ops.unpack_matrix(made.matrix), made.values.astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(EveryFormat), st.integers(1, 40), st.integers(1, 600), st.integers(0, 99))
def test_packing_loses_nothing_whatever_the_shape(
    fmt: Format, rows: int, cols: int, seed: int
) -> None:
    made = make_matrix(fmt, rows, cols, seed)
    ids = np.random.default_rng(seed).integers(0, rows, 7).astype(np.int32)
    assert np.array_equal(ops.embed(made.matrix, ids), made.values.astype(np.float32)[ids])


def test_streaming_a_matrix_by_row_groups_packs_the_same_bytes() -> None:
    rng = np.random.default_rng(1)
    source = random_blocks(rng, Format.Q4_1, 40, 96)
    whole = ops.pack_matrix(Format.Q4_1, source, 40, 96)
    parts = np.empty_like(whole.data)
    group = parts.size // 3
    for first in range(3):
        ops.pack_rows(
            Format.Q4_1,
            source[16 * first : 16 * first + 16],
            96,
            parts[first * group : (first + 1) * group],
        )
    assert parts.tobytes() == whole.data.tobytes()


@pytest.mark.parametrize("fmt", EveryFormat)
@pytest.mark.parametrize("num_rows", [1, 3, 31])
@pytest.mark.parametrize("rows, cols", [(49, 288), (16, 33), (70, 576)])
def test_a_product_is_close_to_float64(fmt: Format, num_rows: int, rows: int, cols: int) -> None:
    made = make_matrix(fmt, rows, cols, seed=cols)
    x = random_rows(num_rows, cols, seed=num_rows)
    bias = random_rows(1, rows, seed=7)[0]
    quantised = ops.quantise_rows(made.matrix.scheme, x)
    exact = reference.row_values(quantised)
    # Against the rows as quantised: what is left is float32 rounding, some 1e-7 of the sum of
    # magnitudes a step.
    magnitude = np.abs(exact) @ np.abs(made.values).T + np.abs(bias)
    got = ops.matmul(made.matrix, quantised, bias)

    def check(candidate: F32) -> None:
        assert_close(candidate, reference.matmul(made.values, exact, bias), 2e-6 * magnitude)

    check(got)
    mutants = {
        "no bias": ops.matmul(made.matrix, quantised),
        "last column dropped": got - (x[:, -1:] * made.values[None, :, -1]).astype(np.float32),
        "two lanes swapped": got[:, [1, 0, *range(2, rows)]],
        "one part in ten thousand": got * np.float32(1.0001),
    }
    for name, mutant in mutants.items():
        with pytest.raises(AssertionError):
            check(mutant)
            pytest.fail(f"the check does not see: {name}")


@pytest.mark.parametrize("fmt", EveryFormat)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("cols", [33, 288])
def test_a_tall_matrix_gives_the_bits_of_each_of_its_row_groups(
    fmt: Format, threads: int, num_rows: int, cols: int
) -> None:
    rows, lanes = 16 * 69 + 5, 16
    matrix = make_matrix(fmt, rows, cols, seed=cols).matrix
    x = ops.quantise_rows(matrix.scheme, random_rows(num_rows, cols, seed=num_rows))
    bias = random_rows(1, rows, seed=7)[0]
    group = matrix.data.size // -(-rows // lanes)

    def alone(first: int) -> F32:
        end = min(first + lanes, rows)
        data = matrix.data[first // lanes * group :][:group]
        return ops.matmul(ops.Matrix(fmt, end - first, cols, data), x, bias[first:end])

    expected = np.concatenate([alone(first) for first in range(0, rows, lanes)], axis=1)
    before = ops.num_threads()
    ops.set_threads(threads)
    try:
        assert ops.matmul(matrix, x, bias).tobytes() == expected.tobytes()
    finally:
        ops.set_threads(before)


@pytest.mark.parametrize("scheme", [Scheme.INT8_32, Scheme.INT8_256])
@pytest.mark.parametrize("dim", [256, 33, 300])
def test_rows_are_quantised_to_steps_of_a_127th_of_the_spans_largest(
    scheme: Scheme, dim: int
) -> None:
    x = random_rows(6, dim, seed=dim)
    x[1, :32] = 0.0
    x[2] *= np.float32(1e-32)  # below the tiny-span rule
    x[3, 5] = -40.0
    rows = ops.quantise_rows(scheme, x)
    assert int(np.abs(rows.values).max()) == 127
    assert not rows.values[2].any() and not rows.scales[2].any()
    assert not rows.values[:, dim:].any(), "padding is not zero"
    step = np.repeat(rows.scales.astype(np.float64), scheme.span, axis=1)[:, :dim]
    # Half a step, and the float32 rounding of the two factors.
    assert np.all(np.abs(reference.row_values(rows) - x) <= step * 0.50002 + 1e-30)


@pytest.mark.parametrize("fmt", EveryFormat)
@pytest.mark.parametrize("dim, ffn_dim", [(288, 96), (100, 33), (64, 300)])
def test_an_expert_is_close_to_float64(fmt: Format, dim: int, ffn_dim: int) -> None:
    made = make_expert(fmt, fmt, dim, ffn_dim, seed=3)
    rows = ops.quantise_rows(made.layout.scheme, random_rows(19, dim, seed=4))
    got = ops.expert_ffn(made.layout, made.data, rows)
    exact = reference.expert_ffn(made.values, reference.row_values(rows), fmt.scheme)
    # Int8 steps of h that fall the other way in float32 move y a little: seen up to 4e-4 of rms.
    tolerance = 3e-6 if fmt.is_float else 2e-3

    def check(candidate: F32) -> None:
        error = np.sqrt(np.mean((candidate - exact) ** 2) / np.mean(exact**2))
        assert error < tolerance, error

    check(got)
    silent = reference.Expert(made.values.gate, made.values.up, made.values.down.copy())
    silent.down[:, -1] = 0
    swapped = reference.Expert(made.values.up, made.values.gate, made.values.down)
    for wrong in (silent, swapped):
        with pytest.raises(AssertionError):
            check(
                reference.expert_ffn(wrong, reference.row_values(rows), fmt.scheme).astype(
                    np.float32
                )
            )


def test_gate_and_up_may_have_another_format_than_down() -> None:
    made = make_expert(Format.Q4_K, Format.Q8_0, 256, 64, seed=5)
    rows = ops.quantise_rows(made.layout.scheme, random_rows(4, 256, seed=6))
    got = ops.expert_ffn(made.layout, made.data, rows)
    exact = reference.expert_ffn(made.values, reference.row_values(rows), Scheme.INT8_32)
    assert np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)) < 2e-3


@pytest.mark.parametrize("fmt", [Format.F32, Format.Q4_0, Format.Q4_K])
def test_sums_are_each_pairs_weighted_output_rounded_to_the_grid(fmt: Format) -> None:
    experts = [make_expert(fmt, fmt, 100, 40, seed) for seed in range(3)]
    layout = experts[0].layout
    rows = ops.quantise_rows(layout.scheme, random_rows(9, 100, seed=1))
    offsets = np.array([0, 9, 9, 13], np.int32)  # the second expert has no rows
    pair_rows = np.array([*range(9), 2, 5, 6, 8], np.int32)
    weights = random_rows(1, 13, seed=2)[0]
    expected = np.zeros((9, 100), np.int64)
    for expert, first, last in ((0, 0, 9), (2, 9, 13)):
        y = ops.expert_ffn(layout, experts[expert].data, rows)[pair_rows[first:last]]
        quanta = reference.weighted_quanta(weights[first:last], y, 18)
        np.add.at(expected, pair_rows[first:last], quanta)
    data = [made.data for made in experts]
    got = ops.expert_sums(layout, data, rows, offsets, pair_rows, weights, 18)
    assert np.abs(expected).max() > 2**12, "inputs are degenerate"
    assert np.array_equal(got, expected)
    again = ops.expert_sums(layout, data, rows, offsets, pair_rows, weights, 18, got.copy())
    assert np.array_equal(again, 2 * expected), "out is added to, not replaced"


def test_many_rows_run_in_waves_and_give_the_same_sums() -> None:
    """600 rows of 2 x 4096 hidden values are more scratch than one wave holds."""
    experts = [make_expert(Format.Q4_0, Format.Q4_0, 64, 4096, seed) for seed in range(2)]
    layout, data = experts[0].layout, [made.data for made in experts]
    num_rows = 600 if ops.isa() != "scalar" else 60
    rows = ops.quantise_rows(layout.scheme, random_rows(num_rows, 64, seed=1))
    pair_rows = np.tile(np.arange(num_rows, dtype=np.int32), 2)
    offsets = np.array([0, num_rows, 2 * num_rows], np.int32)
    weights = np.full(2 * num_rows, 0.5, np.float32)
    got = ops.expert_sums(layout, data, rows, offsets, pair_rows, weights, 16)
    for t in range(0, num_rows, 59):
        one = ops.expert_sums(
            layout,
            data,
            rows.take(np.array([t])),
            np.array([0, 1, 2], np.int32),
            np.zeros(2, np.int32),
            weights[:2],
            16,
        )
        assert np.array_equal(got[t], one[0])


def test_check_finite_sees_every_scale_and_float_weight() -> None:
    rng = np.random.default_rng(3)
    for fmt in EveryFormat:
        source = random_blocks(rng, fmt, 3, 256)
        assert ops.check_finite(fmt, source)
        offsets = [0, 2] if fmt in (Format.Q4_1, Format.Q4_K) else [0]
        for offset in offsets:
            for bits in (0x7C00, 0xFC00, 0x7E01):  # infinities and a NaN
                bad = source.copy()
                at = row_bytes(fmt, 256) - fmt.block_bytes + offset
                if fmt in (Format.F32, Format.BF16):
                    bits = 0x7F80 | (bits & 0x8001)
                    at += fmt.block_bytes - 2
                bad[1, at : at + 2] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)
                assert not ops.check_finite(fmt, bad), (fmt, offset, hex(bits))
