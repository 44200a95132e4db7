"""Rows: activation rows in the form that matrix products take and the wire carries (core)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.quant import Scheme, round_up


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
        padded = self.padded_dim
        dtype = np.float32 if self.scheme is Scheme.F32 else np.int8
        num_scales = 0 if self.scheme is Scheme.F32 else padded // self.scheme.span
        assert self.values.shape == (self.num_rows, padded), (self.values.shape, padded)
        assert self.values.dtype == dtype, self.values.dtype
        assert self.scales.shape == (self.num_rows, num_scales), self.scales.shape

    @property
    def num_rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def padded_dim(self) -> int:
        return round_up(self.dim, self.scheme.span)

    def take(self, index: NDArray[np.intp]) -> "Rows":
        """Return the rows at `index`, copied."""
        return Rows(self.scheme, self.dim, self.values[index], self.scales[index])
