"""CorrectedDrafter: a shadow guesses, and a round trip for all layers at once tells where it erred.

    rows      [ 0 ...... settled ...... end )
                told      being swept    the shadow's next

Row i runs token i of the draft; its logits choose token i + 1. A turn is one round trip:

1. The shadow goes on from the last row, as the target's own layers with coarser experts.
2. The true experts are asked for all rows that are not settled, all layers together, and a
   corrected pass (coordinator.corrected) runs these rows again.
3. Where a row now chooses another token than the shadow did, that one takes its place; the rows
   behind it are forgotten, the next turn begins there.
4. Rows that were swept often enough are settled: their tokens are told.

The target's exact KV is read through a fork; what is written lies in blocks of the fork's own.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from coordinator.array_types import F32
from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.corrected.experts import CorrectedExperts, WindowPass
from coordinator.corrected.surrogate import Shadow
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.request import GenerationRequest
from coordinator.sampler import choose
from coordinator.sequence import Sequence
from coordinator.speculation.interface import DraftToken
from coordinator.speculation.model_passes import chance_of
from coordinator.speculation.shadow_drafter import fork_with_kv
from coordinator.speculation.shadow_experts import ShadowExperts
from coordinator.transformer import Transformer
from coordinator.weights import ModelWeights
from shoal import limits
from shoal.artifact import Artifact


@dataclass(frozen=True, slots=True)
class Recipe:
    """How much is guessed and how often it is swept; docs/batch-dispatch.md has the measurements.

    num_sweeps: of a row before its token is told; one round trip each, which the rows of a turn
        share.
    max_new: rows that the shadow adds in a turn: its guesses beyond its first error are wasted.
    """

    num_sweeps: int = 1
    max_new: int = 8


class CorrectedDrafter:
    """Guesses with a shadow and a few round trips, for links where each layer's is dear."""

    def __init__(
        self,
        target: Artifact,
        dispatch: ExpertDispatch,
        shadow: ShadowExperts,
        weights: ModelWeights,
        kv: KvArrays,
        recipe: Recipe | None = None,
    ) -> None:
        """Args:
        target, dispatch, weights, kv: of the model that verifies; its experts are asked too.
        shadow: may have other users; it stays open.
        """
        surrogate = Shadow(shadow.artifact, shadow.dispatch)
        self._experts = CorrectedExperts(target, dispatch, surrogate)
        self._transformer = Transformer(target.spec, weights, self._experts)
        self._local_expert_bytes = shadow.num_bytes
        self._kv = kv
        self._recipe = recipe or Recipe()
        self._request: GenerationRequest | None = None
        self._draft: _Draft | None = None  # while it is iterated

    @property
    def name(self) -> str:
        return "batch"

    @property
    def local_expert_bytes(self) -> int:
        return self._local_expert_bytes

    @property
    def has_guess(self) -> bool:
        """See `AskingDrafter`: one turn settles several rows."""
        return self._draft is not None and self._draft.has_settled

    @property
    def num_round_trips(self) -> int:
        """So far."""
        return self._experts.num_round_trips

    def begin(self, request: GenerationRequest) -> None:
        """See `Drafter.begin`."""
        self._request = request

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        """See `Drafter.draft`. Raises also what the experts' calls bring."""
        assert self._request is not None, "a draft before its request"
        # One more than is told: the row that is being guessed.
        fork = fork_with_kv(sequence, self._kv, sequence.num_tokens + limits.MAX_DRAFT)
        if fork is None:
            return
        self._draft = draft = _Draft(fork, self._request, self._recipe)
        runner = _Runner(self._transformer, self._experts, self._kv, cancellation)
        try:
            while draft.num_told < limits.MAX_DRAFT:
                draft.extend(runner)
                draft.sweep(runner)
                yield from draft.settle()
        finally:
            self._draft = None
            self._experts.abandon()
            fork.truncate(0)

    def close(self) -> None:
        """See `Drafter.close`."""


