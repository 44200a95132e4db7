"""Pre-gating: the next layer's router on the rows that just came, before their call is computed.

The matrix is router(t) · diag(norm(t) / norm(l)) (docs/formats/artifact.md): what the next router
would say if this layer's experts and the next attention added nothing to the residual. The rows
are multiplied as they came, in their own scheme. This only steers reads: never a token.
"""

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.experts.prefetch.guesser import PREGATE_BINS
from shoal.rows import Rows

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

_BINS_A_SPREAD = 7.0  # bins for each mean distance of a row's scores from the middle


class Pregate:
    """Scores one layer's experts from the rows of the layer before it."""

    def __init__(self, matrix: ops.Matrix, parts: int, experts_per_token: int) -> None:
        """`matrix`: [parts * E, D], a score is the sum over parts."""
        self._matrix = matrix
        self._parts = parts
        self._num_chosen = min(experts_per_token, matrix.rows // parts - 1)

    def scores(self, rows: Rows) -> F32:
        """Return [T, E]."""
        parts = ops.matmul(self._matrix, rows).reshape(rows.num_rows, self._parts, -1)
        if self._parts == 1:
            return parts[:, 0]
        total: F32 = parts.sum(axis=1)
        return total

    def features(self, rows: Rows) -> I64:
        """Return the bins [1, E]: how far an expert is inside some row's choice, or outside all.

        Zero lies half way between the last expert that would be chosen and the first that would
        not; the unit is the scores' mean distance from there.
        """
        with np.errstate(all="ignore"):  # rows may hold anything: the call itself is refused later
            scores = self.scores(rows)
            num_experts = scores.shape[1]
            kth = (num_experts - self._num_chosen - 1, num_experts - self._num_chosen)
            if rows.num_rows == 1:  # decode: numbers in place of arrays of one
                places = _places_of_row(scores[0], kth)
            else:
                places = _places(scores, kth).max(axis=0)
            bins = (places + np.float32(PREGATE_BINS // 2)).astype(np.int64)
        bins = np.minimum(np.maximum(bins, 0), PREGATE_BINS - 1)
        return bins[None]


def _places_of_row(scores: F32, kth: tuple[int, int]) -> F32:
    parted = np.partition(scores, kth)
    above = scores - (parted[kth[0]] + parted[kth[1]]) / 2
    distance = float(np.abs(above).sum()) / scores.size
    places: F32 = above * np.float32(_BINS_A_SPREAD / max(distance, 1e-20))
    return places


def _places(scores: F32, kth: tuple[int, int]) -> F32:
    parted = np.partition(scores, kth, axis=1)
    above = scores - (parted[:, kth[0], None] + parted[:, kth[1], None]) / 2
    distance = np.abs(above).sum(axis=1, keepdims=True) / scores.shape[1]
    places: F32 = above * (np.float32(_BINS_A_SPREAD) / (distance + np.float32(1e-20)))
    return places
