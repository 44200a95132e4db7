"""Locality window: which experts a stream's last calls used in a layer (core).

Two features per expert of the layer:

    recent   the pattern of its uses in the last four calls, newest first: 4 bits, 16 bins
    lately   a decayed count over some thirty calls, in 12 bins

Text repeats itself: on real text an expert of the last token is wanted again several times as
often as a random one, and a topic keeps its experts for a while. What each pattern is worth is not
assumed here; the fusion learns it.
"""

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

RECENT_BINS = 16  # patterns of four calls
LATELY_BINS = 12
_DECAY = 31 / 32  # of `lately`, a call: a window of about 32 calls
_SCALE = 2.0 * LATELY_BINS  # used in half of the window's calls, or more: the top bin


class LocalityWindow:
    """One stream's recent uses of one layer's experts."""

    def __init__(self, num_experts: int) -> None:
        self._recent = np.zeros(num_experts, np.int64)
        self._lately = np.zeros(num_experts)

    def observe(self, experts: I64) -> None:
        """Learn which distinct experts a call used."""
        self._recent >>= 1
        self._recent[experts] |= RECENT_BINS >> 1
        self._lately *= _DECAY
        self._lately[experts] += 1 - _DECAY

    def features(self) -> I64:
        """Return the bins [2, E] of `recent` and of `lately`."""
        lately = np.minimum((self._lately * _SCALE).astype(np.int64), LATELY_BINS - 1)
        return np.stack([self._recent, lately])
