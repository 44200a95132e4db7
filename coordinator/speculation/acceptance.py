"""Acceptance: what a drafter's chances are worth, learned from what was accepted (core).

    raw chance -> bin -> slow: decayed counts of the bin, ascending over bins
                      -> fast: odds times one factor, from what came lately beside what was expected

The counts learn the drafter's own optimism (a shadow at 0.9 may be right 0.6 of the time); the
factor learns, in some dozen tokens, that this text is easier or harder than most. Before anything
is seen a chance is worth what the drafter says.
"""

from bisect import bisect_right
from collections.abc import Sequence

from shoal.experts.prefetch.calibration import pool_adjacent

# Upper ends of the bins. Finer where drafts are long: sixteen at 0.99 are 0.85, at 0.98 0.72.
EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.985, 0.995, 1.0)
CENTRES = tuple((low + high) / 2 for low, high in zip((0.0, *EDGES), EDGES, strict=False))
PRIOR_SAMPLES = 6.0  # what a bin's own centre weighs: a handful of tokens outvote it
FORGET = 0.5 ** (1 / 512)  # a token: the counts are half forgotten after 512
REFRESH_EVERY = 16  # tokens: pooling takes some 60 us
LATELY = 1 - 1 / 24  # a token: the factor remembers about two dozen
LATE_PRIOR = 1.0  # token, right and wrong each, that came as expected: luck moves no odds far
MEAN_STEP = 0.08  # of the mean, a token
MAX_CHANCE = 0.998  # nothing is certain: a draft of 32 such tokens is wrong in one of sixteen


class Acceptance:
    """Calibrates the chances of one drafter."""

    def __init__(self) -> None:
        self._hits = [0.0] * len(EDGES)
        self._seen = [0.0] * len(EDGES)
        self._rates = list(CENTRES)
        self._num_learned = self._num_fresh = 0
        self._right = self._wrong = 0.0  # lately: what came,
        self._due_right = self._due_wrong = 0.0  # and what the counts had expected
        self._mean = 0.5

    @property
    def mean(self) -> float:
        """Return the chance of a guess whose raw chance is not known yet: the recent ones'."""
        return self._mean

    def chance(self, raw: float) -> float:
        """Return how likely a guess is accepted, if those before it are. Ascends with `raw`."""
        return self._moved(self._slow(raw))

    def observe(self, raw_chances: Sequence[float], num_accepted: int) -> None:
        """Learn of one draft.

        A guess that was not verified because no pass ran it may be told of too, once the token
        that really came is known: as a draft of one.

        Args:
            raw_chances: of the guesses that were compared, in order, as the drafter gave them.
            num_accepted: how many of them were accepted. Those after the first that was not say
                nothing: their context was wrong.
        """
        assert 0 <= num_accepted <= len(raw_chances), (num_accepted, len(raw_chances))
        for raw in raw_chances[:num_accepted]:
            self._learn(raw, 1.0)
        if num_accepted < len(raw_chances):
            self._learn(raw_chances[num_accepted], 0.0)
        if self._num_fresh >= min(REFRESH_EVERY, self._num_learned // 4):
            self._refresh()

    def _learn(self, raw: float, hit: float) -> None:
        expected = self._slow(raw)
        self._right = LATELY * self._right + hit
        self._wrong = LATELY * self._wrong + 1.0 - hit
        self._due_right = LATELY * self._due_right + expected
        self._due_wrong = LATELY * self._due_wrong + 1.0 - expected
        self._mean += MEAN_STEP * (hit - self._mean)
        self._num_learned += 1
        self._num_fresh += 1
        index = _bin(raw)
        self._hits[index] += hit
        self._seen[index] += 1.0

    def _refresh(self) -> None:
        kept = FORGET**self._num_fresh
        self._hits = [kept * hits for hits in self._hits]
        self._seen = [kept * seen for seen in self._seen]
        self._num_fresh = 0
        self._rates = pool_adjacent(
            [h + PRIOR_SAMPLES * c for h, c in zip(self._hits, CENTRES, strict=True)],
            [s + PRIOR_SAMPLES for s in self._seen],
        )

    def _slow(self, raw: float) -> float:
        """Interpolate between the bins' centres."""
        right = bisect_right(CENTRES, raw)
        if right == 0:
            return self._rates[0] * max(0.0, raw) / CENTRES[0]
        if right == len(CENTRES):
            return self._rates[-1]
        low, high = CENTRES[right - 1], CENTRES[right]
        part = (raw - low) / (high - low)
        return self._rates[right - 1] * (1.0 - part) + self._rates[right] * part

    def _moved(self, chance: float) -> float:
        right = chance * (self._right + LATE_PRIOR) / (self._due_right + LATE_PRIOR)
        wrong = (1.0 - chance) * (self._wrong + LATE_PRIOR) / (self._due_wrong + LATE_PRIOR)
        return min(MAX_CHANCE, right / (right + wrong))


def _bin(raw: float) -> int:
    return min(len(EDGES) - 1, bisect_right(EDGES, raw))
