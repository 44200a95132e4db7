"""Planner: how long a draft is worth its time (core).

    tokens(k) = 1 + c1 + c1 c2 + ... + c1..ck        chances of the guesses, calibrated
    rate(k)   = tokens(k) / (T(1 + k) + what drafting took)

The length with the highest rate is taken, if it beats the plain step by a margin; else 0. A step
before or beside that arithmetic may be

    PLAIN   no draft: T(1) is not known yet, or is due to be seen again
    PROBE   a short draft although the arithmetic says 0, to find out whether it is still right

The *ledger* counts what this drafter won or lost against plain steps, as it really came: seconds
that the same tokens would have taken plainly, less what they took. It earns a share of all time.
Probes are paid out of it, and no draft is made that would take it below its floor if none of it
were accepted: there, nothing is drafted until time has paid. So all losses together, whatever the
models of time and chance believe, stay below that share of the time and a constant of a few plain
steps; drafters side by side divide the share. A probe that loses doubles the pause before the next,
so in a world where speculation never pays its cost fades.

One step: (`wants` before each guess)* -> `best_length` -> the pass -> `observe`.
"""

from collections.abc import Sequence
from enum import StrEnum

from coordinator.speculation.pass_time import PassTime
from shoal import limits

MARGIN = 0.03  # of the plain rate: a gain below it is within what the models are wrong by
EARNED = 0.01  # of the time: what probes and wrong drafts may cost in the long run
FIRST_CREDIT = 1.0  # plain steps: what the first probe may cost
CEILING = 6.0  # of the ledger, in plain steps; a draft's luck moves it by one or two
# Likewise; it sinks from the first to the second. A short answer has no time to win back what luck
# cost: 1 - 0.05 and what 64 steps earn are 1.6 steps, and 3 % of 64 are 1.9.
FIRST_FLOOR, FLOOR = 0.05, -4.0
FLOOR_HELD, FLOOR_STEPS = 64, 800  # steps: after the first it sinks, after the second it is there
FIRST_PAUSE, MAX_PAUSE = 4, 512  # steps between probes
PROBE_LENGTH = 3  # guesses: enough to tell a row's price
MIN_PROBE_GAIN = 0.25  # tokens that a probe must expect: else it could win at no price
HOPE = 0.5  # chance of a guess nobody has made: a probe of a drafter that was bad stays possible
MAX_STALL = 2.0  # predicted times: more is the link's doing, with or without drafts


class Step(StrEnum):
    NORMAL = "normal"
    PLAIN = "plain"
    PROBE = "probe"


