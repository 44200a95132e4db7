"""How hard drives are read: temperature and latency to queue depth, with hysteresis (core).

Temperature, where there is a sensor. Up to the limit: full depth. Above it, linearly less, and a
smaller share of the best bandwidth seen; SPAN_C above the limit, or at the drive's own warning if
that comes first: one chunk at a time and demand only. What is felt rises with the reading at once
and falls only once the reading is HYSTERESIS_C below it, so that a reading that trembles changes
nothing.

Latency, with or without a sensor. The p99 of a sample is compared with what is normal; more bytes a
second than normal excuse as many times the latency: a longer queue alone is no complaint. Above
SLOW_FACTOR times for PATIENCE_S: one step down; below CALM_FACTOR times, or idle, for PATIENCE_S:
one step up; between: stay.

    steps   0: full --slow--> 1: no prefetch --slow--> 2: half the depth --slow--> 3: a quarter
                   <--calm--                <--calm--                   <--calm--

What stays slow for FORGET_S is the new normal: another workload, another drive.

    state   hot:  demand only, one at a time    warm: less depth and bandwidth
            slow: a step above 0                full: none of these
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

SPAN_C = 10.0  # from the first cut to the last: reference drives warn about that far above 70
HYSTERESIS_C = 3.0  # a drive cools and warms by about two degrees with each burst
HOT_SHARE = 0.25  # of the best bandwidth, once hot: an idle drive cools at any small share
MIN_ELAPSED_S = 1e-6  # between samples: over less, bytes a second may be infinite
SENSOR_HOLD_S = 10.0  # a reading that is missing for less is taken as the one before
SLOW_FACTOR, CALM_FACTOR = 3.0, 2.0
PATIENCE_S = 10.0
FORGET_S = 120.0
MIN_READS = 16  # in a sample: of fewer, a p99 says nothing
LEARNING_SAMPLES = 5
LEARNING_RATE = 0.1  # of a normal p99, per sample that is not slow
_MAX_STEP = 3


class PacingState(StrEnum):
    """What holds reads back; the metrics and the log carry these words."""

    FULL = "full"
    SLOW = "slow"
    WARM = "warm"
    HOT = "hot"


@dataclass(frozen=True, slots=True)
class PacingLimits:
    """thermal_limit_c: where throttling begins. max_bytes_per_s: None: no limit of its own."""

    thermal_limit_c: float
    max_queue_depth: int
    max_bytes_per_s: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen since the sample before.

    temperature_c, warning_c: of the hottest drive, and what it says is too hot; None: unknown.
    num_reads, num_bytes: chunks that completed. p99_s: of their latencies.
    """

    now_s: float
    temperature_c: float | None = None
    warning_c: float | None = None
    num_reads: int = 0
    num_bytes: int = 0
    p99_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """What holds from now on. `why` is for the log: empty while the state is full."""

    state: PacingState
    queue_depth: int
    bytes_per_s: int | None
    allows_prefetch: bool
    why: str = ""


@dataclass(slots=True)
class _Normal:
    p99_s: float
    bytes_per_s: float
    num_samples: int = 1

    def learn(self, p99_s: float, bytes_per_s: float) -> None:
        self.num_samples += 1
        self.p99_s += LEARNING_RATE * (p99_s - self.p99_s)
        self.bytes_per_s += LEARNING_RATE * (bytes_per_s - self.bytes_per_s)

    def excess(self, p99_s: float, bytes_per_s: float) -> float:
        """How many times the latency that these bytes a second excuse."""
        load = max(1.0, bytes_per_s / self.bytes_per_s)
        return p99_s / (self.p99_s * load)


