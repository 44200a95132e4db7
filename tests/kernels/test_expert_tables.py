"""A layer's experts by number: the sums of `expert_sums`, and memory that nobody reads too late."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.experts.call import ExpertCall
from shoal.experts.grouping import group_pairs
from shoal.quant import Format, Scheme
from support.weights import make_expert, random_rows

DIM, FFN_DIM, GRID = 96, 40, 18
OWNED = (0, 1, 2, 4, 5, 7)  # of 8


@dataclass(frozen=True)
class Layer:
    layout: ops.ExpertLayout
    weights: dict[int, NDArray[np.uint8]]

    def table(self) -> ops.ExpertTable:
        return ops.expert_table(self.layout, self.weights)


def make_layer(fmt: Format = Format.Q4_0) -> Layer:
    made = {number: make_expert(fmt, fmt, DIM, FFN_DIM, seed=number) for number in OWNED}
    return Layer(made[0].layout, {number: each.data for number, each in made.items()})


def call_on(layer: Layer, counts: list[int], seed: int = 0) -> ExpertCall:
    """A row for each count, which visits as many experts."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(OWNED)[:count] for count in counts]
    return ExpertCall(
        0,
        ops.quantise_rows(layer.layout.scheme, random_rows(len(counts), DIM, seed)),
        np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        np.concatenate(chosen).astype(np.int32),
        rng.normal(size=sum(counts)).astype(np.float32),
    )


def by_table(
    table: ops.ExpertTable, call: ExpertCall, out: NDArray[np.int64], grid: int = GRID
) -> list[int] | None:
    rows = call.rows
    offsets, experts = call.row_offsets, call.experts
    return table.sums(
        rows.scheme, rows.dim, rows.values, rows.scales, offsets, experts, call.weights, grid, out
    )


def by_list(layer: Layer, call: ExpertCall) -> NDArray[np.int64]:
    grouped = group_pairs(call)
    weights = [layer.weights[number] for number in grouped.experts]
    offsets, rows = grouped.pair_offsets, grouped.pair_rows
    return ops.expert_sums(
        layer.layout, weights, call.rows, offsets, rows, grouped.pair_weights, GRID
    )


def nonsense(num_rows: int) -> NDArray[np.int64]:
    return np.full((num_rows, DIM), 12345, np.int64)


@pytest.mark.parametrize("fmt", [Format.F32, Format.Q8_0, Format.Q4_0])
@pytest.mark.parametrize("counts", [[1], [6], [3, 1, 2], [4] * 40])
def test_a_table_gives_the_sums_of_its_experts_and_counts_them(
    fmt: Format, counts: list[int]
) -> None:
    layer = make_layer(fmt)
    table = layer.table()
    total = 0
    for seed in range(3):
        call = call_on(layer, counts, seed)
        out = nonsense(len(counts))
        assert by_table(table, call, out) == []
        expected = by_list(layer, call)
        assert np.abs(expected).max() > 2**10, "inputs are degenerate"
        assert np.array_equal(out, expected)
        total += len(set(call.experts.tolist()))
    assert table.num_hits == total


def test_a_plan_needs_no_offsets() -> None:
    layer = make_layer()
    table, call = layer.table(), call_on(layer, [3] * 5)
    expected, out = by_list(layer, call), nonsense(5)
    rows, grid = call.rows, GRID
    experts, weights = call.experts.reshape(5, 3), call.weights.reshape(5, 3)
    bad = table.sums(
        rows.scheme, rows.dim, rows.values, rows.scales, None, experts, weights, grid, out
    )
    assert bad == [] and np.array_equal(out, expected)
    with pytest.raises(ValueError, match="as many for each row"):
        table.sums(
            rows.scheme, rows.dim, rows.values, rows.scales, None, experts[:4], weights, grid, out
        )


def test_rows_that_are_not_finite_are_named_and_the_others_are_right() -> None:
    layer = make_layer()
    call = call_on(layer, [2, 3, 1, 4])
    expected = by_list(layer, call)
    call.weights[call.row_offsets[1]] = np.nan
    call.weights[call.row_offsets[4] - 1] = 3e38
    out = nonsense(4)
    assert by_table(layer.table(), call, out) == [1, 3]
    assert np.array_equal(out[[0, 2]], expected[[0, 2]])


