"""Decoder layers in a row with their routed experts, where all of these are in memory: one call.

The bits of `RoutedLayer.run` and `ExpertTable.sums` one after the other, without Python between
them. Shape letters: T rows, D model dim, A experts a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shoal import _kernels
from shoal.errors import NumericError
from shoal.ops.combine import Sums
from shoal.ops.floats import F32, I32, KvArray
from shoal.ops.layers import Branch, Places, RoutedLayer, numeric_error, split_branch


class ResidentExperts(NamedTuple):
    """All experts of a layer; grid: g of their sums, which are integers times 2^-g."""

    table: _kernels.ExpertTable
    grid: int


class RanLayers(NamedTuple):
    """What came of a run.

    residual, sums: after the last layer that was done, [T, D] each; the sums are still to be added.
    experts: [T, A] of each layer that was done, and how long they took, in seconds.
    stopped: why the next layer stopped, its rows those of the run; None: all were done, or the next
    one's table was withdrawn. Then nothing of that layer was done.
    """

    residual: F32
    sums: Sums
    experts: list[I32]
    expert_seconds: list[float]
    stopped: NumericError | None


def run_layers(
    layers: Sequence[RoutedLayer],
    experts: Sequence[ResidentExperts],
    hidden: F32,
    branch: Branch | None,
    places: Places,
    caches: Sequence[tuple[KvArray, KvArray]],
) -> RanLayers | None:
    """Run layers as far as their experts are there; None: not one, and nothing is written.

    Args:
        experts, caches: of each layer. hidden, branch, places: see `RoutedLayer.run`.
    """
    num_rows = places.num_rows
    residual = np.empty_like(hidden)
    sums = np.empty(hidden.shape, np.int64)
    seconds = np.empty(len(layers), np.float64)
    sizes = [layer.experts_per_row for layer in layers]
    chosen = np.empty(num_rows * sum(sizes), np.int32)
    num_done, stopped = _kernels.run_layers(
        [layer.native for layer in layers],
        [each.table for each in experts],
        [layer.num_experts for layer in layers],
        [each.grid for each in experts],
        hidden,
        *split_branch(branch),
        places.native,
        caches,
        residual,
        sums,
        chosen,
        seconds,
    )
    error = None if stopped is None else numeric_error(*stopped, caches[num_done])
    if num_done == 0 and error is None:
        return None
    visited = _by_layer(chosen, sizes[:num_done], num_rows)
    grid = experts[max(0, num_done - 1)].grid
    return RanLayers(residual, Sums(sums, grid), visited, seconds[:num_done].tolist(), error)


def _by_layer(chosen: I32, sizes: list[int], num_rows: int) -> list[I32]:
    if len(set(sizes)) == 1:  # at one stroke: this is Python after every token, its code evicted
        return list(chosen[: num_rows * sum(sizes)].reshape(len(sizes), num_rows, sizes[0]))
    visited, first = [], 0
    for size in sizes:
        visited.append(chosen[first : first + num_rows * size].reshape(num_rows, size))
        first += num_rows * size
    return visited
