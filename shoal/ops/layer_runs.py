"""Decoder layers in a row with their routed experts, in memory or on nodes: one call.

The bits of `RoutedLayer.run` and of the sums of its experts one after the other, without Python
between them. Shape letters: T rows, D model dim, A experts a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal import _kernels
from shoal.errors import NumericError
from shoal.ops.combine import I64, Sums
from shoal.ops.fanout import RowReport, RowWires
from shoal.ops.floats import F32, I32, KvArray
from shoal.ops.layers import Branch, Places, RoutedLayer, numeric_error, split_branch
from shoal.quant import round_up
from shoal.router import RoutingPlan
from shoal.rows import Rows

# Numbers of experts, grids; hidden, branch as floats, or as sums and their grid; places, caches;
# then what is written: residual, sums, experts visited, seconds.
_Shared = tuple[
    list[int],
    list[int],
    F32,
    F32 | None,
    I64 | None,
    int,
    _kernels.Places,
    Sequence[tuple[KvArray, KvArray]],
    F32,
    I64,
    I32,
    NDArray[np.float64],
]


class ResidentExperts(NamedTuple):
    """All experts of a layer; grid: g of their sums, which are integers times 2^-g."""

    table: _kernels.ExpertTable
    grid: int


class WiredExperts(NamedTuple):
    """A layer's experts on nodes.

    number: of the layer, as nodes know it. owners: [E], the slot of each of its experts.
    """

    number: int
    owners: I32
    grid: int


@dataclass(frozen=True, slots=True)
class WiredRun:
    """What every layer of a run over nodes asks alike: see `RowWires.run`.

    first_id: of the first layer's calls; each layer has `num_ids`.
    max_seconds: no layer begins later.
    """

    wires: RowWires
    first_id: int
    num_ids: int
    deadline_ms: int
    reply_format: int
    takes_bf16: bool
    patience_s: float
    max_seconds: float


class RanLayers(NamedTuple):
    """What came of a run.

    residual, sums: after the last layer that was done, [T, D] each; the sums are still to be added.
    experts: [T, A] of each layer that was done, and how long they took, in seconds.
    stopped: why the next layer stopped, its rows those of the run; None: all were done, or the next
    one's experts were not to be had. Then nothing of that layer was done.
    """

    residual: F32
    sums: Sums
    experts: list[I32]
    expert_seconds: list[float]
    stopped: NumericError | None


class OpenLayer(NamedTuple):
    """A layer whose fan-out did not go well: what its row asks. `ran.sums` has what was answered.

    rows: [1]; plan: of it.
    """

    rows: Rows
    plan: RoutingPlan


class WiredEnd(NamedTuple):
    """What came of a run over nodes.

    ran: of the layers that were done. Its residual and sums are those of `left`, if there is one.
    reports: of each fan-out, and when it was sent, in seconds since the run began.
    """

    ran: RanLayers
    reports: list[tuple[float, RowReport]]
    left: OpenLayer | None


@dataclass(slots=True)
class LayerRun:
    """Layers to run one after the other, as far as their experts are there.

    caches: of each layer. hidden, branch, places: see `RoutedLayer.run`.
    """

    layers: Sequence[RoutedLayer]
    hidden: F32
    branch: Branch | None
    places: Places
    caches: Sequence[tuple[KvArray, KvArray]]

    def in_memory(self, experts: Sequence[ResidentExperts]) -> RanLayers | None:
        """Run the first layers, with these experts; None: not one, and nothing is written."""
        made = _Made(self, [each.grid for each in experts])
        num_done, stopped = _kernels.run_layers(
            made.natives, [each.table for each in experts], *made.arguments()
        )
        error = None if stopped is None else numeric_error(*stopped, self.caches[num_done])
        if num_done == 0 and error is None:
            return None
        return made.ran(num_done, error)

    def on_nodes(
        self,
        experts: Sequence[WiredExperts],
        how: WiredRun,
        reports: list[tuple[float, RowReport]],
    ) -> WiredEnd:
        """Run the first layers of a single row, with these experts on nodes.

        Args: reports: appended to before any signal can be seen; the result has them, too.
        """
        made = _Made(self, [each.grid for each in experts])
        dim = self.hidden.shape[1]
        values = np.empty(max(4 * dim, round_up(dim, 256)), np.uint8)
        scales = np.empty(-(-dim // 32), np.float32)
        weights = np.empty(max(made.sizes), np.float32)
        num_done, stopped = _kernels.run_layers_on_nodes(
            made.natives,
            *made.arguments(),
            how.wires,
            [each.number for each in experts],
            [each.owners for each in experts],
            how.first_id,
            how.num_ids,
            how.deadline_ms,
            how.reply_format,
            how.takes_bf16,
            how.patience_s,
            how.max_seconds,
            values,
            scales,
            weights,
            reports,
        )
        error = None if stopped is None else numeric_error(*stopped, self.caches[num_done])
        left = None
        if len(reports) > num_done:
            layer = made.layers[num_done]
            first = sum(made.sizes[:num_done])
            chosen = made.chosen[first : first + layer.experts_per_row]
            plan = RoutingPlan(chosen[None], weights[None, : chosen.size])
            left = OpenLayer(layer.rows_of(dim, values, scales), plan)
        ran = made.ran(num_done, error)
        return WiredEnd(ran, reports, left)


class _Made:
    """The first layers of a run, one for each grid, and the arrays that they write to."""

    def __init__(self, run: LayerRun, grids: list[int]) -> None:
        num_layers = len(grids)
        self._run, self._grids = run, grids
        self.layers = run.layers[:num_layers]
        self.natives = [layer.native for layer in self.layers]
        self.sizes = [layer.experts_per_row for layer in self.layers]
        self.residual = np.empty_like(run.hidden)
        self.sums: I64 = np.empty(run.hidden.shape, np.int64)
        self.seconds = np.empty(num_layers, np.float64)
        self._num_rows = run.places.num_rows
        self.chosen = np.empty(self._num_rows * sum(self.sizes), np.int32)

    def arguments(self) -> _Shared:
        """Return what both native calls take, from the numbers of experts to the times."""
        run = self._run
        return (
            [layer.num_experts for layer in self.layers],
            self._grids,
            run.hidden,
            *split_branch(run.branch),
            run.places.native,
            run.caches[: len(self.layers)],
            self.residual,
            self.sums,
            self.chosen,
            self.seconds,
        )

    def ran(self, num_done: int, error: NumericError | None) -> RanLayers:
        visited = _by_layer(self.chosen, self.sizes[:num_done], self._num_rows)
        sums = Sums(self.sums, self._grids[max(0, num_done - 1)])
        return RanLayers(self.residual, sums, visited, self.seconds[:num_done].tolist(), error)


def _by_layer(chosen: I32, sizes: list[int], num_rows: int) -> list[I32]:
    if len(set(sizes)) == 1:  # at one stroke: this is Python after every token, its code evicted
        return list(chosen[: num_rows * sum(sizes)].reshape(len(sizes), num_rows, sizes[0]))
    visited, first = [], 0
    for size in sizes:
        visited.append(chosen[first : first + num_rows * size].reshape(num_rows, size))
        first += num_rows * size
    return visited
