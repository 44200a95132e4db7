"""Admission: which guesses are worth a read (core).

The disk is idle from when a call has all its experts until the next layer's call arrives: the gap.
A guess with probability p, whose read would fit into what is left of the gap by a share `fits`:

    right:  the next call is spared  fits · read
    wrong:  it waits for             (1 - fits) · read   of the disk (a chunk at the device is not
            stopped), and the room was somebody's:  VICTIM_WORTH · read

    admitted while   p · fits  >  (1 - p) · ((1 - fits) + VICTIM_WORTH)

so a sure guess may overrun the gap, a doubtful one may not, and the budget in bytes is gap times
bandwidth. Whether a demand read is queued is the store's to know: it then begins nothing.
"""

from collections.abc import Iterable

# Hits that a wrong guess costs by the place it takes until it is evicted, as a slot less would: the
# slope of the hit rate over slots, times the calls that a slot is held. 0.5 at a quarter of the
# experts in memory (docs/prefetch.md). It asks for p above a third.
VICTIM_WORTH = 0.5
MAX_GAP_S = 0.25  # a gap to count on; beyond it a user is thinking, not a coordinator computing
_STEP = 1 / 8  # of the running means


def min_probability() -> float:
    """Return the least p that is ever admitted: where the read fits the gap whole."""
    return VICTIM_WORTH / (1 + VICTIM_WORTH)


def admit(candidates: Iterable[tuple[int, float]], read_s: float, gap_s: float) -> list[int]:
    """Return the experts to read ahead, in the order given.

    Args:
        candidates: absent experts and their probabilities, the most probable first.
        read_s: seconds that one expert's read takes at the disk's bandwidth, > 0.
        gap_s: seconds until the next call is expected.
    """
    admitted: list[int] = []
    for expert, probability in candidates:
        fits = min(1.0, max(0.0, gap_s / read_s - len(admitted)))
        if probability * fits <= (1 - probability) * ((1 - fits) + VICTIM_WORTH):
            break
        admitted.append(expert)
    return admitted


class IdleGap:
    """Running means of the gap before each layer's call, a kind of call apart."""

    def __init__(self) -> None:
        self._gaps: dict[tuple[int, int], float] = {}

    def observe(self, layer: int, kind: int, gap_s: float) -> None:
        """Learn how long the disk was idle before a call of `layer`."""
        gap_s = min(max(gap_s, 0.0), MAX_GAP_S)
        known = self._gaps.get((layer, kind), gap_s)
        self._gaps[layer, kind] = known + _STEP * (gap_s - known)

    def gap_s(self, layer: int, kind: int, otherwise_s: float = 0.0) -> float:
        """Return the expected gap; `otherwise_s` where none was seen."""
        return self._gaps.get((layer, kind), otherwise_s)
