"""Governor: does prefetching win here? A-B-A, online, for as long as the process lives (core).

    learn -> trial: off on off off on ... -> on, longer each time -> trial -> ...
                                          -> off, longer each time -> learn -> trial -> ...

Windows are counted in calls. A trial compares each window with prefetching (B) with the mean of the
two around it without (A): drift, such as a cache that fills, falls out. In A windows and in `off`
nothing is learned or guessed, so they are demand-only in truth. The cost of a call is what it took,
prefetching's own work included, a wanted expert at a time. The first calls of a window belong to
the one before (what it left in the cache) and are not counted.

Prefetching goes on only if it wins by more than the noise between pairs; a clear win or loss ends a
trial early; a draw is off. A small gain in much noise takes many pairs to see: windows of rest in
between bound what a long trial costs where there is none.
"""

from dataclasses import dataclass, field
from enum import StrEnum

LEARN_WINDOWS = 6  # before a trial: predictors need some 25 tokens
CLEAR_PAIRS = 3  # that all say the same, clearly: enough
MIN_PAIRS = 4  # before any other win is believed
DRAW_PAIRS = 6  # after which what is hardly a gain is a draw
MAX_PAIRS = 60  # after which what is not sure is one
HARDLY = 1.0  # standard errors above the mean that are still less than a gain
REST_WINDOWS = 2  # without prefetching, after each with it: what a trial may cost
CLEAR_GAIN = 0.08  # of a call's cost, in each of the first pairs
CLEAR_LOSS = 0.05  # likewise, on the mean of two pairs or more: ends the trial
MIN_GAIN = 0.015  # of a call's cost: less is not worth the reads
SURE = 2.5  # standard errors of the mean that a gain must exceed: it is looked at several times
ON_WINDOWS = 24  # until the verdict is tried again, at first: a wrong one is found out soon
MAX_ON_WINDOWS = 96  # doubled at each trial won, up to this
OFF_WINDOWS = 96  # until the verdict is tried again, at first
MAX_OFF_WINDOWS = 96 * 64  # doubled at each trial lost, up to this


class State(StrEnum):
    LEARN = "learn"
    TRIAL = "trial"
    ON = "on"
    OFF = "off"


@dataclass(slots=True)
class _Window:
    calls: int = 0
    cost_s: float = 0.0
    experts: int = 0

    @property
    def mean_s(self) -> float:
        return self.cost_s / max(1, self.experts)


@dataclass(slots=True)
class _Trial:
    costs: list[float] = field(default_factory=list)  # of off, on, off, since the last pair
    gains: list[float] = field(default_factory=list)  # of each pair, a share of the cost without
    off_s: float = 0.0  # of the pairs, in all
    rest: int = 0  # windows until the next one with prefetching

    def add(self, mean_s: float) -> bool:
        """Take in a window; return whether it ended a pair."""
        self.costs.append(mean_s)
        if len(self.costs) < 3:
            return False
        before, with_s, after = self.costs
        around = (before + after) / 2
        self.gains.append((around - with_s) / around if around > 0 else 0.0)
        self.off_s += around
        self.costs, self.rest = [after], REST_WINDOWS - 1
        return True


class Governor:
    """Says whether to learn and whether to read ahead, one call at a time.

    Args:
        window_calls: calls in a window. guard_calls: of these, the first that are not counted.
        learn_windows: before a trial, at least one.
    """

    def __init__(
        self, window_calls: int, guard_calls: int, learn_windows: int = LEARN_WINDOWS
    ) -> None:
        assert 0 <= guard_calls < window_calls, (window_calls, guard_calls)
        self._learn_windows = learn_windows
        self._window_calls, self._guard_calls = window_calls, guard_calls
        self._state = State.LEARN
        self._window = _Window()
        self._trial = _Trial()
        self._windows_left = learn_windows
        self._on_windows, self._off_windows = ON_WINDOWS, OFF_WINDOWS
        self._is_b = False
        self._verdict: State | None = None
        self._gain_s = 0.0  # an expert, by the last trial that was won
        self.switches = 0
        self.saved_s = 0.0

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_learning(self) -> bool:
        """Whether predictors are to be told of the call, and to guess."""
        return self._state in (State.LEARN, State.ON) or self._is_b

    @property
    def may_issue(self) -> bool:
        """Whether guesses are to be read ahead."""
        return self._state is State.ON or self._is_b

    def on_done(self, cost_s: float, num_experts: int) -> None:
        """Learn what a call cost that began in the present window."""
        window = self._window
        window.calls += 1
        if window.calls > self._guard_calls:
            window.cost_s += cost_s
            window.experts += num_experts
        if self._state is State.ON:
            self.saved_s += self._gain_s * num_experts
        if window.calls == self._window_calls:
            self._window = _Window()
            self._end_window(window)

    def _end_window(self, window: _Window) -> None:
        if self._state is State.TRIAL:
            trial = self._trial
            if trial.rest:
                trial.rest -= 1
                trial.costs = [window.mean_s]
            elif trial.add(window.mean_s):
                self._judge(window)
            if self._state is State.TRIAL:
                self._is_b = len(trial.costs) == 1 and not trial.rest
            return
        self._windows_left -= 1
        if self._windows_left:
            return
        if self._state is State.OFF:
            self._state, self._windows_left = State.LEARN, self._learn_windows
        else:
            self._state, self._trial, self._is_b = State.TRIAL, _Trial(), False

    def _judge(self, last: _Window) -> None:
        gains = self._trial.gains
        count = len(gains)
        mean = sum(gains) / count
        squares = sum((gain - mean) ** 2 for gain in gains) / max(1, count - 1)
        is_sure = mean > max(MIN_GAIN, SURE * (squares / count) ** 0.5)
        is_clear = count == CLEAR_PAIRS and min(gains) > CLEAR_GAIN and is_sure
        is_gain = count >= MIN_PAIRS and is_sure
        is_hardly = mean + HARDLY * (squares / count) ** 0.5 < MIN_GAIN
        is_draw = count == MAX_PAIRS or (count >= DRAW_PAIRS and is_hardly)
        self.saved_s += gains[-1] * last.mean_s * last.experts
        if is_clear or is_gain:
            self._gain_s = mean * self._trial.off_s / count
            self._settle(State.ON, self._on_windows)
            self._on_windows = min(2 * self._on_windows, MAX_ON_WINDOWS)
            self._off_windows = OFF_WINDOWS
        elif is_draw or (count > 1 and mean < -CLEAR_LOSS):
            self._settle(State.OFF, self._off_windows)
            self._on_windows = ON_WINDOWS
            self._off_windows = min(2 * self._off_windows, MAX_OFF_WINDOWS)

    def _settle(self, verdict: State, windows: int) -> None:
        self.switches += self._verdict is not None and self._verdict is not verdict
        self._verdict = verdict
        self._state, self._windows_left, self._is_b = verdict, windows, False
