"""What the coordinator has learned of a node: how fast it is, and whether to trust it (core).

A model of latency = base + slope x work, fitted to its replies with slow forgetting, predicts a
call. How far replies lie above the prediction (a *residual* is latency / prediction) tells the
usual spread from trouble. What a call waits behind other calls of ours is no fault of the node: it
is expected (`wait_s`), and left out of the latency.

    ok --(2 stalls in 30 replies, and lately 3x as slow on average as the median node)--> demoted
    ok --(one stall of 32 times its prediction)--> resting, a quarter of a second
    ok --(5 failures in a row, or 3 missed deadlines in 10 s)--> broken off
    demoted, broken off --(a pause, twice as long each time)--> on probation --> ok

A *stall* is a slow reply, or several of calls that were in flight together: they had one cause. An
average, because it is time lost that counts: a busy machine holds up one call in twenty of a
healthy node tenfold, a throttled node all of them, or one in ten a hundredfold. A hedge that is
lost says the same thing by its late answer. One long stall is no verdict, healthy nodes have some;
but who has just had one is likelier than others to have the next, and a rest costs next to nothing.
Resting, demoted and broken off are ranks, not exclusions: the last replica is used whatever its
rank.
"""

from collections import deque

from coordinator.dispatch_events import Replied

MIN_SAMPLES = 32  # before that a prediction is a guess, and UNKNOWN_S is waited
EARLY_SAMPLES = 8  # from here on silence is judged, with more patience than later
UNKNOWN_S = 2.0  # for a node that is not known yet: a cold cache, a first hugepage
EARLY_SILENT_S, EARLY_FACTOR = 0.2, 8.0  # of the longest reply and of round trips so far
MAX_STRETCH = 4.0  # a call of more work than that times any before: nothing is known of such
FORGET = 0.98  # per reply: a fit over the last fifty
SILENT_S = 0.05  # two progress intervals
DEAD_S = 1.9  # of silence with a call in hand: noticed within 2 s
DEAD_ROUND_TRIPS, DEAD_FACTOR = 8.0, 4.0  # or these, of round trips and predictions
SLOW_LINK_BYTES_PER_S = 2.5e6  # a home's 20 Mbit/s: calls on their way there are no silence
MIN_HEDGE_S = 0.002  # below it a second copy costs more than it saves (a hop is 0.1 ms)
DEADLINE_FACTOR = 8.0  # beyond the usual slow reply
WAIT_FACTOR = 3.0  # what a call waits behind others may be so much longer than expected
SLOW_RESIDUAL = 3.0
MAX_RESIDUAL = 32.0  # of one reply in the average
LATE_SHARE, USUAL_SHARE = 1 / 16, 1 / 128  # of the latest reply in the averages
LEARN_SLOW_EVERY = 8  # a lasting change is learned, a fault of 8 replies is not
STALLS, STALL_REPLIES = 2, 30
PROBATION_RESIDUAL = 2.0  # the average that a demoted node comes back with
FAILURES_IN_A_ROW = 5
MISSES, MISSES_S = 3, 10.0
FIRST_DEMOTION_S, MAX_DEMOTION_S = 5.0, 60.0
REST_S = 0.25  # longer than CPU quotas' periods: what comes after it tells of the next one
FIRST_BREAK_S, MAX_BREAK_S = 1.0, 30.0
STALE_S = 10.0  # without a reply: what we know of it may be out of date


class LatencyModel:
    """latency = base + slope x work by least squares, forgetting; and the ratio that 5 % exceed."""

    __slots__ = (
        "_l",
        "_n",
        "_w",
        "_wl",
        "_ww",
        "base_s",
        "longest_s",
        "max_work",
        "num_samples",
        "slope_s",
        "tail",
    )

    def __init__(self) -> None:
        self.num_samples = 0
        self.max_work = self.longest_s = 0.0
        self.base_s = self.slope_s = 0.0
        self.tail = 2.0
        self._n = self._w = self._l = self._ww = self._wl = 0.0

    @property
    def is_known(self) -> bool:
        return self.num_samples >= MIN_SAMPLES

    def predict(self, work: float) -> float:
        """Return seconds; meaningless until `is_known`."""
        return self.base_s + self.slope_s * work

    def slow_s(self, work: float) -> float:
        """Return what about 5 % of such calls exceed."""
        return (self.base_s + self.slope_s * work) * self.tail

    def learn(self, work: float, latency_s: float, residual: float) -> None:
        """Take in a reply. residual: latency / prediction."""
        if work > self.max_work:
            self.max_work = work
        if latency_s > self.longest_s:
            self.longest_s = latency_s
        # A quantile by steps: as many up as down where 5 % are above.
        self.tail *= 1.0475 if residual > self.tail else 0.9975
        if self.tail < 1.0:
            self.tail = 1.0
        self._n = self._n * FORGET + 1.0
        self._w = self._w * FORGET + work
        self._l = self._l * FORGET + latency_s
        self._ww = self._ww * FORGET + work * work
        self._wl = self._wl * FORGET + work * latency_s
        self.num_samples += 1
        if self.num_samples & 7 == 0 or self.num_samples < 8:
            self._fit()

    def _fit(self) -> None:
        spread = self._n * self._ww - self._w * self._w
        slope_s = 0.0
        if spread > 1e-9 * self._n * self._ww:
            slope_s = max(0.0, (self._n * self._wl - self._w * self._l) / spread)
        base_s = (self._l - slope_s * self._w) / self._n
        if base_s < 0.0:
            base_s, slope_s = 0.0, self._l / self._w if self._w else 0.0
        self.base_s, self.slope_s = base_s, slope_s


