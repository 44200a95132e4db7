"""Grouping pairs by expert, against a dictionary of lists."""

import numpy as np
import pytest

from shoal.experts.call import ExpertCall
from shoal.experts.grouping import group_pairs
from shoal.quant import Scheme
from shoal.rows import Rows


def random_call(rng: np.random.Generator, num_rows: int, num_experts: int, most: int) -> ExpertCall:
    counts = rng.integers(1, most + 1, num_rows)
    experts = [rng.permutation(num_experts)[:count] for count in counts]
    rows = Rows(
        Scheme.F32, 4, np.zeros((num_rows, 4), np.float32), np.zeros((num_rows, 0), np.float32)
    )
    return ExpertCall(
        layer=0,
        rows=rows,
        row_offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        experts=np.concatenate(experts).astype(np.int32),
        weights=rng.normal(size=int(counts.sum())).astype(np.float32),
    )


def pairs_by_expert(call: ExpertCall) -> dict[int, list[tuple[int, float]]]:
    groups: dict[int, list[tuple[int, float]]] = {}
    for row in range(call.rows.num_rows):
        for pair in range(call.row_offsets[row], call.row_offsets[row + 1]):
            groups.setdefault(int(call.experts[pair]), []).append((row, float(call.weights[pair])))
    return groups


@pytest.mark.parametrize("num_rows", [1, 2, 3, 17, 64])
def test_groups_hold_the_same_pairs_as_a_dictionary_of_lists(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    call = random_call(rng, num_rows, num_experts=16, most=8)
    grouped = group_pairs(call)
    assert sorted(grouped.experts) == sorted(set(call.experts.tolist()))
    found = {
        expert: list(
            zip(
                grouped.pair_rows[begin:end].tolist(),
                grouped.pair_weights[begin:end].tolist(),
                strict=True,
            )
        )
        for expert, begin, end in zip(
            grouped.experts, grouped.pair_offsets[:-1], grouped.pair_offsets[1:], strict=True
        )
    }
    assert found == pairs_by_expert(call)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_groups_have_the_types_that_the_kernels_take(num_rows: int) -> None:
    call = random_call(np.random.default_rng(0), num_rows, num_experts=8, most=4)
    grouped = group_pairs(call)
    for array, dtype in (
        (grouped.pair_offsets, np.int32),
        (grouped.pair_rows, np.int32),
        (grouped.pair_weights, np.float32),
    ):
        assert array.dtype == dtype
        assert array.flags.c_contiguous
    assert grouped.pair_offsets[-1] == call.experts.size
