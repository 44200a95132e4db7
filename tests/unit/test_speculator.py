"""Speculation in the engine: guesses cost rows, never a token, an error or a KV block."""

import itertools
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.expert_dispatch import LocalDispatch, PendingSums
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool
from coordinator.request import FinishReason, GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.interface import DraftToken
from shoal.artifact import Artifact
from shoal.errors import CorruptArtifact, NodeUnreachable, NumericError, ShoalError
from shoal.ops import SamplingParams
from shoal.router import RoutingPlan
from shoal.rows import Rows
from support.speculation import Answer, MakeDrafters, Rig, ScriptedDrafter
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor

PROMPT = (40, 41, 42, 43, 44, 45, 46)
ASKED = GenerationRequest(PROMPT, 24, SamplingParams(), ignore_eos=True, num_top_logprobs=1)


class WatchedDispatch(LocalDispatch):
    """Experts in this process; `before` is called with each fan-out's layer and rows."""

    before: Callable[[int, Rows], None] = staticmethod(lambda _layer, _rows: None)

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        self.before(layer, rows)
        return super().start(layer, rows, plan)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("speculator"), "qwen3_moe", "f32", seed=3)


@pytest.fixture(scope="module")
def expected(path: Path) -> Answer:
    with closing(Rig(path)) as rig:
        answer = rig.run(ASKED)
    assert len(set(answer.token_ids)) > 8, "a model that repeats itself tests nothing"
    return answer


@pytest.fixture
def dispatch(path: Path) -> WatchedDispatch:
    return WatchedDispatch(whole_executor(Artifact.open(path)))


def make_rig(path: Path, drafter: ScriptedDrafter, dispatch: WatchedDispatch | None = None) -> Rig:
    return Rig(path, lambda _: [drafter], dispatch=dispatch)


def right(expected: Answer) -> ScriptedDrafter:
    """A drafter that knows the answer."""
    answer = [*PROMPT, *expected.token_ids]
    return ScriptedDrafter(lambda ids: answer[len(ids)] if len(ids) < len(answer) else None)


def half_right(expected: Answer) -> ScriptedDrafter:
    """It errs at every fifth place."""
    answer = [*PROMPT, *expected.token_ids]

    def next_id(ids: list[int]) -> int | None:
        if len(ids) >= len(answer):
            return None
        return answer[len(ids)] if len(ids) % 5 else (answer[len(ids)] + 1) % 200

    return ScriptedDrafter(next_id)


def test_right_guesses_save_passes_and_change_nothing(path: Path, expected: Answer) -> None:
    drafter = right(expected)
    with closing(make_rig(path, drafter)) as rig:
        answer = rig.run(ASKED)
    assert answer.told == expected.told
    assert answer.passes + answer.of("scripted").accepted == 23
    assert answer.passes < 8
    assert drafter.num_closed > 0


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda ids: 7,
        lambda ids: ids[-1],
        lambda ids: (31 * len(ids)) % 200,
        lambda ids: 10**9,  # no token at all
        lambda ids: -1,
        lambda ids: None,
    ],
)
def test_nonsense_costs_rows_and_changes_nothing(
    nonsense: Callable[[list[int]], int | None], path: Path, expected: Answer
) -> None:
    with closing(make_rig(path, ScriptedDrafter(nonsense))) as rig:
        for _ in range(2):
            assert rig.run(ASKED).told == expected.told


def test_errors_within_drafts_are_cut_at_the_first(path: Path, expected: Answer) -> None:
    with closing(make_rig(path, half_right(expected))) as rig:
        answer = rig.run(ASKED)
    assert answer.told == expected.told
    assert 0 < answer.of("scripted").accepted < answer.of("scripted").drafted


@pytest.mark.parametrize("bad_rows", [(2,), (1, 3), (4,), ()])
def test_a_value_that_only_a_guess_brings_about_does_not_fail_the_request(
    bad_rows: tuple[int, ...], path: Path, expected: Answer, dispatch: WatchedDispatch
) -> None:
    """The pass is run again without the rows from the bad one on."""
    seen: list[int] = []

    def refuse(layer: int, rows: Rows) -> None:
        seen.append(rows.num_rows)
        has_them = rows.num_rows > max(bad_rows, default=1)
        if layer == 1 and has_them and rows.num_rows != len(PROMPT):
            raise NumericError("a value that is too large", bad_rows)

    dispatch.before = refuse
    with closing(make_rig(path, half_right(expected), dispatch)) as rig:
        answer = rig.run(ASKED)
    assert answer.told == expected.told
    assert answer.finished.reason is FinishReason.LENGTH
    assert max(bad_rows, default=1) + 1 in seen, "no pass had such a row"


