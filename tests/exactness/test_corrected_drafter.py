"""The corrected pass as a drafter: the target's own tokens, in fewer passes and round trips."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.cancellation import Cancellation
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.request import FinishReason, GenerationRequest, TokenGenerated
from coordinator.sequence import Sequence
from coordinator.speculation.corrected_drafter import CorrectedDrafter, Recipe
from coordinator.speculation.interface import DraftToken
from coordinator.speculation.shadow_drafter import ShadowDrafter
from coordinator.speculation.shadow_experts import ShadowExperts
from shoal.artifact import Artifact
from shoal.artifact.shadow_build import make_shadow
from shoal.errors import ShardUnavailable
from shoal.ops import SamplingParams
from shoal.quant import Format
from support.corrected import CountingDispatch
from support.speculation import Answer, MakeDrafters, Rig
from support.tiny_model import make_tiny_artifact

NUM_LAYERS = 3
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=5)
REQUEST = GenerationRequest(PROMPT, 60, GREEDY, ignore_eos=True, num_top_logprobs=1)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: a shadow of such a model guesses badly, as no text has any sense."""
    return make_tiny_artifact(tmp_path_factory.mktemp("target"), "qwen3_moe", "bf16")


@pytest.fixture(scope="module")
def shadow(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShadowExperts]:
    path = tmp_path_factory.mktemp("shadow") / "q4.shoal"
    make_shadow(Artifact.open(target), Format.Q4_0, path, lambda _num_bytes: None, force=False)
    with closing(ShadowExperts(Artifact.open(path), lambda _progress: None)) as shadow:
        yield shadow


@pytest.fixture
def dispatch(target: Path) -> CountingDispatch:
    return CountingDispatch(Artifact.open(target))


def batch(shadow: ShadowExperts, dispatch: ExpertDispatch, recipe: Recipe) -> MakeDrafters:
    return lambda parts: [
        CorrectedDrafter(parts.artifact, dispatch, shadow, parts.weights, parts.kv, recipe)
    ]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(2, 3), Recipe(NUM_LAYERS, 5)], ids=str)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_it_leaves_every_bit_as_it_was(
    target: Path,
    shadow: ShadowExperts,
    dispatch: CountingDispatch,
    recipe: Recipe,
    sampling: SamplingParams,
) -> None:
    asked = replace(REQUEST, sampling=sampling)
    with closing(Rig(target)) as alone:
        expected = alone.run(asked).told
    make = batch(shadow, dispatch, recipe)
    with closing(Rig(target, make, dispatch=dispatch)) as rig:
        answer = rig.run(asked)
        assert answer.told == expected
        figures = answer.of("batch")
        assert figures.accepted > 12, "nothing was accepted: a blunt test"
        if recipe.num_sweeps == NUM_LAYERS:
            assert figures.accepted == figures.drafted, "a sweep a layer is exact"
        assert rig.run(asked).told == expected


def test_it_guesses_better_than_its_shadow_alone(
    target: Path, shadow: ShadowExperts, dispatch: CountingDispatch
) -> None:
    passes = {}
    for name, make in (
        ("batch", batch(shadow, dispatch, Recipe())),
        ("shadow", lambda parts: [ShadowDrafter(shadow, parts.weights, parts.kv)]),
    ):
        with closing(Rig(target, make, dispatch=dispatch)) as rig:
            passes[name] = rig.run(REQUEST).passes
    assert passes["batch"] < 0.8 * passes["shadow"], passes


def test_a_turn_asks_all_layers_before_it_waits_and_is_counted(
    target: Path, shadow: ShadowExperts, dispatch: CountingDispatch
) -> None:
    """The log of a draft is turns of (start a layer)*, (wait for a layer)*; a pass starts and waits
    layer by layer.
    """
    with closing(Rig(target, batch(shadow, dispatch, Recipe()), dispatch=dispatch)) as rig:
        figures = rig.run(REQUEST).of("batch")
    starts = [("start", layer) for layer in range(NUM_LAYERS)]
    waits = [("wait", layer) for layer in range(NUM_LAYERS)]
    one_by_one = [event for pair in zip(starts, waits, strict=True) for event in pair]
    num_turns, log = 0, dispatch.log
    while log:
        group, log = log[: 2 * NUM_LAYERS], log[2 * NUM_LAYERS :]
        num_turns += group == starts + waits
        assert group in (starts + waits, one_by_one), group
    assert num_turns == figures.round_trips > 0


def test_a_guess_that_is_there_already_costs_no_round_trip(
    target: Path, shadow: ShadowExperts, dispatch: CountingDispatch
) -> None:
    seen = []

    class Watched(CorrectedDrafter):
        def draft(
            self, sequence: Sequence, cancellation: Cancellation
        ) -> Generator[DraftToken, None, None]:
            with closing(super().draft(sequence, cancellation)) as guesses:
                while True:
                    was_there, before = self.has_guess, self.num_round_trips
                    guess = next(guesses)
                    seen.append((was_there, self.num_round_trips > before))
                    yield guess

    make: MakeDrafters = lambda parts: [  # noqa: E731
        Watched(parts.artifact, dispatch, shadow, parts.weights, parts.kv)
    ]
    with closing(Rig(target, make, dispatch=dispatch)) as rig:
        rig.run(REQUEST)
    assert {(True, False), (False, True)} == set(seen)


def test_a_node_lost_while_guessing_costs_the_guesses_of_that_request_alone(
    target: Path, shadow: ShadowExperts, dispatch: CountingDispatch
) -> None:
    with closing(Rig(target)) as alone:
        expected = alone.run(REQUEST).told
    asking = CountingDispatch(Artifact.open(target))
    asking.fails_in = 1
    with closing(Rig(target, batch(shadow, asking, Recipe()), dispatch=dispatch)) as rig:
        lost = rig.run(REQUEST)
        assert lost.told == expected and lost.of("batch").accepted == 0
        [told] = rig.told
        assert "before the next request" in told and "it is gone" in told
        assert [what for what, _ in asking.log].count("abandon") == NUM_LAYERS - 2

        asking.fails_in = None
        found = rig.run(REQUEST)
        assert found.told == expected and found.of("batch").accepted > 12
        assert rig.told == [told]


def test_a_range_that_nobody_has_any_more_is_waited_for_once(
    target: Path, shadow: ShadowExperts
) -> None:
    """Drafter and pass ask the same nodes. What it fails with has waited for --shard-wait."""
    with closing(Rig(target)) as alone:
        expected = alone.run(REQUEST)
    nodes = CountingDispatch(Artifact.open(target))
    with closing(Rig(target, batch(shadow, nodes, Recipe()), dispatch=nodes)) as rig:
        events = rig.engine.generate(REQUEST, Cancellation())
        told = (event for event in events if isinstance(event, TokenGenerated))
        for _ in range(20):
            next(told)  # it is used to guessing by now
        nodes.fails_in, nodes.error = 1, ShardUnavailable("no node is left for 0-7 (waited 60 s)")
        nodes.log.clear()
        answer = Answer(list(events))
        rig.engine.check_integrity()
        assert answer.finished.reason is FinishReason.ERROR
        assert answer.finished.error is nodes.error and rig.told == []
        starts = [("start", layer) for layer in range(NUM_LAYERS)]
        assert nodes.log[: NUM_LAYERS + 2] == [*starts, ("wait", 0), ("wait", 1)], (
            "the drafter asks"
        )
        assert nodes.log.count(("wait", 1)) == 1

        nodes.fails_in = None
        again = rig.run(REQUEST)
        assert again.told == expected.told and again.of("batch").accepted > 12
