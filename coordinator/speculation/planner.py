"""Planner: how long a draft is worth its time (core).

    tokens(k) = 1 + c1 + c1 c2 + ... + c1..ck        chances of the guesses, calibrated
    rate(k)   = tokens(k) / (T(1 + k) + what drafting took)

The length with the highest rate is taken, if it beats the plain step by a margin; else 0. A step
before or beside that arithmetic may be

    PLAIN   no draft: T(1) is not known yet, or is due to be seen again, or the ledger is low
    PROBE   a short draft although the arithmetic says 0, to find out whether it is still right

The *ledger* counts what speculation won or lost against plain steps, as it really came: seconds
that the same tokens would have taken plainly, less what they took. It earns a share of all time.
Probes are paid out of it, and none is made that it could not pay at its worst; below its floor
nothing is drafted until it has recovered. So all losses together, whatever the models of time and
chance believe, stay below that share of the time and a constant of a few plain steps. A probe that
loses doubles the pause before the next, so in a world where speculation never pays its cost fades.

One step: (`wants` before each guess)* -> `best_length` -> the pass -> `observe`.
"""

from collections.abc import Sequence
from enum import StrEnum

from coordinator.speculation.pass_time import PassTime
from shoal import limits

MARGIN = 0.03  # of the plain rate: a gain below it is within what the models are wrong by
EARNED = 0.015  # of the time: what probes and wrong drafts may cost in the long run
FIRST_CREDIT = 1.0  # plain steps: what the first probe may cost
FLOOR, CEILING = -6.0, 6.0  # of the ledger, in plain steps; a draft's luck moves it by one or two
PLAIN_EVERY = 64  # drafted steps in a row: then T(1) is looked at again
SURPRISE = 0.15  # of T(1): such a look is repeated soon,
PLAIN_SOON = 6  # after so many steps
FIRST_PAUSE, MAX_PAUSE = 4, 512  # steps between probes
PROBE_LENGTH = 3  # guesses: enough to tell a row's price
MIN_PROBE_GAIN = 0.25  # tokens that a probe must expect: else it could win at no price
HOPE = 0.5  # chance of a guess nobody has made: a probe of a drafter that was bad stays possible
MAX_STALL = 3.0  # predicted times: more is the link's doing, with or without drafts


class Step(StrEnum):
    NORMAL = "normal"
    PLAIN = "plain"
    PROBE = "probe"


class Planner:
    """Plans for one drafter.

    Args:
        pass_time: shared by all planners of a model; whoever runs passes tells it of each.
        max_draft: guesses at most, in 0..MAX_DRAFT; 0 never drafts.
    """

    def __init__(self, pass_time: PassTime, max_draft: int = limits.MAX_DRAFT) -> None:
        assert 0 <= max_draft <= limits.MAX_DRAFT, max_draft
        self._pass_time = pass_time
        self._max_draft = max_draft
        self._step: Step | None = None  # of the step under way; None: not looked at yet
        self._probe_length = 0
        self._ledger: float | None = None  # seconds; None before T(1) is known
        self._is_broke = False
        self._pause = FIRST_PAUSE
        self._until_probe = 0
        self._until_plain = PLAIN_EVERY
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
        step = self._begun()
        chances = chances[: self._max_draft]
        if step is Step.PLAIN or not chances:
            return 0
        if step is Step.PROBE:
            return min(self._probe_length, len(chances))
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
        expected_s = self._pass_time.predict(1 + num_drafted)
        seconds = min(pass_s, MAX_STALL * expected_s) + draft_s
        gain_s = num_tokens * plain_s - seconds if num_drafted else -draft_s
        ledger = self._ledger + gain_s + EARNED * seconds
        self._ledger = min(CEILING * plain_s, max(2 * FLOOR * plain_s, ledger))
        if self._ledger < FLOOR * plain_s:
            self._is_broke = True
        elif self._ledger > 0.0:
            self._is_broke = False
        self._note_plain(num_drafted, pass_s, plain_s)
        self._until_probe -= 1
        if step is Step.PROBE:
            self._pause = FIRST_PAUSE if gain_s > 0.0 else min(MAX_PAUSE, 2 * self._pause)
            self._until_probe = self._pause

    def _begun(self) -> Step:
        if self._step is None:
            must_look = self._until_plain <= 0 or not self._pass_time.is_known
            self._step = Step.PLAIN if must_look or self._is_broke else Step.NORMAL
        return self._step

    def _note_plain(self, num_drafted: int, pass_s: float, plain_s: float) -> None:
        if num_drafted:
            self._until_plain -= 1
        elif abs(pass_s - plain_s) > SURPRISE * plain_s:
            self._until_plain = PLAIN_SOON
        else:
            self._until_plain = PLAIN_EVERY

    def _best(self, chances: Sequence[float], draft_s: float) -> tuple[int, float]:
        """Return the length of the highest rate, the shortest of equals, and that rate."""
        best, best_rate = 0, 1.0 / (self._pass_time.predict(1) + draft_s)
        tokens, reached = 1.0, 1.0
        for length, chance in enumerate(chances, 1):
            reached *= chance
            tokens += reached
            rate = tokens / (self._pass_time.predict(1 + length) + draft_s)
            if rate > best_rate:
                best, best_rate = length, rate
        return best, best_rate

    def _worth_of_more(self, chances: Sequence[float], next_chance: float, guess_s: float) -> bool:
        """Return whether some longer draft has a higher rate than any up to here."""
        spent_s = guess_s * len(chances)
        best = (1.0 + MARGIN) / self._pass_time.predict(1)
        if chances:
            best = max(1.0 / (self._pass_time.predict(1) + spent_s), self.rate(chances, spent_s))
        tokens, reached = 1.0, 1.0
        for chance in chances:
            reached *= chance
            tokens += reached
        for length in range(len(chances) + 1, self._max_draft + 1):
            reached *= next_chance
            tokens += reached
            spent_s += guess_s
            if tokens / (self._pass_time.predict(1 + length) + spent_s) > best:
                return True
        return False

    def _may_probe(self) -> bool:
        return self._until_probe <= 0 and self._ledger is not None and self._ledger > 0.0

    def _try_probe(self, chances: Sequence[float], draft_s: float) -> int:
        """Begin a probe if the ledger can pay it at its worst; return its length, or 0."""
        assert self._ledger is not None, "a probe before T(1) is known"
        tokens, reached, length = 0.0, 1.0, 0
        plain_s = self._pass_time.predict(1)
        for made, chance in enumerate(chances, 1):
            reached *= chance
            tokens += reached
            if self._pass_time.predict(1 + made) - plain_s + draft_s <= self._ledger:
                length = made
        if not length or tokens < MIN_PROBE_GAIN:
            return 0
        self._step, self._probe_length = Step.PROBE, length
        self.num_probes += 1
        return length