class _Runner:
    """Passes over rows of a fork: by the shadow alone, or corrected."""

    def __init__(
        self,
        transformer: Transformer,
        experts: CorrectedExperts,
        kv: KvArrays,
        cancellation: Cancellation,
    ) -> None:
        self._transformer = transformer
        self._experts = experts
        self._kv = kv
        self._cancellation = cancellation

    def guess(self, fork: Sequence, row: int) -> F32:
        """Run the last token of a fork, a draft's row; return its logits [V]."""
        self._experts.begin(WindowPass(row, row + 1, is_sweep=False, asks=False))
        logits: F32 = self._run(fork, 1)[0]
        return logits

    def sweep(self, fork: Sequence, first: int, end: int) -> F32:
        """Ask the experts of rows first .. end - 1, run these again; logits [end - first, V]."""
        self._experts.ask(first, end)
        self._experts.begin(WindowPass(first, end, is_sweep=True, asks=False))
        return self._run(fork, end - first)

    def _run(self, fork: Sequence, num_rows: int) -> F32:
        batch = make_batch([Piece(fork, num_rows, num_rows)])
        logits = self._transformer.forward(batch, self._kv, self._cancellation)
        fork.advance(num_rows)
        return logits


class _Draft:
    """The state of one draft: its rows' tokens are the fork's from `_base` on."""

    def __init__(self, fork: Sequence, request: GenerationRequest, recipe: Recipe) -> None:
        self._fork = fork
        self._request = request
        self._recipe = recipe
        self._base = fork.num_tokens - 1  # the place of row 0, the last verified token
        self._sweeps: list[int] = []  # of each row that was run
        self._chances: list[float] = []  # of the token that each of these rows chose
        self.num_told = 0

    def extend(self, runner: _Runner) -> None:
        """Let the shadow go on from the last token."""
        begin = len(self._sweeps)
        for row in range(begin, min(begin + self._recipe.max_new, limits.MAX_DRAFT)):
            self._choose(row, runner.guess(self._fork, row))
            self._sweeps.append(0)

    def sweep(self, runner: _Runner) -> None:
        """Correct the rows that are not settled, and cut behind the first that errs."""
        first, end = self.num_told, len(self._sweeps)
        self._rewind(self._base + first)
        logits = runner.sweep(self._fork, first, end)
        for row in range(first, end):
            self._sweeps[row] += 1
            if self._choose(row, logits[row - first]):
                del self._sweeps[row + 1 :], self._chances[row + 1 :]
                return

    @property
    def has_settled(self) -> bool:
        """Whether the next row to tell was swept often enough."""
        row = self.num_told
        return row < len(self._sweeps) and self._sweeps[row] >= self._recipe.num_sweeps

    def settle(self) -> Iterator[DraftToken]:
        """Tell the tokens of rows that were swept often enough."""
        while self.has_settled:
            row = self.num_told
            self.num_told += 1
            token_id = int(self._fork.token_ids[self._base + row + 1])
            yield DraftToken(token_id, self._chances[row])

    def _choose(self, row: int, logits: F32) -> bool:
        """Set the token behind a row, forgetting what lay there if it differs: then return True."""
        fork, place = self._fork, self._base + row + 1
        choice = choose(logits, self._request, fork.token_ids[:place])
        chance = chance_of(logits, choice.token_id)
        is_new = row == len(self._chances)
        if is_new:
            self._chances.append(chance)
        else:
            self._chances[row] = chance
            if fork.token_ids[place] == choice.token_id:
                return False
            fork.truncate(place)
        fork.extend([choice.token_id])
        self._reserve()
        return not is_new

    def _rewind(self, place: int) -> None:
        """Have the tokens from `place` on run again."""
        again = self._fork.token_ids[place:].copy()
        self._fork.truncate(place)
        self._fork.extend(again)
        self._reserve()

    def _reserve(self) -> None:
        reserved = self._fork.try_reserve(self._fork.num_tokens)
        assert reserved, "the fork held these blocks before"
