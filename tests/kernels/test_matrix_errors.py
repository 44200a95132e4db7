"""What the matrix ops refuse, and which rows they name."""

import numpy as np
import pytest

from shoal import ops
from shoal.errors import NumericError, UsageError
from shoal.ops.matrices import choose_isa_from_environment
from shoal.quant import Format, Scheme
from support.weights import make_expert, make_matrix, random_rows


@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(scheme: Scheme, value: float) -> None:
    x = random_rows(9, 300, seed=1)
    x[2, 0] = x[7, 299] = value
    with pytest.raises(NumericError, match="row 2, 7") as caught:
        ops.quantise_rows(scheme, x)
    assert caught.value.rows == (2, 7)


@pytest.mark.parametrize("down", [Format.F32, Format.Q8_0])
def test_a_row_out_of_range_fails_alone(down: Format) -> None:
    """Row 1's hidden values overflow, row 3's outputs pass 2^44 quanta; row 0 and 2 are right."""
    made = make_expert(Format.F32, down, 40, 48, seed=1)
    x = random_rows(4, 40, seed=2)
    x[1] *= np.float32(1e30)
    x[3] *= np.float32(1e5)
    rows = ops.quantise_rows(Scheme.F32, x)
    pairs = np.arange(4, dtype=np.int32)
    offsets, weights = np.array([0, 4], np.int32), np.ones(4, np.float32)
    sums = np.zeros((4, 40), np.int64)
    with pytest.raises(NumericError) as caught:
        ops.expert_sums(made.layout, [made.data], rows, offsets, pairs, weights, 20, sums)
    assert caught.value.rows == (1, 3)
    good = ops.quantise_rows(Scheme.F32, x[[0, 2]])
    alone = ops.expert_sums(
        made.layout, [made.data], good, np.array([0, 2], np.int32), pairs[:2], weights[:2], 20
    )
    assert np.array_equal(sums[[0, 2]], alone)
    with pytest.raises(NumericError) as caught:
        ops.expert_ffn(made.layout, made.data, rows)
    assert caught.value.rows == (1,)


def test_the_largest_quantum_is_just_below_two_to_the_44() -> None:
    """One identity-like expert: y = c exactly, so the bound can be hit from both sides."""
    made = make_expert(Format.F32, Format.F32, 16, 16, seed=0)
    rows = ops.quantise_rows(Scheme.F32, random_rows(1, 16, seed=1))
    y = ops.expert_ffn(made.layout, made.data, rows)
    largest = np.abs(y).max()
    pairs, offsets = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    for factor, fails in ((np.float32(0.999), False), (np.float32(1.001), True)):
        weight = np.array([np.float32(2.0**24) / largest * factor], np.float32)
        arguments = (made.layout, [made.data], rows, offsets, pairs, weight, 20)
        if fails:
            with pytest.raises(NumericError):
                ops.expert_sums(*arguments)
        else:
            assert np.abs(ops.expert_sums(*arguments)).max() > 2**43


def test_a_routing_weight_that_is_not_a_number_fails_its_row() -> None:
    made = make_expert(Format.Q4_0, Format.Q4_0, 64, 32, seed=1)
    rows = ops.quantise_rows(Scheme.INT8_32, random_rows(2, 64, seed=1))
    weights = np.array([1.0, np.nan], np.float32)
    with pytest.raises(NumericError) as caught:
        ops.expert_sums(
            made.layout,
            [made.data],
            rows,
            np.array([0, 2], np.int32),
            np.arange(2, dtype=np.int32),
            weights,
            10,
        )
    assert caught.value.rows == (1,)


def test_wrong_dtypes_are_type_errors_never_copies() -> None:
    m = make_matrix(Format.F32, 16, 8, seed=0).matrix
    rows = ops.quantise_rows(Scheme.F32, random_rows(2, 8, seed=0))
    with pytest.raises(TypeError):
        ops.matmul(m, rows, np.zeros(16))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ops.matmul(m, rows, out=np.zeros((16, 2), np.float32).T)
    with pytest.raises(TypeError):
        ops.quantise_rows(Scheme.INT8_32, np.zeros((2, 32)))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ops.embed(m, np.zeros(1))  # type: ignore[arg-type]