class Planner:
    """Plans for one drafter.

    Args:
        pass_time: shared by all planners of a model; whoever runs passes tells it of each, before
            the planner hears of the step.
        max_draft: guesses at most, in 0..MAX_DRAFT; 0 never drafts.
        num_planners: of the model, this one too.
    """

    def __init__(
        self, pass_time: PassTime, max_draft: int = limits.MAX_DRAFT, num_planners: int = 1
    ) -> None:
        assert 0 <= max_draft <= limits.MAX_DRAFT, max_draft
        assert num_planners >= 1, num_planners
        self._earned = EARNED / num_planners
        self._pass_time = pass_time
        self._max_draft = max_draft
        self._step: Step | None = None  # of the step under way; None: not looked at yet
        self._begun_at = 0  # passes before it
        self._probe_length = 0
        self._expected_s = 0.0  # of the pass under way
        self._ledger: float | None = None  # seconds; None before T(1) is known
        self._num_steps = 0
        self._pause = FIRST_PAUSE
        self._until_probe = 0
        self.num_probes = 0

    @property
    def saved_s(self) -> float:
        """Return the ledger, between its floor and ceiling. For figures and tests."""
        return self._ledger or 0.0

    def wants(self, chances: Sequence[float], next_chance: float, guess_s: float) -> bool:
        """Return whether one more guess is worth being made.

        Looks ahead: a first guess may pay only with those that would follow it.

        Args:
            chances: calibrated, of the guesses made so far in this step; none at its beginning.
            next_chance: of the next guess, as far as known: the drafter's usual.
            guess_s: seconds that one more guess takes, and each so far took; 0.0 where a pass under
                way hides them.
        """
        step = self._begun()
        made = len(chances)
        if made >= self._max_draft or step is Step.PLAIN:
            return False
        if self._risk(made + 1, guess_s * (made + 1)) > self._purse():
            return False
        if step is Step.PROBE:
            return made < self._probe_length
        if self._worth_of_more(chances, next_chance, guess_s):
            return True
        if made or not self._may_probe():
            return False
        hope = [max(HOPE, next_chance)] * min(PROBE_LENGTH, self._max_draft)
        return self._try_probe(hope, guess_s * len(hope)) > 0

    def best_length(self, chances: Sequence[float], draft_s: float) -> int:
        """Return how many of the guesses to verify.

        Args:
            chances: calibrated, of all guesses made.
            draft_s: seconds that making them took and that no pass hid.
        """
        length = self._length(chances[: self._max_draft], draft_s)
        self._expected_s = self._pass_time.predict(1 + length)
        return length

    def _length(self, chances: Sequence[float], draft_s: float) -> int:
        step = self._begun()
        if step is Step.PLAIN or not chances:
            return 0
        if step is Step.PROBE:
            return min(self._probe_length, len(chances))
        purse = self._purse()
        while chances and self._risk(len(chances), draft_s) > purse:
            chances = chances[:-1]
        length, rate = self._best(chances, draft_s)
        if rate > (1.0 + MARGIN) / (self._pass_time.predict(1) + draft_s):
            return length
        return self._try_probe(chances[:PROBE_LENGTH], draft_s) if self._may_probe() else 0

    def rate(self, chances: Sequence[float], draft_s: float) -> float:
        """Return tokens a second at the best length, plain included; to compare drafters with."""
        return self._best(chances[: self._max_draft], draft_s)[1]

    def observe(self, num_drafted: int, num_tokens: int, pass_s: float, draft_s: float) -> None:
        """Learn what the step came to; the next one begins.

        Args:
            num_drafted: guesses that the pass verified; 0 for a plain step.
            num_tokens: what it brought: the accepted guesses and one more.
            pass_s: seconds of the pass. draft_s: of drafting, hidden ones left out.
        """
        step, self._step = self._step, None
        if not self._pass_time.is_known:
            return
        plain_s = self._pass_time.predict(1)
        if self._ledger is None:
            self._ledger = FIRST_CREDIT * plain_s
        # What was expected before this very pass was learned from: a stall is nobody's loss.
        expected_s = self._expected_s if num_drafted else plain_s
        seconds = min(pass_s, MAX_STALL * expected_s) + draft_s
        gain_s = num_tokens * plain_s - seconds if num_drafted else -draft_s
        ledger = self._ledger + gain_s + self._earned * seconds
        self._num_steps += 1
        self._ledger = min(CEILING * plain_s, max(2 * FLOOR * plain_s, ledger))
        if self._ledger > 0.0:
            self._until_probe -= 1
        if step is Step.PROBE:
            self._pause = FIRST_PAUSE if gain_s > 0.0 else min(MAX_PAUSE, 2 * self._pause)
            self._until_probe = self._pause

    def _begun(self) -> Step:
        # Another drafter's steps are not told of here: they show in the number of passes.
        if self._step is None or self._begun_at != self._pass_time.num_passes:
            self._begun_at = self._pass_time.num_passes
            must_look = self._pass_time.is_due or not self._pass_time.is_known
            self._step = Step.PLAIN if must_look else Step.NORMAL
        return self._step

    def _best(self, chances: Sequence[float], draft_s: float) -> tuple[int, float]:
        """Return the length of the highest rate, the shortest of equals, and that rate."""
        pass_s = self._pass_time.table()
        best, best_rate = 0, 1.0 / (pass_s[0] + draft_s)
        tokens, reached = 1.0, 1.0
        for length, chance in enumerate(chances, 1):
            reached *= chance
            tokens += reached
            rate = tokens / (pass_s[length] + draft_s)
            if rate > best_rate:
                best, best_rate = length, rate
        return best, best_rate

    def _worth_of_more(self, chances: Sequence[float], next_chance: float, guess_s: float) -> bool:
        """Return whether some longer draft has a higher rate than any up to here."""
        pass_s = self._pass_time.table()
        spent_s = guess_s * len(chances)
        best = (1.0 + MARGIN) / pass_s[0]
        if chances:
            best = self._best(chances, spent_s)[1]
        tokens, reached = 1.0, 1.0
        for chance in chances:
            reached *= chance
            tokens += reached
        for length in range(len(chances) + 1, self._max_draft + 1):
            reached *= next_chance
            tokens += reached
            spent_s += guess_s
            if tokens > best * (pass_s[length] + spent_s):
                return True
        return False

    def _floor(self) -> float:
        num_sinking = self._num_steps - FLOOR_HELD
        share = min(1.0, max(0.0, num_sinking / (FLOOR_STEPS - FLOOR_HELD)))
        return FIRST_FLOOR + (FLOOR - FIRST_FLOOR) * share

    def _purse(self) -> float:
        """Return the seconds that may be lost before the ledger is at its floor."""
        plain_s = self._pass_time.predict(1)
        ledger = FIRST_CREDIT * plain_s if self._ledger is None else self._ledger
        return ledger - self._floor() * plain_s

    def _risk(self, length: int, draft_s: float) -> float:
        """Return the seconds that a draft loses if none of it is accepted."""
        return self._pass_time.predict(1 + length) - self._pass_time.predict(1) + draft_s

    def _may_probe(self) -> bool:
        return self._until_probe <= 0 and self._ledger is not None and self._ledger > 0.0

    def _try_probe(self, chances: Sequence[float], draft_s: float) -> int:
        """Begin a probe if the ledger can pay it at its worst; return its length, or 0."""
        assert self._ledger is not None, "a probe before T(1) is known"
        tokens, reached, length = 0.0, 1.0, 0
        for made, chance in enumerate(chances, 1):
            reached *= chance
            tokens += reached
            if self._risk(made, draft_s) <= self._ledger:
                length = made
        # In the best of cases every guess is right and its row costs nothing.
        is_hopeless = draft_s >= length * self._pass_time.predict(1)
        if is_hopeless or tokens < MIN_PROBE_GAIN:
            return 0
        self._step, self._probe_length = Step.PROBE, length
        self.num_probes += 1
        return length