def test_a_bad_value_of_the_text_itself_fails_the_request_as_without_guesses(
    path: Path, expected: Answer
) -> None:
    def run(make_drafters: MakeDrafters | None) -> Answer:
        dispatch = WatchedDispatch(whole_executor(Artifact.open(path)))
        passes = itertools.count()

        def refuse(layer: int, rows: Rows) -> None:
            if layer == 0 and next(passes) >= 3:
                raise NumericError("a value that is too large", tuple(range(rows.num_rows)))

        dispatch.before = refuse
        with closing(Rig(path, make_drafters, dispatch=dispatch)) as rig:
            return rig.run(ASKED)

    plain, guessed = run(None), run(lambda _: [half_right(expected)])
    assert plain.finished.reason is guessed.finished.reason is FinishReason.ERROR
    assert str(plain.finished.error) == str(guessed.finished.error)
    assert 0 < len(guessed.token_ids) < len(expected.token_ids)
    assert guessed.token_ids == expected.token_ids[: len(guessed.token_ids)]


@pytest.mark.parametrize("number", [6, 9, 13])
def test_a_lost_node_or_a_cancellation_amid_a_verifying_pass_leaves_the_engine_as_it_was(
    number: int, path: Path, expected: Answer, dispatch: WatchedDispatch
) -> None:
    """Whichever fan-out it happens at."""

    def strike_at(number: int, cancellation: Cancellation, *, is_lost: bool) -> None:
        count = iter(range(1000))

        def strike(layer: int, rows: Rows) -> None:
            if next(count) == number:
                cancellation.request()
                if is_lost:
                    raise NodeUnreachable("node grpc://a:1 hung up")

        dispatch.before = strike

    with closing(make_rig(path, half_right(expected), dispatch)) as rig:
        for is_lost in (True, False):
            cancellation = Cancellation()
            strike_at(number, cancellation, is_lost=is_lost)
            answer = rig.run(ASKED, cancellation)
            wanted = FinishReason.ERROR if is_lost else FinishReason.CANCELLED
            assert answer.finished.reason is wanted
            assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
            dispatch.before = lambda layer, rows: None
            assert rig.run(ASKED).told == expected.told


class FailingDrafter(ScriptedDrafter):
    """Guesses one token, then fails."""

    def __init__(self, error: ShoalError) -> None:
        super().__init__(lambda ids: 7)
        self._error = error
        self.num_asked = 0

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        self.num_asked += 1
        yield DraftToken(7, 0.9)
        raise self._error


def test_a_drafter_that_fails_is_told_of_once_and_not_asked_again(
    path: Path, expected: Answer
) -> None:
    drafter = FailingDrafter(CorruptArtifact("expert 3 of layer 1 is damaged"))
    with closing(make_rig(path, drafter)) as rig:
        assert rig.run(ASKED).told == expected.told
        assert rig.run(ASKED).told == expected.told
        assert drafter.num_asked == 1
        assert rig.told == ["drafter scripted failed and is not used: " + str(drafter._error)]


def test_a_drafter_whose_own_arithmetic_overflows_only_guesses_less(
    path: Path, expected: Answer
) -> None:
    drafter = FailingDrafter(NumericError("a row of the drafter's"))
    with closing(make_rig(path, drafter)) as rig:
        answer = rig.run(ASKED)
        assert answer.told == expected.told
        assert drafter.num_asked > 1 and rig.told == []
        assert answer.of("scripted").drafted > 0


class ListeningDrafter(ScriptedDrafter):
    """Keeps the hidden rows that it hears of, and how long the text was at each draft."""

    def __init__(self, next_id: Callable[[list[int]], int | None]) -> None:
        super().__init__(next_id)
        self.heard: list[NDArray[np.float32]] = []
        self.at_drafts: list[tuple[int, int]] = []  # rows heard, tokens of the text

    def verified(self, hidden: NDArray[np.float32]) -> None:
        self.heard.append(hidden.copy())

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        self.at_drafts.append((sum(map(len, self.heard)), sequence.num_tokens))
        return super().draft(sequence, cancellation)


def test_a_drafter_may_hear_the_hidden_row_of_every_token_of_the_text(
    path: Path, expected: Answer
) -> None:
    """From the prompt's last token on, bit by bit what one pass over the whole text computes: rows
    of guesses that were wrong are not among them.
    """
    drafter = ListeningDrafter(half_right(expected)._next_id)
    with closing(make_rig(path, drafter)) as rig:
        answer = rig.run(ASKED)
        assert answer.told == expected.told
        assert answer.of("scripted").accepted < answer.of("scripted").drafted, "none was wrong"
        ids = [*PROMPT, *expected.token_ids]
        sequence = Sequence(KvBlockPool(8))
        sequence.extend(ids)
        assert sequence.try_reserve(len(ids))
        batch = make_batch([Piece(sequence, len(ids), len(ids))])
        kv = KvArrays(rig.artifact.spec, rig.artifact.kv_dtype, 8)
        whole = rig.engine._transformer.run_layers(batch, kv, Cancellation())
        sequence.truncate(0)
    heard = np.concatenate(drafter.heard)
    start = len(PROMPT) - 1
    assert heard.tobytes() == whole[start : start + len(heard)].tobytes()
    assert len(heard) >= len(expected.token_ids) - 1
    assert drafter.at_drafts and all(
        num_heard == num_tokens - len(PROMPT) for num_heard, num_tokens in drafter.at_drafts
    ), "the last token's own row is yet to come"


