"""Second-order Markov chain over expert sets: which experts follow the last two layers' (core).

For expert sets S1 (the layer before) and S2 (the one before that), and an expert f, two scores:

    log pi(f) + sum over a in S1 of log(P1(f|a) / pi(f))
    log pi(f) + sum over b in S2 of log(P2(f|b) / pi(f))

P1 and P2 are decayed counts of "a was used, then f", one and two layers apart; pi(f) is how often
f is used at all. Unseen pairs fall back to pi(f), the layer's own frequencies, never to a uniform
prior over ids: that would drown what was seen (p ~ 1/E). The sum over members stands in for counts
of whole sets, of which no two are alike; the fusion weighs the two. Two tables of pairs, not one of
triples: E^2 counts, not E^3. Source: mixture transition distributions, Raftery 1985; products in
place of the mixture, as they rank better on recorded routing (docs/prefetch.md).
"""

import numpy as np
from numpy.typing import NDArray

from shoal.ops.guesses import chain_bins, chain_learn

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

BINS = 20
_PRIOR = 4.0  # uses of the layer's own frequencies that each row of counts begins with
_HALF_LIFE_CALLS = 4096  # of a count: a text's topic passes, the model's habits stay
_DECAY = 0.5 ** (1 / _HALF_LIFE_CALLS)
_TAUGHT_CALLS = 64  # so many refresh what they teach at once
_REFRESH_CALLS = 4  # afterwards: logarithms cost more than all else here
_RESCALE_AT = 2.0**20  # newer calls weigh more; before float32 loses units, all is scaled down


class SetMarkov:
    """What follows what, for the experts of one layer.

    Args:
        num_experts: of this layer; num_before: of the layers one and two before it.
    """

    def __init__(self, num_experts: int, num_before: tuple[int, int]) -> None:
        self._pairs = [np.zeros((count, num_experts), np.float32) for count in num_before]
        self._uses = [np.zeros(count, np.float32) for count in num_before]
        self._own = np.zeros(num_experts, np.float32)
        self._num_calls = 0
        self._calls = 0.0
        self._weight = 1.0  # of the newest call: grows by 1 / _DECAY instead of decaying all counts
        # What scores are made of, refreshed now and then: log(P(f|a) / pi(f)), and log pi(f).
        self._ratios = [np.zeros_like(pairs) for pairs in self._pairs]
        self._share = np.full(num_experts, 0.01, np.float32)
        self._frequency = np.zeros(num_experts, np.float32)

    def observe(self, before: tuple[I64, I64], experts: I64) -> None:
        """Learn that `experts` followed the sets `before` (one layer before, two before)."""
        self._weight /= _DECAY
        if self._weight > _RESCALE_AT:
            self._rescale()
        weight = np.float32(self._weight)
        self._own[experts] += weight
        self._calls += self._weight
        self._num_calls += 1
        refreshes = self._num_calls <= _TAUGHT_CALLS or self._num_calls % _REFRESH_CALLS == 0
        if refreshes:
            each = (self._own + np.float32(0.01)) / np.float32(max(self._calls, 1.0) + 1.0)
            self._share, self._frequency = each, np.log(each)
        prior = _PRIOR * self._weight
        for pairs, uses, earlier, ratios in zip(
            self._pairs, self._uses, before, self._ratios, strict=True
        ):
            chain_learn(
                *(pairs, uses, earlier, experts, self._share),
                *(self._weight, prior, refreshes, ratios),
            )

    def scores(self, before: tuple[I64, I64]) -> F32:
        """Return both log scores [2, E]; experts that were never used score lowest."""
        one, two = (
            ratios[earlier].sum(axis=0)
            for ratios, earlier in zip(self._ratios, before, strict=True)
        )
        return np.stack([one, two]) + self._frequency

    def features(self, before: tuple[I64, I64], out: I64 | None = None) -> I64:
        """Return the bins [2, E] of the scores (in `out`), a bin for each half of a factor e."""
        bins = np.empty((2, self._own.size), np.int64) if out is None else out
        for ratios, earlier, out in zip(self._ratios, before, bins, strict=True):
            chain_bins(ratios, earlier, self._frequency, BINS, out)
        return bins

    def _rescale(self) -> None:
        factor = np.float32(1 / self._weight)
        for array in (*self._pairs, *self._uses, self._own):
            array *= factor
        self._calls /= self._weight
        self._weight = 1.0
