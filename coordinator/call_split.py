"""One layer's routed rows, cut into expert calls by owner and by size (core).

Per slot (the replicas that own some experts) a row is sent once, with all of its experts there. The
calls of a slot cover its rows in ascending order; how they are cut cannot change a bit of the
result, only its speed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal import limits
from shoal.experts.call import ExpertCall
from shoal.ops import fanout
from shoal.quant import round_up
from shoal.router import RoutingPlan
from shoal.rows import Rows


def _constant(values: tuple[int, ...]) -> NDArray[np.int32]:
    array = np.array(values, np.int32)
    array.flags.writeable = False
    return array


FIRST_ROW = _constant((0,))
_OFFSETS = [_constant((0, num_pairs)) for num_pairs in range(limits.MAX_EXPERTS_PER_TOKEN + 1)]


@dataclass(slots=True)  # not frozen, which costs a microsecond a part
class Part:
    """Rows of one layer for one slot.

    slot: index into the placement's slots.
    rows: [T] int32, ascending, distinct: which of the layer's rows these are.
    row_offsets, experts, weights: as in shoal.experts.call.ExpertCall.
    """

    slot: int
    rows: NDArray[np.int32]
    row_offsets: NDArray[np.int32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]

    @property
    def num_rows(self) -> int:
        return int(self.rows.size)

    def call(self, layer: int, rows: Rows) -> ExpertCall:
        """Return what it asks of that layer, whose rows are given whole."""
        own = rows if self.num_rows == rows.num_rows else rows.take(self.rows.astype(np.intp))
        return ExpertCall(layer, own, self.row_offsets, self.experts, self.weights)

    def cut(self, first: int, last: int) -> "Part":
        """Return the rows first..last-1 of this part as a part of its own."""
        begin, end = int(self.row_offsets[first]), int(self.row_offsets[last])
        return Part(
            self.slot,
            self.rows[first:last],
            self.row_offsets[first : last + 1] - self.row_offsets[first],
            self.experts[begin:end],
            self.weights[begin:end],
        )


def by_owner(plan: RoutingPlan, owners: NDArray[np.int32]) -> list[Part]:
    """Split a plan into one part per slot that owns any of its experts.

    Of a single row, the part with the most experts comes first.

    Args:
        owners: [E] int32, from Placement.owners.
    """
    num_rows, per_row = plan.experts.shape
    if num_rows == 1:
        return parts_of_row(split_row(plan, owners))
    experts, weights = plan.experts.reshape(-1), plan.weights.reshape(-1)
    owner = owners[experts]
    first_owner = int(owner[0])
    if (owner == first_owner).all():
        return [_whole(plan, first_owner)]
    parts = []
    for slot in np.flatnonzero(np.bincount(owner)):
        pairs = np.flatnonzero(owner == slot)  # ascending: grouped by row
        counts = np.bincount(pairs // per_row, minlength=num_rows)
        rows = np.flatnonzero(counts)
        offsets = np.zeros(rows.size + 1, np.int32)
        np.cumsum(counts[rows], out=offsets[1:])
        parts.append(
            Part(int(slot), rows.astype(np.int32), offsets, experts[pairs], weights[pairs])
        )
    return parts


def parts_of_row(split: "RowSplit") -> list[Part]:
    """Return a split row as parts, one for each group."""
    return [
        Part(
            slot,
            FIRST_ROW,
            _OFFSETS[end - begin],
            split.experts[begin:end],
            split.weights[begin:end],
        )
        for slot, begin, end in split.groups
    ]


@dataclass(slots=True)
class RowSplit:
    """A single row's experts, grouped by slot.

    groups: (slot, begin, end), the one with the most experts first: it takes longest.
    experts: [K] int32, weights: [K] float32; group g has those from its begin to its end.
    """

    groups: list[tuple[int, int, int]]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]


def split_row(plan: RoutingPlan, owners: NDArray[np.int32]) -> RowSplit:
    """Split a plan of one row. Args: as `by_owner`."""
    per_row = plan.experts.shape[1]
    experts, weights = np.empty(per_row, np.int32), np.empty(per_row, np.float32)
    groups = fanout.split_row(plan.experts, plan.weights, owners, experts, weights)
    return RowSplit(groups, experts, weights)


def _whole(plan: RoutingPlan, slot: int) -> Part:
    num_rows, per_row = plan.experts.shape
    return Part(
        slot,
        np.arange(num_rows, dtype=np.int32),
        np.arange(0, num_rows * per_row + 1, per_row, dtype=np.int32),
        plan.experts.reshape(-1),
        plan.weights.reshape(-1),
    )


def by_size(part: Part, max_rows: int) -> list[Part]:
    """Cut a part into nearly equal calls of at most `max_rows` rows."""
    num_calls = -(-part.num_rows // max_rows)
    if num_calls == 1:
        return [part]
    step = min(max_rows, round_up(-(-part.num_rows // num_calls), 8))  # kernels like full tiles
    return [
        part.cut(first, min(first + step, part.num_rows)) for first in range(0, part.num_rows, step)
    ]
