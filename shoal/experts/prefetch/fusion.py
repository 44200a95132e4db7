"""Fusion: several predictors' features make one calibrated probability an expert (core).

An additive logistic model over bins, trained one call at a time:

    z(f) = bias + sum over features i of weight_i[bin_i(f)],    p(f) = calibration(bin of z(f))

so what a feature's bin is worth is learned, never assumed, and two predictors that say the same
are not counted twice. The calibration behind it keeps p honest while the weights still move.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.experts.prefetch.calibration import Calibration, Truth
from shoal.ops.guesses import learn_experts, rank_experts

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

_Z_BINS, _Z_WIDTH = 40, 0.4  # z from -8 to 8
_STEP = 0.5  # AdaGrad's: divided by the root of what a weight's squared gradients sum to
_FORGET = 0.999  # of those squares, a call: weights stay able to move


class Fusion:
    """One layer's model. `num_bins`: of each feature. `rate`: the share of experts used a call."""

    def __init__(self, num_bins: Sequence[int], rate: float) -> None:
        self.num_features = len(num_bins)
        rate = min(max(rate, 0.001), 0.999)
        self._bias = float(np.log(rate / (1 - rate)))
        self._first = np.array([0, *np.cumsum(num_bins[:-1])], np.int64)
        self._weights = np.zeros(sum(num_bins))
        self._squares = np.full(sum(num_bins), 1e-6)
        centres = (np.arange(_Z_BINS) + 0.5) * _Z_WIDTH - _Z_BINS * _Z_WIDTH / 2
        self._calibration = Calibration(1 / (1 + np.exp(-centres)))

    def rank(self, features: I64, owned: I64) -> tuple[I64, F64]:
        """Return `owned` by falling probability, equals in their order; their probabilities.

        Args:
            features: bins [features, E]. owned: ascending.
        """
        ranked, chances = np.empty_like(owned), np.empty(owned.size)
        probability = self._calibration.probability
        rank_experts(
            *(self._first, self._weights, self._bias, _Z_WIDTH, probability),
            *(features, owned, ranked, chances),
        )
        return ranked, chances

    def update(self, features: I64, truth: Truth) -> None:
        """Learn which experts the call wanted [E], of which `features` spoke."""
        z_bins = np.empty(truth.size, np.int64)
        learn_experts(
            *(self._first, self._weights, self._squares, self._bias, _Z_WIDTH, _Z_BINS),
            *(features, truth, _STEP, _FORGET, z_bins),
        )
        self._calibration.update(z_bins, truth)
