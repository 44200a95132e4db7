"""Speculator: who drafts in this step, how long, and what is learned from what came of it.

    begin -> (draft -> [the pass] -> ran -> [rows are sampled] -> judged)* -> end -> figures

Drafters are asked in the order of what they promise: tokens a second, drafting and pass together,
from what they guess now (where guessing is free) or from their usual luck. The first whose planner
finds a length that pays is taken. A drafter that fails costs its guesses, never the request: it is
not asked again, or not before the next request where a node failed it. One exception: when nobody
was left for a range of experts and the drafter has waited --shard-wait for it, the request ends
there. The pass, whose rows are the draft's, would wait as long again for the same nodes.

Over a long link a drafter that takes time goes on behind its draft while the pass runs (`Lead`).

Asking takes some 0.1 ms, which a small model in one process would notice: while it leads to no
guesses, it rests for as many steps as keep it below a share of their time.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from math import prod

from coordinator.array_types import F32
from coordinator.cancellation import Cancellation
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.candidate import Candidate, Draft
from coordinator.speculation.config import Speculate
from coordinator.speculation.figures import SpeculationFigures
from coordinator.speculation.interface import Drafter, DraftToken, HiddenDrafter
from coordinator.speculation.lead import Lead
from coordinator.speculation.pass_time import PassTime
from coordinator.speculation.routing_watch import Routing
from shoal.errors import NumericError, ShardUnavailable, ShoalError

ASKING_SHARE = 0.01  # of the time of plain passes: what asking in vain may take
MAX_REST = 16  # steps: a text that begins to repeat itself is noticed within that
PATIENCE = 2  # steps in vain before the first rest
LEAD_WAIT_S = 0.005  # of a pass per round trip: a shorter one is computing more than waiting
LEAD_CHANCE = 0.1  # of a whole draft being right: below, what follows it is of no use
LEAST_LIKELY = 0.03  # of all guesses so far being right: a free drafter is not asked beyond


class Speculator:
    """Drafts for one engine. Used by its thread alone."""

    def __init__(
        self,
        drafters: SequenceOf[Drafter],
        pass_time: PassTime,
        clock: Callable[[], float],
        *,
        mode: Speculate,
        vocab_size: int,
        max_draft: int,
        divergence: float,
        round_trips_per_pass: int = 0,
        local_expert_bytes: int = 0,
        verified_routing: Callable[[int], tuple[Routing, ...]] = lambda _num_rows: (),
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take over the drafters: `close` closes them.

        Args:
            drafters: the preferred ones first.
            pass_time: what passes of the target take; may know something already.
            clock: seconds.
            mode: for figures. max_draft, divergence: of `SpeculationConfig`.
            round_trips_per_pass: to nodes, of the target. local_expert_bytes: of all drafters, what
                they share once. Both for figures.
            verified_routing: of the last n rows of the target's last pass.
            notify: told in a sentence of a drafter that fails.
        """
        self._pass_time = pass_time
        self._clock = clock
        self._mode = mode
        self._vocab_size = vocab_size
        self._max_draft = max_draft
        self._round_trips_per_pass = round_trips_per_pass
        self._local_expert_bytes = local_expert_bytes
        self._verified_routing = verified_routing
        self._notify = notify
        self._candidates = [
            Candidate(drafter, pass_time, max_draft, divergence, max(1, len(drafters)))
            for drafter in drafters
        ]
        self._draft: Draft | None = None  # of the step under way
        self._lead_of: Draft | None = None  # the one before, all right, whose drafter went on
        self._pass_rows, self._pass_s = 0, 0.0
        self._hidden: F32 | None = None  # of the pass that is being judged
        self._num_passes = 0
        self._num_in_vain = 0  # steps since the last guesses
        self._num_rests = 0  # steps in which nobody is asked, from now on
        self._is_resting = False
        self._asking_s = 0.0  # of this step

    def begin(self, request: GenerationRequest) -> None:
        """Hear of a new request."""
        self._num_passes = self._num_rests = self._num_in_vain = 0
        self._is_resting, self._draft, self._lead_of = False, None, None
        for candidate in self._candidates:
            candidate.begin()
            candidate.drafter.begin(request)

    def draft(self, sequence: Sequence, room: int, cancellation: Cancellation) -> list[int]:
        """Return the ids to verify in the next pass, at most `room`; none where that is best.

        Args: sequence: as `Drafter.draft` wants it; not changed.

        Raises: Cancelled; ShardUnavailable, after --shard-wait.
        """
        self._num_passes += 1
        self._draft, self._asking_s = None, 0.0
        self._is_resting = self._num_rests > 0
        if self._is_resting:
            self._num_rests -= 1
            return []
        limit = min(room, self._max_draft)
        if limit < 1 or not self._candidates or not self._pass_time.is_known:
            return []
        began_s = self._clock()
        self._draft = self._choose(sequence, limit, cancellation)
        self._asking_s = self._clock() - began_s
        return [] if self._draft is None else [guess.token_id for guess in self._draft.guesses]

    def _choose(self, sequence: Sequence, limit: int, cancellation: Cancellation) -> Draft | None:
        draft = self._continued(sequence, limit)
        if draft is not None and self._settle(draft):
            return draft
        for draft in self._in_order(sequence, limit, cancellation):
            if not draft.candidate.is_free:
                self._ask(draft, sequence, limit, draft.candidate.wants_more, cancellation)
            if self._settle(draft):
                return draft
        return None

    def _settle(self, draft: Draft) -> bool:
        """Cut the draft to what pays and let its drafter go on behind it; False: nothing pays."""
        candidate = draft.candidate
        behind: list[DraftToken] = []
        if draft.guesses:
            behind = draft.cut(candidate.planner.best_length(draft.chances, draft.draft_s))
        if not draft.guesses:
            candidate.owed_s += draft.draft_s
            draft.close()
            return False
        if draft.lead is not None and self._is_all_waiting and prod(draft.chances) > LEAD_CHANCE:
            draft.lead.go_on(behind)
        else:
            draft.close()
        return True

    @property
    def _is_all_waiting(self) -> bool:
        return self._pass_time.predict(1) > LEAD_WAIT_S * self._round_trips_per_pass > 0

    def _continued(self, sequence: Sequence, limit: int) -> Draft | None:
        """Return a draft of what was guessed beside the last pass, if that was right to its end."""
        before, self._lead_of = self._lead_of, None
        if before is None or before.lead is None:
            return None
        lead, draft = before.lead, Draft(before.candidate)
        behind = lead.stop(int(sequence.token_ids[-1]))
        if not behind:
            before.close()
            return None
        draft.lead = lead
        for guess in behind[:limit]:
            draft.add(guess)
        draft.candidate.num_ahead += len(draft.guesses)
        if len(behind) > limit:
            draft.close()  # the text ends soon
        else:
            self._pull(draft, limit, draft.candidate.wants_more)
        return draft

    def _in_order(self, sequence: Sequence, limit: int, cancellation: Cancellation) -> list[Draft]:
        """Return a draft of every candidate, the most promising first; of the free ones, filled."""
        promised: list[tuple[float, Draft]] = []
        for candidate in self._candidates:
            if candidate.is_out:
                continue
            draft = Draft(candidate)
            if candidate.is_free:
                self._ask(draft, sequence, limit, _is_likely, cancellation)
                promise = candidate.planner.rate(draft.chances, 0.0) if draft.guesses else 0.0
            else:
                promise = candidate.promise()
            promised.append((promise, draft))
        promised.sort(key=lambda pair: -pair[0])  # stable: of equals, the preferred one
        return [draft for _, draft in promised]

    def _ask(
        self,
        draft: Draft,
        sequence: Sequence,
        limit: int,
        wants_more: Callable[[Draft], bool],
        cancellation: Cancellation,
    ) -> None:
        """Let the draft's candidate guess until that is enough, it has no more, or it fails."""
        drafter = draft.candidate.drafter
        draft.lead = Lead(lambda stop: drafter.draft(sequence, stop), cancellation)
        self._pull(draft, limit, wants_more)
        if not draft.candidate.can_go_on:
            draft.close()

    def _pull(self, draft: Draft, limit: int, wants_more: Callable[[Draft], bool]) -> None:
        """Take guesses from the draft's open lead."""
        candidate, lead = draft.candidate, draft.lead
        assert lead is not None, "nobody guesses"
        limit = min(limit, candidate.watch.limit)
        try:
            while len(draft.guesses) < limit and wants_more(draft):
                began_s = self._clock()
                guess = lead.next()
                draft.draft_s += candidate.time_guess(self._clock() - began_s)
                if guess is None or not 0 <= guess.token_id < self._vocab_size:
                    draft.close()
                    return
                draft.add(guess)
        except NumericError:
            draft.close()  # of its own arithmetic: what it guessed before is as good as ever
        except ShardUnavailable:
            draft.close()
            raise
        except ShoalError as error:
            draft.close()
            how_long = candidate.fail(error)
            self._notify(
                f"drafter {candidate.drafter.name} failed and is not used{how_long}: {error}"
            )
        except BaseException:
            draft.close()
            raise

    def ran(self, num_rows: int, seconds: float, hidden: F32 | None = None) -> None:
        """Hear what a pass of the target took, of the prompt too.

        Args: hidden: of its rows whose logits were wanted, see `HiddenDrafter`.
        """
        self._hidden = hidden
        if self._candidates and not self._is_resting:
            self._pass_time.observe(num_rows, seconds)
            self._pass_rows, self._pass_s = num_rows, seconds

    def judged(self, num_right: int, num_judged: int) -> None:
        """Hear how many guesses of the last pass were right, of how many that were compared."""
        draft, self._draft = self._draft, None
        self._tell_hidden(num_right + 1)
        if not self._num_passes or not self._candidates or self._is_resting:
            return
        if draft is None:
            self._count_plain_step()
            return
        self._num_in_vain = 0
        if num_right < len(draft.guesses):
            draft.close()  # what follows a wrong guess is of no use
        elif draft.lead is not None:
            self._lead_of = draft
        draft.cut(self._pass_rows - 1)  # the pass may have been run again without a bad row
        candidate, num_drafted = draft.candidate, len(draft.guesses)
        draft_s = draft.draft_s + candidate.owed_s
        candidate.owed_s = 0.0
        candidate.planner.observe(num_drafted, num_right + 1, self._pass_s, draft_s)
        candidate.judge(draft, num_right, num_judged, self._verified_routing(self._pass_rows))
        for other in self._candidates:
            other.time_step(num_right + 1, self._pass_s + draft_s, is_own=other is candidate)

    def _tell_hidden(self, num_rows: int) -> None:
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            return
        for candidate in self._candidates:
            if isinstance(candidate.drafter, HiddenDrafter):
                candidate.drafter.verified(hidden[:num_rows])

    def _count_plain_step(self) -> None:
        began_s = self._clock()
        # A planner counts what costly drafts in vain took; here is what comes on top of it.
        asking_s = self._asking_s - sum(candidate.owed_s for candidate in self._candidates)
        for candidate in self._candidates:
            candidate.planner.observe(0, 1, self._pass_s, candidate.owed_s)
            candidate.owed_s = 0.0
        self._num_in_vain += 1
        if self._num_in_vain > PATIENCE:
            asking_s += self._clock() - began_s
            share = asking_s / self._pass_time.predict(1)
            self._num_rests = min(MAX_REST, int(share / ASKING_SHARE))

    def end(self) -> None:
        """Let go of what the request's drafts hold. Whatever happened, it is called."""
        for draft in (self._draft, self._lead_of):
            if draft is not None:
                draft.close()
        self._draft = self._lead_of = None

    def figures(self) -> SpeculationFigures:
        """Return what was done for the request so far."""
        per_drafter = {c.drafter.name: c.figures() for c in self._candidates}
        round_trips = self._num_passes * self._round_trips_per_pass
        return SpeculationFigures(
            mode=str(self._mode),
            passes=self._num_passes,
            round_trips=round_trips + sum(f.round_trips for f in per_drafter.values()),
            local_expert_bytes=self._local_expert_bytes,
            per_drafter=per_drafter,
        )

    def close(self) -> None:
        """Close the drafters."""
        for candidate in self._candidates:
            candidate.drafter.close()
        self._candidates = []


def no_speculation() -> Speculator:
    """Return one that never drafts."""
    return Speculator(
        (),
        PassTime(1, 1),
        lambda: 0.0,
        mode=Speculate.OFF,
        vocab_size=0,
        max_draft=0,
        divergence=1.0,
    )


def _is_likely(draft: Draft) -> bool:
    return prod(draft.chances) > LEAST_LIKELY
