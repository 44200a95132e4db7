"""Rows: activation rows in the form that matrix products take and the wire carries (core)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.quant import Scheme, round_up

_FLOAT32, _INT8 = np.dtype(np.float32), np.dtype(np.int8)


@dataclass(frozen=True, slots=True)
class Rows:
    """T activation rows of `dim` columns under one scheme.

    values: Scheme.F32: [T, dim] float32. Otherwise: [T, P] int8 in [-127, 127], P = dim padded
        with zeros to a multiple of the scheme's span.
    scales: Scheme.F32: [T, 0] float32. Otherwise: [T, P // span] float32, >= 0.
    Both C-contiguous.
    """

    scheme: Scheme
    dim: int
    values: NDArray[np.float32] | NDArray[np.int8]
    scales: NDArray[np.float32]

    def __post_init__(self) -> None:
        # Written for speed: a decode step makes some hundred of these.
        span, num_rows = self.scheme.span, self.values.shape[0]
        padded = -(-self.dim // span) * span
        is_float = span == 1
        dtype = self.values.dtype
        assert dtype == (_FLOAT32 if is_float else _INT8), dtype
        assert self.values.shape == (num_rows, padded), (self.values.shape, padded)
        assert self.scales.shape == (num_rows, 0 if is_float else padded // span), self.scales.shape

    @property
    def num_rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def padded_dim(self) -> int:
        return round_up(self.dim, self.scheme.span)

    def take(self, index: NDArray[np.intp]) -> "Rows":
        """Return the rows at `index`, copied."""
        return Rows(self.scheme, self.dim, self.values[index], self.scales[index])