def test_the_better_of_two_drafters_is_chosen(path: Path, expected: Answer) -> None:
    bad, good = ScriptedDrafter(lambda ids: 7, chance=0.3), right(expected)
    bad.name = "bad"
    with closing(Rig(path, lambda _: [bad, good])) as rig:
        answer = rig.run(ASKED)
    assert answer.told == expected.told
    assert answer.of("scripted").accepted > 12 > answer.of("bad").drafted


def test_figures_are_of_one_request_and_count_only_its_decode(path: Path, expected: Answer) -> None:
    with closing(make_rig(path, right(expected))) as rig:
        first, second = rig.run(ASKED), rig.run(replace(ASKED, max_tokens=9))
    assert second.of("scripted").drafted <= 8 < first.of("scripted").drafted
    assert second.passes + second.of("scripted").accepted == 8


class AheadDrafter(ScriptedDrafter):
    """One that takes time, as `Lead` understands it. `is_ahead` is set by a guess on its thread."""

    local_expert_bytes = 1

    def __init__(self, next_id: Callable[[list[int]], int | None]) -> None:
        super().__init__(self._next)
        self._answer = next_id
        self.is_ahead = threading.Event()

    def _next(self, ids: list[int]) -> int | None:
        if threading.current_thread().name == LEAD:
            self.is_ahead.set()
        return self._answer(ids)


LEAD = "draft-ahead"


def leads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == LEAD]


def wait_for_a_guess(drafter: AheadDrafter, dispatch: WatchedDispatch) -> None:
    """Have every pass that a lead accompanies wait until that has guessed something."""

    def wait(layer: int, rows: Rows) -> None:
        if layer == 0 and leads():
            assert drafter.is_ahead.wait(30)
            drafter.is_ahead.clear()

    dispatch.before = wait


def test_what_was_guessed_beside_a_pass_begins_the_next_draft(
    path: Path, expected: Answer, dispatch: WatchedDispatch
) -> None:
    drafter = AheadDrafter(right(expected)._next_id)
    wait_for_a_guess(drafter, dispatch)
    with closing(
        Rig(path, lambda _: [drafter], max_draft=4, round_trips=1, dispatch=dispatch)
    ) as rig:
        answer = rig.run(ASKED)
        assert not leads()
        assert answer.told == expected.told
        assert answer.of("scripted").ahead > 0
        assert drafter.num_opened < answer.of("scripted").passes, "it went on with the same draft"
        assert drafter.num_closed == drafter.num_opened


def test_what_was_guessed_behind_an_error_is_dropped_at_once(
    path: Path, expected: Answer, dispatch: WatchedDispatch
) -> None:
    drafter = AheadDrafter(half_right(expected)._next_id)
    with closing(
        Rig(path, lambda _: [drafter], max_draft=4, round_trips=1, dispatch=dispatch)
    ) as rig:
        for _ in range(2):
            assert rig.run(ASKED).told == expected.told
            assert not leads() and drafter.num_closed == drafter.num_opened > 0


@pytest.mark.parametrize("num_events", [4, 8, 15])
def test_a_caller_who_leaves_or_cancels_ends_what_goes_on_beside_a_pass(
    num_events: int, path: Path, expected: Answer
) -> None:
    drafter = AheadDrafter(right(expected)._next_id)
    with closing(Rig(path, lambda _: [drafter], max_draft=4, round_trips=1)) as rig:
        abandoned = rig.engine.generate(ASKED, Cancellation())
        for _ in range(num_events):
            next(abandoned)
        del abandoned
        assert not leads() and drafter.num_closed == drafter.num_opened
        cancellation = Cancellation()
        for number, _ in enumerate(rig.engine.generate(ASKED, cancellation), 1):
            if number == num_events:
                cancellation.request()
        assert not leads() and drafter.num_closed == drafter.num_opened
        assert rig.run(ASKED).told == expected.told


def test_a_bug_beside_a_pass_is_raised_and_not_lost(
    path: Path, expected: Answer, dispatch: WatchedDispatch
) -> None:
    answer = right(expected)._next_id

    def next_id(ids: list[int]) -> int | None:
        assert threading.current_thread().name != LEAD, "a bug"
        return answer(ids)

    drafter = AheadDrafter(next_id)
    wait_for_a_guess(drafter, dispatch)
    with (
        closing(
            Rig(path, lambda _: [drafter], max_draft=4, round_trips=1, dispatch=dispatch)
        ) as rig,
        pytest.raises(AssertionError, match="a bug"),
    ):
        rig.run(ASKED)
    assert not leads()
