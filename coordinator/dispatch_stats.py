"""What the figures line says of dispatch: latencies of the last fan-outs, bytes on the wire."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.transport import Wire

MAX_SAMPLES = 8192  # fan-outs: over 100 tokens of a 60-layer model


@dataclass(frozen=True, slots=True)
class DispatchSummary:
    """Figures since the last reset; the percentiles are of the last MAX_SAMPLES fan-outs.

    A fan-out is one layer of one forward pass. `latency`: from handing its rows over to having
    their sums. `beyond_compute`: what is left of that after its slowest compute.
    bytes_up, bytes_down: of messages to and from nodes. wire: the form of the replies.
    load_s: waited for experts to be read, all fan-outs together, where no node has any.
    """

    num_fanouts: int
    latency_p50_s: float
    latency_p99_s: float
    beyond_compute_p50_s: float
    beyond_compute_p99_s: float
    bytes_up: int
    bytes_down: int
    load_s: float = 0.0
    wire: Wire = Wire.EXACT


class DispatchStats:
    """Written by the forward thread alone, one `record` a fan-out. wire: see the summary."""

    def __init__(self, wire: Wire = Wire.EXACT) -> None:
        self._wire = wire
        self.reset()

    def reset(self) -> None:
        self._latency_s: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._beyond_compute_s: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._num_fanouts = self._bytes_up = self._bytes_down = 0
        self._load_s = 0.0

    def record(
        self,
        latency_s: float,
        compute_s: float,
        bytes_up: int,
        bytes_down: int,
        load_s: float = 0.0,
    ) -> None:
        """Count one fan-out. compute_s: of the slowest of its owners."""
        self._latency_s.append(latency_s)
        self._beyond_compute_s.append(max(0.0, latency_s - compute_s))
        self._num_fanouts += 1
        self._bytes_up += bytes_up
        self._bytes_down += bytes_down
        self._load_s += load_s

    def summary(self) -> DispatchSummary:
        return DispatchSummary(
            num_fanouts=self._num_fanouts,
            latency_p50_s=percentile(self._latency_s, 50),
            latency_p99_s=percentile(self._latency_s, 99),
            beyond_compute_p50_s=percentile(self._beyond_compute_s, 50),
            beyond_compute_p99_s=percentile(self._beyond_compute_s, 99),
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            load_s=self._load_s,
            wire=self._wire,
        )


def percentile(samples: Iterable[float], percent: int) -> float:
    """Return the smallest sample that `percent` % are not above; 0.0 without samples."""
    ordered = sorted(samples)
    if not ordered:
        return 0.0
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