class NodeHealth:
    """What is known of one node. Times are the events'."""

    __slots__ = (
        "_break_s",
        "_demotion_s",
        "_misses",
        "_num_outliers",
        "_stalled_s",
        "_stalls",
        "broken_until_s",
        "demoted_until_s",
        "is_suspect",
        "load_s",
        "model",
        "num_failures",
        "num_replies",
        "pace_s",
        "replied_s",
        "residual",
        "rests_until_s",
        "rtt_s",
        "usual",
    )

    def __init__(self, rtt_s: float) -> None:
        self.model = LatencyModel()
        self.rtt_s = rtt_s
        self.load_s = 0.0  # reading experts, per reply, lately
        self.pace_s = 0.0  # of its own time, per work, lately
        self.residual = self.usual = 1.0  # on average, lately and over a hundred replies
        self.is_suspect = False  # silent with a call in hand
        self.num_replies = 0
        self.replied_s = 0.0
        self.num_failures = 0  # in a row
        self.demoted_until_s = self.broken_until_s = self.rests_until_s = 0.0
        self._demotion_s, self._break_s = FIRST_DEMOTION_S, FIRST_BREAK_S
        self._stalls: deque[int] = deque(maxlen=STALLS)  # at which reply
        self._stalled_s = 0.0  # when the last one was noticed
        self._misses: deque[float] = deque(maxlen=MISSES)
        self._num_outliers = 0

    def rank(self, now_s: float) -> int:
        """Return 0 for a node in good standing; of two nodes the lower rank is asked first."""
        is_judged = now_s < self.demoted_until_s or now_s < self.broken_until_s
        if not (self.is_suspect or is_judged or now_s < self.rests_until_s):
            return 0
        # Silent right now is worst: a slow node answers at least.
        ranks = ((4, self.is_suspect), (2, now_s < self.broken_until_s))
        return 1 + sum(rank for rank, holds in ranks if holds)

    def is_stale(self, now_s: float) -> bool:
        """Whether too little or nothing recent is known of its speed."""
        return self.model.num_samples < MIN_SAMPLES or now_s - self.replied_s > STALE_S

    def wait_s(self, work_ahead: float) -> float:
        """Return how long a call will wait behind that much work of ours."""
        slope_s = self.model.slope_s
        return work_ahead * (slope_s if slope_s > self.pace_s else self.pace_s)

    def silent_after_s(self, work: float) -> float:
        """Return how long a call may bring neither progress nor reply."""
        model = self.model
        if model.num_samples < EARLY_SAMPLES or work > MAX_STRETCH * model.max_work:
            return UNKNOWN_S
        if model.num_samples < MIN_SAMPLES:
            longest_s = max(model.longest_s, self.rtt_s)
            return min(UNKNOWN_S, max(EARLY_SILENT_S, EARLY_FACTOR * longest_s))
        return max(SILENT_S, 4.0 * self.rtt_s, 2.0 * model.predict(work))

    def dead_after_s(self, work: float, num_bytes: int) -> float:
        """Return after how much silence its connection is given up.

        Args:
            num_bytes: of the calls that it has: they may still be on their way.
        """
        after_s = max(DEAD_S + num_bytes / SLOW_LINK_BYTES_PER_S, DEAD_ROUND_TRIPS * self.rtt_s)
        if self.model.is_known:
            after_s = max(after_s, DEAD_FACTOR * self.model.predict(work))
        return after_s

    def deadline_s(self, work: float) -> float:
        """Return after how long a call is asked of another node too, progress or not."""
        model = self.model
        if model.num_samples < MIN_SAMPLES or work > MAX_STRETCH * model.max_work:
            return UNKNOWN_S
        return max(SILENT_S, DEADLINE_FACTOR * self.model.slow_s(work) + self.load_s)

    def slow_line(self) -> tuple[float, float]:
        """Return (seconds, seconds a work): what a call takes that is among the slow ones."""
        model = self.model
        return model.base_s * model.tail + self.load_s, model.slope_s * model.tail

    def hedge_after_s(self, work: float) -> float:
        """Return after how long a call is among the slow ones. `model.is_known` only."""
        return max(MIN_HEDGE_S, self.model.slow_s(work) + self.load_s)

    def replied(self, work: float, latency_s: float, reply: Replied, wait_s: float = 0.0) -> float:
        """Learn from a reply; return its residual, 1.0 if it is nothing to look into.

        Args:
            wait_s: how long it was expected to wait behind other calls of ours.
        """
        busy_s, load_s = reply.busy_s, reply.load_s
        self.num_replies += 1
        self.replied_s = reply.now_s
        self.num_failures = 0
        self.load_s += (load_s - self.load_s) * 0.0625
        wire_s = latency_s - busy_s
        if wire_s < self.rtt_s:
            self.rtt_s = max(0.0, wire_s)
        else:
            self.rtt_s += (wire_s - self.rtt_s) * 0.015625
        if work > 0.0:
            self.pace_s += ((busy_s - reply.queue_s - load_s) / work - self.pace_s) * 0.0625
        latency_s -= load_s
        if wait_s > 0.0:
            latency_s -= min(reply.queue_s, WAIT_FACTOR * wait_s)
        model = self.model
        predicted_s = model.base_s + model.slope_s * work
        residual = latency_s / predicted_s if predicted_s > 0.0 else 1.0
        is_slow = residual > SLOW_RESIDUAL and latency_s > MIN_HEDGE_S
        if is_slow and model.num_samples >= MIN_SAMPLES:
            self._num_outliers += 1
            if not self._num_outliers % LEARN_SLOW_EVERY:
                model.learn(work, latency_s, residual)
            return residual
        shown = residual if residual < SLOW_RESIDUAL else SLOW_RESIDUAL
        self.residual += (shown - self.residual) * LATE_SHARE
        self.usual += (shown - self.usual) * USUAL_SHARE
        model.learn(work, latency_s, residual)
        return 1.0

    def cancelled(self, work: float, latency_s: float, wait_s: float) -> float:
        """Return the residual of a call that was taken back, when its node is rid of it."""
        model = self.model
        latency_s -= self.load_s + WAIT_FACTOR * wait_s
        if model.num_samples < MIN_SAMPLES or latency_s < MIN_HEDGE_S:
            return 1.0
        predicted_s = model.base_s + model.slope_s * work
        return latency_s / predicted_s if predicted_s > 0.0 else 1.0

    def stalled(self, residual: float, sent_s: float, now_s: float) -> bool:
        """Count a slow reply to a call sent then; True: there were too many lately."""
        if sent_s < self._stalled_s:
            return False  # in flight together with the last one
        self._stalled_s = now_s
        shown = min(residual, MAX_RESIDUAL)
        self.residual += (shown - self.residual) * LATE_SHARE
        self.usual += (shown - self.usual) * USUAL_SHARE
        self._stalls.append(self.num_replies)
        if residual >= MAX_RESIDUAL:
            self.rests_until_s = now_s + REST_S
        return len(self._stalls) == STALLS and self.num_replies - self._stalls[0] < STALL_REPLIES

    def demote(self, now_s: float) -> None:
        """Prefer others for a while, twice as long each time."""
        if now_s < self.demoted_until_s:
            return
        if now_s - self.demoted_until_s > MAX_DEMOTION_S:
            self._demotion_s = FIRST_DEMOTION_S  # that was long ago
        self.demoted_until_s = now_s + self._demotion_s
        self._demotion_s = min(MAX_DEMOTION_S, 2.0 * self._demotion_s)
        # On probation a stall or two are enough.
        self.residual = PROBATION_RESIDUAL
        self._stalls.extend([self.num_replies] * (STALLS - 1))

    def missed_deadline(self, now_s: float) -> None:
        """Count a call that took far too long."""
        self._misses.append(now_s)
        if len(self._misses) == MISSES and now_s - self._misses[0] < MISSES_S:
            self._break(now_s)

    def failed(self, now_s: float) -> None:
        """Count a call that the node refused or could not do."""
        self.num_failures += 1
        if self.num_failures >= FAILURES_IN_A_ROW:
            self._break(now_s)
            self.num_failures = FAILURES_IN_A_ROW - 1  # half-open: one more is enough

    def _break(self, now_s: float) -> None:
        if now_s >= self.broken_until_s:
            self.broken_until_s = now_s + self._break_s
            self._break_s = min(MAX_BREAK_S, 2.0 * self._break_s)
