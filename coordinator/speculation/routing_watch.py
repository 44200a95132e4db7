"""RoutingWatch: how far a draft's routing is from the verified one, and what that allows (core).

A drafter that runs the model itself with coarser experts routes its rows as the target does, until
its hidden rows drift. Rows whose tokens were accepted had the same input in both: where their
experts differ, what follows is guesswork. While the share of differing experts is above the
threshold, every verified pass halves the length that may be drafted, down to one token, which goes
on being measured; below it, every pass doubles it again.
"""

from collections.abc import Sequence

Routing = tuple[frozenset[int], ...]  # of one row: per layer that chooses, the experts it visits

SMOOTHING_ROWS = 16.0  # rows that the share remembers: one or two drafts


class RoutingWatch:
    """Watches one drafter."""

    def __init__(self, threshold: float, max_draft: int) -> None:
        """Args: threshold: of the share, above 0; max_draft: tokens, the limit of the limit."""
        assert threshold > 0, threshold
        assert max_draft > 0, max_draft
        self._threshold = threshold
        self._max_draft = max_draft
        self._limit = max_draft
        self._share = 0.0

    @property
    def limit(self) -> int:
        """How many tokens may be drafted at most, at least 1."""
        return self._limit

    @property
    def share(self) -> float:
        """The share of a row's experts that the drafter chose otherwise, lately; 0 if unknown."""
        return self._share

    def observe(self, drafted: Sequence[Routing], verified: Sequence[Routing]) -> None:
        """Compare the routing of rows that had the same tokens, row by row.

        Rows of a model in which no layer chooses are no evidence and change nothing.
        """
        shares = [share for pair in zip(drafted, verified, strict=True) for share in _share(*pair)]
        if not shares:
            return
        remembered = max(0.0, 1.0 - len(drafted) / SMOOTHING_ROWS)
        mean = sum(shares) / len(shares)
        self._share = remembered * self._share + (1.0 - remembered) * mean
        if self._share > self._threshold:
            self._limit = max(1, self._limit // 2)
        else:
            self._limit = min(self._max_draft, 2 * self._limit)


def _share(drafted: Routing, verified: Routing) -> list[float]:
    """Return per layer the share of the verified experts that were not drafted."""
    return [len(right - ours) / len(right) for ours, right in zip(drafted, verified, strict=True)]
