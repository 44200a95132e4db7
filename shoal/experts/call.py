"""ExpertCall: one layer's rows for one owner of experts, and who computes what on them (core)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.rows import Rows


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """T rows of one layer, each with the experts it visits here.

    layer: layer index.
    rows: T activation rows, quantised once by the coordinator; the node computes on these bytes.
    row_offsets: [T + 1] int32, ascending from 0 to P; the pairs of row t are
        [row_offsets[t], row_offsets[t + 1]); every row has at least one pair.
    experts: [P] int32, the expert of each pair; distinct within a row.
    weights: [P] float32, its routing weight.
    """

    layer: int
    rows: Rows
    row_offsets: NDArray[np.int32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
