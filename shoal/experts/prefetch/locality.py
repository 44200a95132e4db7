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

from shoal.ops.guesses import note_uses

I64 = NDArray[np.int64]

_RECENT_CALLS = 4
RECENT_BINS = 1 << _RECENT_CALLS  # patterns of four calls
LATELY_BINS = 12
_DECAY = 31 / 32  # of `lately`, a call: a window of about 32 calls
_SCALE = 2.0 * LATELY_BINS  # used in half of the window's calls, or more: the top bin


class LocalityWindow:
    """One stream's recent uses of one layer's experts."""

    def __init__(self, num_experts: int) -> None:
        self._bins = np.zeros((2, num_experts), np.int64)  # the first row is the patterns
        self._lately = np.zeros(num_experts)

    def observe(self, experts: I64) -> None:
        """Learn which distinct experts a call used."""
        shape = (_RECENT_CALLS, _DECAY, _SCALE, LATELY_BINS)
        note_uses(self._bins, self._lately, experts, *shape)

    def features(self) -> I64:
        """Return the bins [2, E] of `recent` and of `lately`; valid until the next `observe`."""
        return self._bins