def test_wrong_sizes_are_value_errors_that_say_both() -> None:
    made = make_matrix(Format.Q4_0, 16, 64, seed=0)
    m = made.matrix
    rows = ops.quantise_rows(Scheme.INT8_32, random_rows(2, 64, seed=0))
    with pytest.raises(ValueError, match=r"576 bytes, got uint8 \(512,\)"):
        ops.Matrix(Format.Q4_0, 16, 64, m.data[:512])
    unaligned = ops.aligned_empty(577)[1:]
    with pytest.raises(ValueError, match="64-byte boundary"):
        ops.Matrix(Format.Q4_0, 16, 64, unaligned)
    with pytest.raises(ValueError, match="length of bias: expected 16, got 15"):
        ops.matmul(m, rows, np.zeros(15, np.float32))
    with pytest.raises(ValueError, match="rows of 32 columns meet a matrix of 64"):
        ops.matmul(m, ops.quantise_rows(Scheme.INT8_32, random_rows(2, 32, seed=0)))
    with pytest.raises(ValueError, match="scheme"):
        ops.matmul(m, ops.quantise_rows(Scheme.F32, random_rows(2, 64, seed=0)))
    with pytest.raises(ValueError, match="row index below: expected 16, got 16"):
        ops.embed(m, np.array([16], np.int32))
    with pytest.raises(ValueError, match="bytes of a source row: expected 36, got 18"):
        ops.pack_rows(Format.Q4_0, np.zeros((16, 18), np.uint8), 64, m.data)
    with pytest.raises(ValueError, match="multiple of 256"):
        ops.quantise_q4_k(np.zeros((1, 128), np.float32))


@pytest.mark.parametrize(
    "offsets, pair_rows, grid, message",
    [
        ([0, 3], [0, 1], 10, "last of pair_offsets: expected 2, got 3"),
        ([1, 2], [0, 1], 10, "first of pair_offsets"),
        ([0, 2], [0, 2], 10, "pair row below: expected 2, got 2"),
        ([0, 2], [0, -1], 10, "pair row below"),
        ([0, 1, 2], [0, 1], 10, "length of pair_offsets"),
        ([0, 2], [0, 1], 101, "grid"),
    ],
)
def test_malformed_pairs_are_refused(
    offsets: list[int], pair_rows: list[int], grid: int, message: str
) -> None:
    made = make_expert(Format.Q4_0, Format.Q4_0, 64, 32, seed=1)
    rows = ops.quantise_rows(Scheme.INT8_32, random_rows(2, 64, seed=1))
    with pytest.raises(ValueError, match=message):
        ops.expert_sums(
            made.layout,
            [made.data],
            rows,
            np.array(offsets, np.int32),
            np.array(pair_rows, np.int32),
            np.ones(2, np.float32),
            grid,
        )


def test_an_expert_of_another_size_or_alignment_is_refused() -> None:
    made = make_expert(Format.Q4_0, Format.Q4_0, 64, 32, seed=1)
    rows = ops.quantise_rows(Scheme.INT8_32, random_rows(1, 64, seed=1))
    with pytest.raises(ValueError, match="bytes of an expert"):
        ops.expert_ffn(made.layout, made.data[:-64], rows)
    shifted = ops.aligned_empty(made.layout.num_bytes + 32)[32:]
    with pytest.raises(ValueError, match="64-byte"):
        ops.expert_ffn(made.layout, shifted, rows)


def test_an_instruction_set_that_is_not_there_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = ops.isa()
    with pytest.raises(UsageError, match="'sse9': unknown; this CPU has scalar"):
        ops.set_isa("sse9")
    monkeypatch.setenv("SHOAL_ISA", "AVX2")  # names are lower case
    with pytest.raises(UsageError, match="SHOAL_ISA: instruction set 'AVX2'"):
        choose_isa_from_environment()
    if "avx512" not in ops.available_isas():
        with pytest.raises(UsageError, match="not possible here"):
            ops.set_isa("avx512")
    assert ops.isa() == before


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_a_number_of_threads_out_of_range_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=r"must be in 1\.\.256"):
        ops.set_threads(threads)


@pytest.mark.parametrize("huge", [False, True])
def test_aligned_memory_is_aligned_and_writable(huge: bool) -> None:
    memory = ops.aligned_empty(3 * 1024 * 1024 + 5, huge=huge)
    assert memory.ctypes.data % (2 * 1024 * 1024 if huge else 4096) == 0
    memory[-1] = 7
    assert memory.size == 3 * 1024 * 1024 + 5 and memory[-1] == 7


def test_arrays_of_an_arena_lie_apart_each_on_a_page() -> None:
    arena = ops.HugeArena()
    half = ops.HugeArena.CHUNK_BYTES // 2
    sizes = [1, 4096, 4097, half, half - 8192, 5, half + 1, 64]
    arrays = [arena.take(size) for size in sizes]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [array.size for array in arrays] == sizes
    assert all(array.ctypes.data % 4096 == 0 for array in arrays)
    assert all((array == number).all() for number, array in enumerate(arrays))
    near = arrays[2].ctypes.data - arrays[1].ctypes.data
    assert near == 4096, "side by side"
