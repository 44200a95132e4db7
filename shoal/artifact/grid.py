"""The grid of a layer: how finely its experts' outputs are counted (exactness rule 5).

Rows of unit size, made from a hash, run through some of the layer's experts on our own kernels; the
median output then counts as 2^20 steps for float formats, 2^13 for quantised ones. The kernels
give the same bits on every CPU and the rest is integers, so g is the same wherever convert runs.
"""

import math

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.manifest import Weights
from shoal.limits import MAX_GRID, MIN_GRID

NUM_ROWS = 8
NUM_EXPERTS = 4  # of a layer, evenly spread
_TARGET_FLOAT, _TARGET_QUANTISED = 20, 13  # log2 of the median's steps


class GridProbe:
    """Collects the outputs of one layer's experts; `grid()` judges them."""

    def __init__(self, layer: int, weights: Weights, num_experts: int) -> None:
        count = min(NUM_EXPERTS, num_experts)
        self.experts = frozenset(i * num_experts // count for i in range(count))
        self._weights = weights
        self._layout = ops.ExpertLayout(weights.dim, weights.ffn_dim, weights.gate_up, weights.down)
        rows = unit_rows(layer, NUM_ROWS, weights.dim)
        self._rows = ops.quantise_rows(weights.scheme, rows)
        self._magnitudes: list[NDArray[np.uint32]] = []

    def add(self, packed: NDArray[np.uint8]) -> None:
        """Run the rows through one expert, [gate|up|down] in kernel layout."""
        outputs = ops.expert_ffn(self._layout, packed[: self._weights.num_bytes], self._rows)
        self._magnitudes.append(outputs.view(np.uint32).reshape(-1) & np.uint32(0x7FFFFFFF))

    def grid(self) -> int:
        """Return g such that the median |output| is in [2^target, 2^(target + 1)) steps of 2^-g."""
        magnitudes = np.sort(np.concatenate(self._magnitudes))  # as integers: the same order
        exponent = (int(magnitudes[len(magnitudes) // 2]) >> 23) - 127
        is_float = self._weights.gate_up.is_float and self._weights.down.is_float
        target = _TARGET_FLOAT if is_float else _TARGET_QUANTISED
        return max(MIN_GRID, min(MAX_GRID, target - exponent))


def unit_rows(layer: int, num_rows: int, dim: int) -> NDArray[np.float32]:
    """Return [num_rows, dim] float32 of unit root mean square, the same on every machine.

    Sums of four bytes of a hash: near enough to normal, and only integers until the last step.
    """
    seed = blake3(b"shoal grid probe, layer " + str(layer).encode())
    stream = np.frombuffer(seed.digest(length=num_rows * dim * 4), np.uint8)
    sums = stream.reshape(num_rows, dim, 4).sum(axis=2, dtype=np.int32) - np.int32(510)
    rows = np.empty((num_rows, dim), np.float32)
    for index, row in enumerate(sums):
        squares = sum(value * value for value in row.tolist())
        scale = 1.0 / math.sqrt(squares / dim) if squares else 0.0  # IEEE: exact to the last bit
        rows[index] = row.astype(np.float32) * np.float32(scale)
    return rows
