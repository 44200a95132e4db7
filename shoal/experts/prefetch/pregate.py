"""Pre-gating: the next layer's router on the rows that just came, before their call is computed.

The matrix is router(t) · diag(norm(t) / norm(l)) (docs/formats/artifact.md): what the next router
would say if this layer's experts and the next attention added nothing to the residual. The rows
are multiplied as they came, in their own scheme. This only steers reads: never a token.
"""

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.experts.prefetch.guesser import PREGATE_BINS
from shoal.ops.guesses import gate_bins
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
        self._num_experts = matrix.rows // parts
        self._num_chosen = min(experts_per_token, self._num_experts - 1)

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
        not; the unit is the scores' mean distance from there. Rows may hold anything: the call
        itself is refused later.
        """
        scores = ops.matmul(self._matrix, rows)
        bins = np.empty((1, self._num_experts), np.int64)
        chosen, parts = self._num_chosen, self._parts
        gate_bins(scores, parts, chosen, PREGATE_BINS, _BINS_A_SPREAD, bins[0])
        return bins
