"""Calibration: from a score's bin to a probability, learned as calls come (core).

Decayed counts per bin, made monotone by pooling adjacent violators: a higher score never gets a
lower probability, and a bin seen rarely borrows from its neighbours.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
Truth = NDArray[np.bool_]

_REFRESH_CALLS = 16  # between two poolings: they cost tens of microseconds
_FORGET = 0.5 ** (1 / 2000)  # a call: evidence is half forgotten after 2000 calls of a layer


class Calibration:
    """Probabilities of `num_bins` ascending bins.

    Args:
        prior: what each bin is worth before anything was seen; weighs as much as one sample.
    """

    def __init__(self, prior: F64) -> None:
        self._prior = prior
        self._hits = np.zeros(prior.size)
        self._seen = np.zeros(prior.size)
        self._calls = 0
        self.probability = prior.copy()  # [num_bins]; replaced, never written to

    def update(self, bins: I64, truth: Truth) -> None:
        """Learn what the items in `bins` came to."""
        self._hits *= _FORGET
        self._seen *= _FORGET
        self._hits += np.bincount(bins[truth], minlength=self._hits.size)
        self._seen += np.bincount(bins, minlength=self._seen.size)
        self._calls += 1
        if self._calls % _REFRESH_CALLS == 0:
            self.probability = self._pooled()

    def _pooled(self) -> F64:
        hits = (self._hits + self._prior).tolist()
        seen = (self._seen + 1.0).tolist()
        return np.array(pool_adjacent(hits, seen))


def pool_adjacent(hits: Sequence[float], seen: Sequence[float]) -> list[float]:
    """Return the ascending rates that fit hits / seen best, weighted by seen (> 0).

    Source: pool adjacent violators, Ayer et al. 1955.
    """
    blocks: list[list[float]] = []  # hits, seen, bins
    for hit, count in zip(hits, seen, strict=True):
        blocks.append([hit, count, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [mine + theirs for mine, theirs in zip(blocks[-1], last, strict=True)]
    return [block[0] / block[1] for block in blocks for _ in range(int(block[2]))]