def test_what_is_not_for_a_table_is_left_to_others() -> None:
    layer = make_layer()
    table = layer.table()
    right = call_on(layer, [1])

    def other(experts: list[int], scheme: Scheme = Scheme.INT8_32, dim: int = DIM) -> ExpertCall:
        rows = ops.quantise_rows(scheme, random_rows(1, dim, 1))
        ends, count = np.array([0, len(experts)], np.int32), len(experts)
        return ExpertCall(0, rows, ends, np.array(experts, np.int32), np.ones(count, np.float32))

    out = nonsense(1)
    for experts in ([3], [6], [8], [-1], [0, 3], [2**31 - 1], [-(2**31)]):
        assert by_table(table, other(experts), out) is None, experts
    assert by_table(table, other([0], Scheme.INT8_256), out) is None
    assert by_table(table, other([0], Scheme.F32), out) is None
    assert by_table(table, other([0], dim=64), out) is None
    assert table.withdraw(lambda: None)
    assert by_table(table, right, out) is None
    assert np.array_equal(out, nonsense(1)) and table.num_hits == 0


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    layer = make_layer()
    table = layer.table()
    call = call_on(layer, [2, 2])
    for offsets in ([0, 2], [0, 2, 5], [1, 2, 4], [0, 5, 4], [0, -1, 4]):
        ends = np.array(offsets, np.int32)
        bad = ExpertCall(0, call.rows, ends, call.experts, call.weights)
        with pytest.raises(ValueError, match="row_offsets"):
            by_table(table, bad, nonsense(2))
    short = ExpertCall(0, call.rows, call.row_offsets, call.experts, call.weights[:3])
    with pytest.raises(ValueError, match="weights"):
        by_table(table, short, nonsense(2))
    with pytest.raises(ValueError, match="rows of out"):
        by_table(table, call, nonsense(3))
    with pytest.raises(ValueError, match="grid"):
        by_table(table, call, nonsense(2), grid=101)
    with pytest.raises(ValueError, match="bytes of an expert"):
        ops.expert_table(layer.layout, {0: layer.weights[0][:-1]})
    assert table.withdraw(lambda: None)
    with pytest.raises(ValueError, match="withdrawn before"):
        table.withdraw(lambda: None)


def test_memory_may_be_overwritten_once_the_last_call_of_a_withdrawn_table_has_ended() -> None:
    """Three threads compute; as soon as nobody does any more, their weights become nonsense."""
    layer = make_layer()
    counts = [4] * 24
    calls = [call_on(layer, counts, seed) for seed in range(3)]
    expected = [by_list(layer, call) for call in calls]
    num_busy = 0
    for _ in range(60):
        copies = {number: ops.aligned_empty(w.size) for number, w in layer.weights.items()}
        for number, memory in copies.items():
            memory[:] = layer.weights[number]
        table = ops.expert_table(layer.layout, copies)
        began = threading.Barrier(4)
        ends: list[int] = []
        is_idle = threading.Event()

        def compute(
            thread: int, table: ops.ExpertTable = table, began: threading.Barrier = began
        ) -> int:
            out = nonsense(len(counts))
            began.wait()
            num_computed = 0
            while by_table(table, calls[thread], out) == []:
                assert np.array_equal(out, expected[thread])
                num_computed += 1
            return num_computed

        def on_idle(ends: list[int] = ends, is_idle: threading.Event = is_idle) -> None:
            ends.append(1)
            is_idle.set()

        with ThreadPoolExecutor(3) as threads:
            running = [threads.submit(compute, thread) for thread in range(3)]
            began.wait()
            while not table.num_hits:
                pass
            if table.withdraw(on_idle):
                is_idle.set()
            else:
                num_busy += 1
            assert is_idle.wait(30)
            for memory in copies.values():
                memory[:] = 0x5A
            assert sum(thread.result() for thread in running) > 0
        assert len(ends) <= 1
    assert num_busy > 0, "no call was ever under way"
