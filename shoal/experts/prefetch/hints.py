"""Hints: what a coordinator says that calls to come will need, and how far that is followed (core).

    hear      a hint came: these experts of a layer, best first
    admitted  those of the absent ones that can be read until the layer's call comes
    began     these are being read
    settle    the call has come: how long it took, how many of the experts it wanted, what to cancel

A hint is a guess whose probability is how often hints were right so far, and whose gap is how long
after the first hint about a layer its call came so far. Reads of all hints share one drive: each
one's room begins where those before it end.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from shoal.experts.prefetch.admission import IdleGap, admit
from shoal.limits import MAX_PREFETCH_STREAMS

FIRST_GAP_S = 0.01  # until a layer's first call has come: drafting one token takes about as long
_FIRST_PRECISION = 0.9  # a copy of the model in fewer bits chooses nine of ten experts the same
_STEP = 1 / 8  # of precision's running mean
_KIND = 0  # gaps of hints are of one kind


@dataclass(slots=True)
class _Hinted:
    first_s: float
    experts: set[int] = field(default_factory=set)
    issued: set[int] = field(default_factory=set)


class Hints:
    """What was hinted and not yet called, by stream and layer."""

    def __init__(self) -> None:
        self._streams: OrderedDict[int, dict[int, _Hinted]] = OrderedDict()
        self._gaps = IdleGap()
        self._free_s = 0.0  # when the reads that hints began are done
        self.precision = _FIRST_PRECISION

    def hear(self, stream: int, layer: int, experts: Iterable[int], now_s: float) -> None:
        """Note a hint, followed or not: its call is to say whether it was right."""
        layers = self._streams.setdefault(stream, {})
        self._streams.move_to_end(stream)
        if len(self._streams) > MAX_PREFETCH_STREAMS:
            self._streams.popitem(last=False)
        layers.setdefault(layer, _Hinted(now_s)).experts.update(experts)

    def admitted(
        self, stream: int, layer: int, absent: Iterable[int], read_s: float, now_s: float
    ) -> list[int]:
        """Return those of a heard hint's absent experts that are worth a read, in that order.

        Args:
            read_s: seconds that one expert's read takes at the disk's bandwidth, > 0.
        """
        call_s = self._streams[stream][layer].first_s + self._gaps.gap_s(layer, _KIND, FIRST_GAP_S)
        room_s = call_s - max(now_s, self._free_s)
        return admit(((expert, self.precision) for expert in absent), read_s, room_s)

    def began(
        self, stream: int, layer: int, experts: Collection[int], read_s: float, now_s: float
    ) -> None:
        """Learn that reads of a heard hint's experts were queued."""
        self._free_s = max(now_s, self._free_s) + len(experts) * read_s
        self._streams[stream][layer].issued.update(experts)

    def settle(
        self, stream: int, layer: int, wanted: Collection[int], now_s: float
    ) -> frozenset[int] | None:
        """Learn what a layer's call wants.

        Returns: what was begun and is not needed; None: nothing was hinted about this call.
        """
        hinted = self._streams.get(stream, {}).pop(layer, None)
        if hinted is None:
            return None
        self._gaps.observe(layer, _KIND, now_s - hinted.first_s)
        right = len(hinted.experts.intersection(wanted)) / max(1, len(hinted.experts))
        self.precision += _STEP * (right - self.precision)
        return frozenset(hinted.issued.difference(wanted))
