"""Candidate: a drafter and what is known of it: its speed, its luck, how its routing strays."""

from collections import deque
from dataclasses import dataclass, field
from math import inf

from coordinator.speculation.acceptance import Acceptance
from coordinator.speculation.figures import DrafterFigures
from coordinator.speculation.interface import AskingDrafter, Drafter, DraftToken
from coordinator.speculation.lead import Lead
from coordinator.speculation.pass_time import PassTime
from coordinator.speculation.planner import Planner
from coordinator.speculation.routing_watch import Routing, RoutingWatch
from shoal.errors import NodeError, ShoalError

FREE_SHARE = 0.02  # of a plain pass: a guess that takes less is made before it is weighed
SPEED_SAMPLES = 9  # guesses whose median is the speed: a stall does not move it
BURST_SAMPLES = 64  # guesses whose mean is the speed of a drafter that waits, then tells several

RATE_STEPS = 8  # whose tokens a second are what a drafter promises
TRIALS = 3  # before that many it promises everything
CURIOSITY = 1.01  # a step that it was not asked: half as good as the best, it is tried every 70


@dataclass(slots=True)
class Draft:
    """What a candidate guesses in one step.

    chances: calibrated, of `guesses`. draft_s: seconds that they took and that no pass hid.
    lead: whence more of them come, while that is open.
    """

    candidate: "Candidate"
    guesses: list[DraftToken] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    draft_s: float = 0.0
    lead: Lead | None = None

    def add(self, guess: DraftToken) -> None:
        self.guesses.append(guess)
        self.chances.append(self.candidate.acceptance.chance(guess.chance))

    def cut(self, length: int) -> list[DraftToken]:
        """Keep the first guesses; return the others."""
        others = self.guesses[length:]
        del self.guesses[length:], self.chances[length:]
        return others

    def close(self) -> None:
        """Let go of what the drafter holds for more guesses."""
        lead, self.lead = self.lead, None
        if lead is not None:
            lead.close()


class Candidate:
    """One drafter of a model. Owned by the speculator."""

    def __init__(
        self,
        drafter: Drafter,
        pass_time: PassTime,
        max_draft: int,
        divergence: float,
        num_candidates: int = 1,
    ) -> None:
        """Args: pass_time: of the target, shared by all; divergence: see RoutingWatch."""
        self.drafter = drafter
        self.acceptance = Acceptance()
        self.planner = Planner(pass_time, max_draft, num_candidates)
        self.watch = RoutingWatch(divergence, max_draft)
        self._failure: ShoalError | None = None
        self.owed_s = 0.0  # drafting that no pass was charged with yet
        self._pass_time = pass_time
        self._is_bursty = isinstance(drafter, AskingDrafter)
        num_samples = BURST_SAMPLES if self._is_bursty else SPEED_SAMPLES
        self._guess_s: deque[float] = deque(maxlen=num_samples)
        self._has_begun = False
        self._steps: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS)
        self._num_unused = 0  # steps since its last draft
        self._reset()

    def _reset(self) -> None:
        self._num_drafted = self._num_accepted = self._num_passes = 0
        self.num_ahead = 0  # guesses taken that were made beside a pass
        self._draft_s = 0.0
        self._round_trips_before = self._round_trips()

    def _round_trips(self) -> int:
        drafter = self.drafter
        return drafter.num_round_trips if isinstance(drafter, AskingDrafter) else 0

    @property
    def guess_s(self) -> float:
        """Seconds that one guess takes; 0 before one was made."""
        if not self._guess_s:
            return 0.0
        if self._is_bursty:
            return sum(self._guess_s) / len(self._guess_s)
        return sorted(self._guess_s)[len(self._guess_s) // 2]

    @property
    def is_free(self) -> bool:
        """Whether its guesses take no time to speak of."""
        if self.drafter.local_expert_bytes:
            return False
        return self.guess_s <= FREE_SHARE * self._pass_time.predict(1)

    def wants_more(self, draft: Draft) -> bool:
        """Return whether one more guess of its is worth its time."""
        if isinstance(self.drafter, AskingDrafter) and self.drafter.has_guess:
            return True
        return self.planner.wants(draft.chances, self.acceptance.mean, self.guess_s)

    @property
    def can_go_on(self) -> bool:
        """Whether it may draft beside a pass: it takes time, and asks no nodes."""
        return not self.is_free and not isinstance(self.drafter, AskingDrafter)

    @property
    def is_out(self) -> bool:
        """Whether it failed, and is not to be asked."""
        return self._failure is not None

    def fail(self, error: ShoalError) -> str:
        """Hear that it failed; return for how long it is out, as a sentence goes on.

        Nodes come back and others take over; a drafter's own files stay as they are.
        """
        self._failure = error
        return " before the next request" if isinstance(error, NodeError) else ""

    def begin(self) -> None:
        """A new request: figures start again, what was learned stays."""
        if isinstance(self._failure, NodeError):
            self._failure = None
        self._reset()
        self._has_begun = False
        self.owed_s = 0.0

    def time_guess(self, seconds: float) -> float:
        """Learn what a guess took; return what to charge it with.

        The first of a request may read the whole prompt, which says nothing of those that follow
        and is charged to none of them.
        """
        self._draft_s += seconds
        if self._has_begun or self._is_bursty:  # the latter read the target's KV: no prompt
            self._guess_s.append(seconds)
            return seconds
        self._has_begun = True
        return min(seconds, self.guess_s)

    def promise(self) -> float:
        """Return the tokens a second that it brought lately; more the longer it was not asked.

        One that was hardly tried promises everything: its planner sees to it that this is cheap.
        """
        if len(self._steps) < TRIALS:
            return inf
        num_tokens = sum(tokens for tokens, _ in self._steps)
        rate = num_tokens / sum(seconds for _, seconds in self._steps)
        return rate * CURIOSITY**self._num_unused

    def time_step(self, num_tokens: int, seconds: float, is_own: bool) -> None:
        """Learn what a step with guesses came to, its own or another drafter's."""
        if is_own:
            self._steps.append((num_tokens, seconds))
        self._num_unused = 0 if is_own else self._num_unused + 1

    def judge(
        self, draft: Draft, num_accepted: int, num_judged: int, verified: tuple[Routing, ...]
    ) -> None:
        """Learn how its draft fared.

        Args:
            num_judged: guesses that were compared: fewer where the text ended within the draft.
            verified: routing of the rows of the pass, in order; empty where nobody watches.
        """
        self._num_passes += 1
        self._num_drafted += len(draft.guesses)
        self._num_accepted += num_accepted
        self.acceptance.observe([g.chance for g in draft.guesses[:num_judged]], num_accepted)
        drafted = [g.routing for g in draft.guesses[: num_accepted + 1] if g.routing is not None]
        num_known = min(len(drafted), len(verified))
        if num_known:
            self.watch.observe(drafted[:num_known], verified[:num_known])

    def figures(self) -> DrafterFigures:
        """Return the counts of the request."""
        return DrafterFigures(
            drafted=self._num_drafted,
            accepted=self._num_accepted,
            passes=self._num_passes,
            ahead=self.num_ahead,
            draft_s=self._draft_s,
            local_expert_bytes=self.drafter.local_expert_bytes,
            divergence=self.watch.share,
            round_trips=self._round_trips() - self._round_trips_before,
        )
