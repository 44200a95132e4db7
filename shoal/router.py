"""What a router decided: the experts of each token and their weights (core)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Experts of T tokens, A each, in descending order of the family's value, ties by index.

    experts: [T, A] int32, distinct within a row.
    weights: [T, A] float32; these bits travel to the nodes unchanged.
    """

    experts: NDArray[np.int32]
    weights: NDArray[np.float32]

    def __post_init__(self) -> None:
        assert self.experts.shape == self.weights.shape, (self.experts.shape, self.weights.shape)
        assert self.experts.dtype == np.int32 and self.weights.dtype == np.float32