class Pacer:
    """Turns samples into a pace. One for all drives of a store: the hottest rules."""

    def __init__(self, limits: PacingLimits) -> None:
        self.limits = limits
        self._felt_c: float | None = None
        self._felt_at_s = 0.0
        self._sampled_s: float | None = None
        self._best_bytes_per_s = 0.0
        self._normal: _Normal | None = None
        self._step = 0
        self._slow_since_s: float | None = None
        self._calm_since_s: float | None = None
        self._step_since_s = 0.0

    def configure(self, limits: PacingLimits) -> None:
        """Take other limits from the next sample on; what was learned stays."""
        self.limits = limits

    def on_sample(self, sample: Sample) -> Pace:
        """Return the pace after a sample. Samples come in order of time."""
        elapsed_s = 0.0 if self._sampled_s is None else sample.now_s - self._sampled_s
        self._sampled_s = sample.now_s
        if elapsed_s >= MIN_ELAPSED_S:
            bytes_per_s = sample.num_bytes / elapsed_s
            self._best_bytes_per_s = max(self._best_bytes_per_s, bytes_per_s)
            self._feel_latency(sample, bytes_per_s)
        self._feel_temperature(sample)
        return self._pace(self._heat(sample.warning_c))

    def _feel_temperature(self, sample: Sample) -> None:
        reading = sample.temperature_c
        if reading is None:
            if self._felt_c is not None and sample.now_s - self._felt_at_s > SENSOR_HOLD_S:
                self._felt_c = None
            return
        self._felt_at_s = sample.now_s
        felt = reading if self._felt_c is None else max(self._felt_c, reading)
        self._felt_c = min(felt, reading + HYSTERESIS_C)

    def _heat(self, warning_c: float | None) -> float:
        # 0: at most the limit; 1: as hot as a drive may be.
        if self._felt_c is None or self._felt_c <= self.limits.thermal_limit_c:
            return 0.0
        span = SPAN_C
        if warning_c is not None:
            span = min(span, max(warning_c - self.limits.thermal_limit_c, 0.0))
        above = self._felt_c - self.limits.thermal_limit_c
        return 1.0 if above >= span else above / span

    def _feel_latency(self, sample: Sample, bytes_per_s: float) -> None:
        now_s, normal = sample.now_s, self._normal
        tells = sample.num_reads >= MIN_READS and sample.p99_s > 0 and bytes_per_s > 0
        excess = 0.0  # idle is calm
        if tells and normal is not None and normal.num_samples >= LEARNING_SAMPLES:
            excess = normal.excess(sample.p99_s, bytes_per_s)
        is_slow, is_calm = excess > SLOW_FACTOR, excess <= CALM_FACTOR
        if tells and not is_slow and self._step == 0:
            self._learn(sample.p99_s, bytes_per_s)
        self._slow_since_s = _since(self._slow_since_s, now_s) if is_slow else None
        self._calm_since_s = _since(self._calm_since_s, now_s) if is_calm else None
        if self._step == _MAX_STEP and is_slow and now_s - self._step_since_s >= FORGET_S:
            self._normal = None
            self._go_to(0, now_s)
        elif self._slow_since_s is not None and now_s - self._slow_since_s >= PATIENCE_S:
            self._go_to(min(self._step + 1, _MAX_STEP), now_s)
        elif self._calm_since_s is not None and now_s - self._calm_since_s >= PATIENCE_S:
            self._go_to(max(self._step - 1, 0), now_s)

    def _go_to(self, step: int, now_s: float) -> None:
        if step != self._step:
            self._step, self._step_since_s = step, now_s
            self._slow_since_s = self._calm_since_s = None

    def _learn(self, p99_s: float, bytes_per_s: float) -> None:
        if self._normal is None:
            self._normal = _Normal(p99_s, bytes_per_s)
        else:
            self._normal.learn(p99_s, bytes_per_s)

    def _pace(self, heat: float) -> Pace:
        limits = self.limits
        depth = max(1, limits.max_queue_depth >> max(self._step - 1, 0))
        bandwidth: float | None = limits.max_bytes_per_s
        reasons: list[str] = []
        state = PacingState.FULL
        if self._step:
            state = PacingState.SLOW
            reasons.append(f"reads take over {SLOW_FACTOR:g} times as long as they did")
        if heat > 0:
            state = PacingState.HOT if heat >= 1 else PacingState.WARM
            depth = min(depth, max(1, int(limits.max_queue_depth * (1 - heat))))
            if self._best_bytes_per_s > 0:
                share = self._best_bytes_per_s * (1 - (1 - HOT_SHARE) * heat)
                bandwidth = share if bandwidth is None else min(share, bandwidth)
            reasons.append(f"{self._felt_c:.0f} C is above {limits.thermal_limit_c:g} C")
        return Pace(
            state=state,
            queue_depth=depth,
            bytes_per_s=None if bandwidth is None else max(1, int(bandwidth)),
            allows_prefetch=heat < 1 and self._step == 0,
            why=", ".join(reasons),
        )

    def check_integrity(self) -> None:
        """Assert what holds between samples."""
        assert 0 <= self._step <= _MAX_STEP
        assert self._slow_since_s is None or self._calm_since_s is None, "slow and calm at once"
        assert self._normal is None or self._normal.p99_s > 0 < self._normal.bytes_per_s


def _since(before_s: float | None, now_s: float) -> float:
    return now_s if before_s is None else before_s


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    """Return that quantile of a histogram, interpolated; 0.0 of an empty one.

    Args:
        bounds: upper bounds of all buckets but the last, ascending. counts: one more.
    """
    assert len(counts) == len(bounds) + 1, (len(counts), len(bounds))
    wanted = share * sum(counts)
    below, lower = 0, 0.0
    for upper, count in zip(bounds, counts, strict=False):
        if count and below + count >= wanted:
            return lower + (upper - lower) * (wanted - below) / count
        below, lower = below + count, upper
    return lower if below < sum(counts) else 0.0


assert 1 < CALM_FACTOR < SLOW_FACTOR
