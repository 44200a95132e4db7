"""Turns a call's pairs around: from the experts of each row to the rows of each expert (core).

Inputs are checked at the edges (`shoal/wire.py`, the dispatch); here they are trusted. Nothing is
computed in floating point: weights are moved, and the sums over pairs are integers, so the order
that this file gives the pairs never shows in a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from shoal.experts.call import ExpertCall


@dataclass(frozen=True, slots=True)
class GroupedPairs:
    """The P pairs of a call, grouped by expert.

    experts: the distinct experts; ascending, but those of a single row as its router has them.
    pair_offsets: [len(experts) + 1] int32; expert i has pairs [pair_offsets[i], pair_offsets[i+1]).
    pair_rows: [P] int32, the row of each pair, ascending within an expert.
    pair_weights: [P] float32, its routing weight.
    """

    experts: list[int]
    pair_offsets: NDArray[np.int32]
    pair_rows: NDArray[np.int32]
    pair_weights: NDArray[np.float32]

    def take(self, positions: Sequence[int]) -> "GroupedPairs":
        """Return the pairs of the experts at these positions, ascending."""
        if len(positions) == len(self.experts):
            return self
        starts = self.pair_offsets[:-1][positions]
        counts = self.pair_offsets[1:][positions] - starts
        offsets = np.zeros(len(positions) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        # Pair p of the result is the (p - offsets[i])-th of its expert i.
        pairs = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return GroupedPairs(
            [self.experts[position] for position in positions],
            offsets,
            self.pair_rows[pairs],
            self.pair_weights[pairs],
        )


def group_pairs(call: ExpertCall) -> GroupedPairs:
    """Return the call's pairs grouped by expert."""
    if call.row_offsets.size == 2:  # decode: a row's experts are distinct, each pair is a group
        offsets, rows = _one_row(call.experts.size)
        return GroupedPairs(call.experts.tolist(), offsets, rows, call.weights)
    order = np.argsort(call.experts, kind="stable")
    experts = call.experts[order]
    num_rows = call.row_offsets.size - 1
    row_of_pair = np.repeat(np.arange(num_rows, dtype=np.int32), np.diff(call.row_offsets))
    starts = np.flatnonzero(experts[1:] != experts[:-1]) + 1
    offsets = np.concatenate(([0], starts, [experts.size])).astype(np.int32)
    return GroupedPairs(
        experts[offsets[:-1]].tolist(), offsets, row_of_pair[order], call.weights[order]
    )


@cache
def _one_row(num_pairs: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the pair offsets and rows of one row with that many experts; to be read only."""
    arrays = np.arange(num_pairs + 1, dtype=np.int32), np.zeros(num_pairs, np.int32)
    for array in arrays:
        array.setflags(write=False)
    return arrays
