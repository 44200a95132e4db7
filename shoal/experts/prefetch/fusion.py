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
        self._first = np.array([0, *np.cumsum(num_bins[:-1])], np.int64)[:, None]
        self._weights = np.zeros(sum(num_bins))
        self._squares = np.full(sum(num_bins), 1e-6)
        centres = (np.arange(_Z_BINS) + 0.5) * _Z_WIDTH - _Z_BINS * _Z_WIDTH / 2
        self._calibration = Calibration(1 / (1 + np.exp(-centres)))

    def probabilities(self, features: I64) -> F64:
        """Return p [E] from the bins [features, E]."""
        return self._calibration.probability[self._z_bins(self._z(features + self._first))]

    def update(self, features: I64, truth: Truth) -> None:
        """Learn which experts the call wanted [E], of which `features` spoke."""
        bins = features + self._first
        z = self._z(bins)
        residual = truth - 1 / (1 + np.exp(-z))
        residuals = np.broadcast_to(residual, bins.shape).reshape(-1)
        gradient = np.bincount(bins.reshape(-1), residuals, self._weights.size)
        self._squares *= _FORGET
        self._squares += gradient * gradient
        self._weights += _STEP * gradient / self._squares**0.5
        self._calibration.update(self._z_bins(z), truth)

    def _z(self, bins: I64) -> F64:
        z: F64 = self._weights[bins].sum(axis=0)
        return z + self._bias

    def _z_bins(self, z: F64) -> I64:
        bins = (z * (1 / _Z_WIDTH) + _Z_BINS / 2).astype(np.int64)
        return np.minimum(np.maximum(bins, 0), _Z_BINS - 1)
