"""Paged attention against float64, and bit for bit over everything that must not matter."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.errors import NumericError
from shoal.limits import ATTENTION_CUT, KV_BLOCK_TOKENS
from shoal.ops_reference import floats as reference
from support.isas import same_bits_everywhere

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass
class Paged:
    """Two sequences in one cache whose blocks lie in a shuffled order; the rest is NaN."""

    k: list[F32]
    v: list[F32]
    k_cache: NDArray[np.float16] | NDArray[np.float32]
    v_cache: NDArray[np.float16] | NDArray[np.float32]
    block_tables: I32

    @property
    def kv_heads(self) -> int:
        return int(self.k[0].shape[1])

    @property
    def dim(self) -> int:
        return int(self.k[0].shape[2])


def paged(
    dtype: str, kv_heads: int, dim: int, lengths: tuple[int, ...] = (700, 30), seed: int = 0
) -> Paged:
    rng = np.random.default_rng(seed)
    blocks_each = -(-max(lengths) // KV_BLOCK_TOKENS)
    num_blocks = blocks_each * len(lengths) + 3
    k_shape, v_shape = ops.kv_shape(num_blocks, kv_heads, dim)
    k_cache, v_cache = np.full(k_shape, np.nan, dtype), np.full(v_shape, np.nan, dtype)
    tables = rng.permutation(num_blocks)[: blocks_each * len(lengths)].astype(np.int32)
    tables = tables.reshape(len(lengths), blocks_each)
    ks, vs = [], []
    for table, length in zip(tables, lengths, strict=True):
        k = rng.standard_normal((length, kv_heads, dim)).astype(np.float32)
        v = rng.standard_normal((length, kv_heads, dim)).astype(np.float32)
        ops.kv_write(k_cache, v_cache, k, v, slots_of(table, np.arange(length)))
        ks.append(k)
        vs.append(v)
    return Paged(ks, vs, k_cache, v_cache, tables)


def slots_of(table: I32, positions: NDArray[np.intp]) -> I32:
    block = table[positions // KV_BLOCK_TOKENS]
    return (block * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS).astype(np.int32)


# (sequence, position): a chunk that crosses two cuts, single rows, a row that sees one key.
ROWS = [(0, 699), (1, 29), (1, 28), *[(0, p) for p in range(200, 300)], (0, 0)]
ROWS += [(0, p) for p in range(500, 520)] + [(0, 255), (0, 256), (1, 0)]


def attend(cache: Paged, q: F32, rows: list[tuple[int, int]], window: int | None) -> F32:
    sequence = np.array([s for s, _ in rows], np.int32)
    position = np.array([p for _, p in rows], np.int32)
    scale = float(cache.dim**-0.5)
    tables = cache.block_tables
    return ops.attention(q, cache.k_cache, cache.v_cache, tables, sequence, position, scale, window)


def expected(cache: Paged, q: F32, rows: list[tuple[int, int]], window: int | None) -> F32:
    dtype = cache.k_cache.dtype
    out = np.empty(q.shape)
    for t, (s, p) in enumerate(rows):
        first = 0 if window is None else max(0, p - window + 1)
        k, v = (a[s][first : p + 1].astype(dtype).astype(np.float64) for a in (cache.k, cache.v))
        out[t] = reference.attention(q[t].astype(np.float64), k, v, float(cache.dim**-0.5))
    return out.astype(np.float32)


def queries(cache: Paged, heads: int, rows: list[tuple[int, int]]) -> F32:
    rng = np.random.default_rng(99)
    q = rng.standard_normal((len(rows), heads, cache.dim)).astype(np.float32) * 3
    assert np.unique(q).size > q.size // 2, "inputs are degenerate"
    return q


GEOMETRIES = [  # heads, kv heads, head dim, window
    (8, 2, 64, None),
    (8, 1, 128, 300),
    (6, 2, 80, 100),
    (3, 3, 20, None),
    (9, 3, 64, 1),
    (7, 1, 33, 256),
    (20, 1, 16, None),
]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), GEOMETRIES)
def test_attention_is_that_of_float64(
    dtype: str, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    cache = paged(dtype, kv_heads, dim)
    q = queries(cache, heads, ROWS)
    # Scores of up to 30 in float32 (4e-6 absolute, so relative in the weights), values of order 1.
    np.testing.assert_allclose(
        attend(cache, q, ROWS, window), expected(cache, q, ROWS, window), rtol=1e-5, atol=1e-5
    )


def test_attention_that_is_wrong_is_refused() -> None:
    cache = paged("float32", 2, 20)
    q = queries(cache, 4, ROWS)
    right = expected(cache, q, ROWS, None)

    def one_key_less() -> F32:
        return expected(cache, q, [(s, max(p - 1, 0)) for s, p in ROWS], None)

    def no_scale() -> F32:
        return attend(cache, q * np.float32(20**0.5), ROWS, None)

    def heads_by_turns() -> F32:
        return attend(cache, q[:, [0, 2, 1, 3]].copy(), ROWS, None)[:, [0, 2, 1, 3]]

    def rounds_weights_to_half() -> F32:
        return attend(cache, q.astype(np.float16).astype(np.float32), ROWS, None)

    for mutant in (one_key_less, no_scale, heads_by_turns, rounds_weights_to_half):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(mutant(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), GEOMETRIES)
def test_a_rows_bits_depend_on_its_keys_alone(
    dtype: str, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """All rows in one call, each alone, in another order: on every instruction set and thread."""
    cache = paged(dtype, kv_heads, dim)
    q = queries(cache, heads, ROWS)
    together = attend(cache, q, ROWS, window)
    same_bits_everywhere(lambda: [attend(cache, q, ROWS, window)])
    for t, row in enumerate(ROWS):
        alone = attend(cache, q[t : t + 1].copy(), [row], window)
        assert alone.tobytes() == together[t].tobytes(), row
    order = np.random.default_rng(1).permutation(len(ROWS))
    shuffled = attend(cache, q[order].copy(), [ROWS[t] for t in order], window)
    assert shuffled.tobytes() == together[order].tobytes()


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 32, 512])
def test_a_chunk_is_as_good_as_its_rows(rows: int) -> None:
    cache = paged("float16", 2, 24, lengths=(600,))
    where = [(0, 600 - rows + t) for t in range(rows)]
    q = queries(cache, 6, where)
    whole = attend(cache, q, where, None)
    halves = [
        attend(cache, q[part].copy(), where[part], None)
        for part in (slice(0, rows // 2), slice(rows // 2, rows))
    ]
    assert np.concatenate(halves).tobytes() == whole.tobytes()


def test_one_row_over_many_cuts_gives_the_same_bits_everywhere() -> None:
    cache = paged("float16", 2, 64, lengths=(9 * ATTENTION_CUT + 5,))
    rows = [(0, 9 * ATTENTION_CUT + 4)]
    q = queries(cache, 8, rows)
    same_bits_everywhere(lambda: [attend(cache, q, rows, None)])
    np.testing.assert_allclose(
        attend(cache, q, rows, None), expected(cache, q, rows, None), rtol=1e-5, atol=1e-5
    )


def test_where_the_blocks_lie_does_not_matter() -> None:
    first, second = paged("float16", 1, 40, seed=5), paged("float16", 1, 40, seed=5)
    moved = np.random.default_rng(6).permutation(first.k_cache.shape[0])
    second.k_cache, second.v_cache = first.k_cache[moved].copy(), first.v_cache[moved].copy()
    second.block_tables = np.argsort(moved)[first.block_tables].astype(np.int32)
    q = queries(first, 4, ROWS)
    assert attend(first, q, ROWS, None).tobytes() == attend(second, q, ROWS, None).tobytes()


def test_keys_that_a_row_does_not_see_are_never_visited() -> None:
    """Beyond the window and after the row everything is NaN, and block ids are of no block."""
    cache = paged("float32", 2, 20, lengths=(700,))
    rows, window = [(0, p) for p in range(600, 640)], 50
    q = queries(cache, 4, rows)
    clean = attend(cache, q, rows, window)
    hidden = np.concatenate([np.arange(551), np.arange(640, 700)])
    slots = slots_of(cache.block_tables[0], hidden)
    block, token = slots // KV_BLOCK_TOKENS, slots % KV_BLOCK_TOKENS
    cache.k_cache[block, :, token // 16, :, token % 16] = np.nan
    cache.v_cache[block, :, token] = np.nan
    cache.block_tables[0, : 551 // KV_BLOCK_TOKENS] = -1
    assert attend(cache, q, rows, window).tobytes() == clean.tobytes()


def test_the_cache_rounds_to_its_type_to_nearest_even() -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 40 * 2 * 21, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.where(np.abs(values) < 65519, values, np.float32(1.0)).reshape(40, 2, 21)
    values[0, 0, :4] = [2.0**-24, 2.0**-25, 1 + 2.0**-11, 65519.0]
    k_shape, v_shape = ops.kv_shape(1, 2, 21)
    slots = np.arange(40, dtype=np.int32)

    def op() -> list[NDArray[np.generic]]:
        k_cache, v_cache = np.zeros(k_shape, np.float16), np.zeros(v_shape, np.float16)
        ops.kv_write(k_cache, v_cache, values, values, slots)
        return [k_cache, v_cache]

    same_bits_everywhere(op)
    k_cache, v_cache = op()
    rounded = values.astype(np.float16)
    assert v_cache[0, :, :40].transpose(1, 0, 2).tobytes() == rounded.tobytes()
    keys = k_cache[0].transpose(1, 3, 0, 2).reshape(64, 2, 21)[:40]
    assert keys.tobytes() == rounded.tobytes()


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 65520.0), ("float16", np.nan), ("float32", -np.inf)]
)
def test_a_value_beyond_the_caches_type_fails_its_row_alone(dtype: str, value: float) -> None:
    k_shape, v_shape = ops.kv_shape(1, 1, 5)
    k_cache, v_cache = np.zeros(k_shape, dtype), np.zeros(v_shape, dtype)
    k, v = np.ones((3, 1, 5), np.float32), np.ones((3, 1, 5), np.float32)
    v[1, 0, 4] = value
    with pytest.raises(NumericError, match=f"{dtype} in row 1") as caught:
        ops.kv_write(k_cache, v_cache, k, v, np.arange(3, dtype=np.int32))
    assert caught.value.rows == (1,)
    assert v_cache[0, 0, :4, 0].tolist() == [1, 0, 1, 0]


def _out_of_range(change: Callable[[dict[str, I32]], None]) -> None:
    cache = paged("float32", 1, 4, lengths=(100,))
    arrays = {
        "tables": cache.block_tables.copy(),
        "sequence": np.zeros(1, np.int32),
        "position": np.full(1, 99, np.int32),
    }
    change(arrays)
    ops.attention(
        np.ones((1, 1, 4), np.float32),
        cache.k_cache,
        cache.v_cache,
        arrays["tables"],
        arrays["sequence"],
        arrays["position"],
        1.0,
        None,
    )


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("tables", 99, "block 99"),
        ("tables", -1, "block -1"),
        ("sequence", 1, "sequence 1"),
        ("position", 128, "position 128"),
        ("position", -1, "position -1"),
    ],
)
def test_what_lies_outside_the_cache_is_refused(array: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _out_of_range(lambda arrays: arrays[array].fill(value))


def test_a_slot_outside_the_cache_is_refused() -> None:
    k_shape, v_shape = ops.kv_shape(1, 1, 4)
    k_cache, v_cache = np.zeros(k_shape, np.float32), np.zeros(v_shape, np.float32)
    row = np.ones((1, 1, 4), np.float32)
    for slot in (-1, 64):
        with pytest.raises(ValueError, match="slot"):
            ops.kv_write(k_cache, v_cache, row, row, np.array([slot], np.int32))


def test_both_halves_of_the_cache_have_one_type() -> None:
    k_shape, v_shape = ops.kv_shape(1, 1, 4)
    row = np.ones((1, 1, 4), np.float32)
    with pytest.raises(TypeError, match="both"):
        ops.kv_write(
            np.zeros(k_shape, np.float32),
            np.zeros(v_shape, np.float16),
            row,
            row,
            np.zeros(1, np.int32),
        )
