"""The corrected pass on tiny models: what it converges to, what travels when, and how it fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.cancellation import Cancellation, Cancelled
from coordinator.corrected.compose import (
    MoeDispatchFigures,
    announce,
    check_shadow,
    figures_of,
)
from coordinator.corrected.config import MoeDispatch, MoeDispatchConfig
from coordinator.corrected.corrected_pass import CorrectedPass
from coordinator.corrected.surrogate import expert_bits
from coordinator.engine import Engine, EngineConfig
from coordinator.kv_arrays import KvArrays
from coordinator.request import Finished, GenerationRequest, PromptRead, TokenGenerated
from coordinator.tokenizer import NoTokenizer
from shoal.artifact import Artifact
from shoal.errors import NodeUnreachable, UsageError
from shoal.ops import SamplingParams
from support.corrected import PROMPT, Passes
from support.tiny_model import make_tiny_artifact

F32 = NDArray[np.float32]
NUM_LAYERS = 4


@pytest.fixture(scope="module", params=["qwen3_moe", "llama"])
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A target and its stand-in."""
    folder = tmp_path_factory.mktemp("corrected")
    family = request.param
    geometry: dict[str, Any] = {"num_hidden_layers": NUM_LAYERS, "intermediate_size": 512}
    target = make_tiny_artifact(folder, family, "bf16", name="target", **geometry)
    shadow = make_tiny_artifact(folder, family, "q4_0", name="shadow", **geometry)
    return target, shadow


@pytest.fixture(scope="module")
def passes(paths: tuple[Path, Path]) -> Passes:
    return Passes(*paths)


def distance(a: F32, b: F32) -> float:
    return float(np.abs(a - b).max())


def test_as_many_sweeps_as_layers_give_the_exact_logits_bit_for_bit(passes: Passes) -> None:
    exact = passes.logits(None)
    assert passes.logits(NUM_LAYERS).tobytes() == exact.tobytes()
    assert passes.logits(NUM_LAYERS - 1).tobytes() != exact.tobytes(), "a blunt test"


def test_a_sweep_comes_nearer_to_the_exact_logits(passes: Passes) -> None:
    exact = passes.logits(None)
    far = [distance(passes.logits(num_sweeps), exact) for num_sweeps in (1, 2, 3)]
    assert far[0] > far[1] > far[2] > 0
    assert far[0] < float(np.abs(exact).max())


def test_a_sweep_sends_every_layers_call_before_it_waits_for_any(passes: Passes) -> None:
    before = passes.experts.num_round_trips
    passes.logits(1)
    starts = [("start", layer) for layer in range(NUM_LAYERS)]
    waits = [("wait", layer) for layer in range(NUM_LAYERS)]
    assert passes.counting.log == starts + waits
    assert passes.experts.num_round_trips - before == 1


def test_each_further_sweep_is_one_more_round_trip(passes: Passes) -> None:
    """A layer's next call leaves once its last answer is there, and nobody waits for it."""
    before = passes.experts.num_round_trips
    passes.logits(3)
    log = passes.counting.log
    assert [what for what, _ in log].count("start") == 3 * NUM_LAYERS
    per_layer = [[what for what, layer in log if layer == index] for index in range(NUM_LAYERS)]
    assert per_layer == [["start", "wait"] * 3] * NUM_LAYERS
    assert passes.experts.num_round_trips - before == 3


def test_a_lost_answer_fails_the_pass_and_takes_the_other_calls_back(passes: Passes) -> None:
    passes.counting.fails_in = 1
    try:
        with pytest.raises(NodeUnreachable):
            passes.logits(2)
    finally:
        passes.counting.fails_in = None
    ended = [layer for what, layer in passes.counting.log if what in ("wait", "abandon")]
    started = [layer for what, layer in passes.counting.log if what == "start"]
    assert sorted(ended) == sorted(started), "a call was left behind"
    assert passes.logits(NUM_LAYERS).tobytes() == passes.logits(None).tobytes()


def test_a_cancelled_pass_leaves_no_call_behind(passes: Passes) -> None:
    class CancelledInTheSecondPass(Cancellation):
        num_checks = 0

        def check(self) -> None:
            self.num_checks += 1
            if self.num_checks == NUM_LAYERS + 2:
                raise Cancelled

    with pytest.raises(Cancelled):
        passes.logits(2, CancelledInTheSecondPass())
    log = passes.counting.log
    assert [what for what, _ in log].count("abandon") == NUM_LAYERS
    assert passes.logits(NUM_LAYERS).tobytes() == passes.logits(None).tobytes()


def test_calls_ahead_are_bounded_and_the_result_is_the_same(paths: tuple[Path, Path]) -> None:
    passes = Passes(*paths, max_calls_ahead=2)
    exact = passes.logits(None)
    assert passes.logits(NUM_LAYERS).tobytes() == exact.tobytes()
    in_flight = most = 0
    for what, _ in passes.counting.log:
        in_flight += 1 if what == "start" else -1
        most = max(most, in_flight)
    assert most == 2


def test_the_bits_of_a_weight_are_those_of_its_format(tmp_path: Path) -> None:
    for quant, bits in (("q4_0", 4.5), ("bf16", 16.0)):
        path = make_tiny_artifact(tmp_path, "qwen3_moe", quant, name=quant, num_hidden_layers=1)
        assert expert_bits(Artifact.open(path)) == bits


class Answers:
    """An engine whose answers are exact, or of a corrected pass; what a request brought."""

    def __init__(self, passes: Passes, artifact: Artifact, num_sweeps: int | None) -> None:
        approximate = None
        if num_sweeps is not None:
            approximate = CorrectedPass(passes.corrected, passes.experts, num_sweeps)
        self.engine = Engine(
            passes.exact,
            NoTokenizer({}),
            lambda num_blocks: KvArrays(artifact.spec, artifact.kv_dtype, num_blocks),
            EngineConfig(max_context=128),
            lambda: 0.0,
            approximate=approximate,
        )

    def ask(self, prompt_ids: tuple[int, ...]) -> tuple[list[int], int, str | None]:
        """Return the answer's ids, how much of the prompt was reused, and the logits' digest."""
        request = GenerationRequest(
            prompt_ids, 8, SamplingParams(), ignore_eos=True, num_top_logprobs=0
        )
        events = list(self.engine.generate(request, Cancellation()))
        self.engine.check_integrity()
        [read] = [event for event in events if isinstance(event, PromptRead)]
        ids = [event.token_id for event in events if isinstance(event, TokenGenerated)]
        finished = events[-1]
        assert isinstance(finished, Finished)
        return ids, read.num_reused, finished.logits_digest


def test_an_engine_reads_prompts_exactly_and_forgets_approximate_kv(passes: Passes) -> None:
    """An answer that comes back as part of the next prompt is read again: rule 8."""
    exact, rough = Answers(passes, passes.artifact, None), Answers(passes, passes.artifact, 1)
    prompt = tuple(PROMPT)
    for _ in range(2):
        ids, _, digest = exact.ask(prompt)
        rough_ids, num_reused, rough_digest = rough.ask(prompt)
        assert rough_ids[0] == ids[0], "the first token follows the prompt, which is read exactly"
        assert rough_digest != digest, "a blunt test: nothing is approximate"
        assert num_reused <= len(prompt)
        prompt = (*prompt, *rough_ids, 7)
    _, num_reused, _ = rough.ask(prompt)
    assert num_reused == len(prompt) - 9, "of the last turn its prompt, and no token of its answer"


def test_an_engine_with_a_sweep_a_layer_says_what_the_exact_one_says(passes: Passes) -> None:
    exact = Answers(passes, passes.artifact, None)
    whole = Answers(passes, passes.artifact, NUM_LAYERS)
    ids, _, digest = exact.ask(tuple(PROMPT))
    whole_ids, _, whole_digest = whole.ask(tuple(PROMPT))
    assert (whole_ids, whole_digest) == (ids, digest)


def test_batch_mode_is_refused_where_its_text_would_be_garbage() -> None:
    for shadow, guesses, words in (
        (None, False, "needs --shadow.*shoal shadow MODEL OUT --format q4"),
        ("q4", True, "do not go together.*--speculate batch"),
    ):
        with pytest.raises(UsageError, match=words):
            MoeDispatchConfig(MoeDispatch.BATCH).check(shadow, guesses)
    MoeDispatchConfig(MoeDispatch.BATCH, 2).check("q4", False)
    MoeDispatchConfig(MoeDispatch.AUTO).check(None, True)


@pytest.mark.parametrize("mode", [MoeDispatch.AUTO, MoeDispatch.STREAM])
def test_a_number_of_sweeps_needs_a_mode_that_sweeps(mode: MoeDispatch) -> None:
    with pytest.raises(UsageError, match="--moe-iters does nothing"):
        MoeDispatchConfig(mode, 2)
    assert MoeDispatchConfig(mode).is_exact


@pytest.mark.parametrize("num_iters", [0, 9])
def test_a_number_of_sweeps_has_bounds(num_iters: int) -> None:
    with pytest.raises(UsageError, match=r"must be in 1\.\.8"):
        MoeDispatchConfig(MoeDispatch.BATCH, num_iters)


def test_a_stand_in_of_too_few_bits_is_refused(passes: Passes) -> None:
    check_shadow(passes.coarse)
    with pytest.raises(UsageError, match=r"4\.\d bits a weight.*needs 5 or more"):
        check_shadow(passes.coarse, min_bits=5.0)


def told(rtt_ms: float | None, could_guess: bool = True, asked: str = "auto") -> list[str]:
    out: list[str] = []
    figures = MoeDispatchFigures(MoeDispatch(asked), MoeDispatch.STREAM, link_rtt_ms=rtt_ms)
    announce(figures, 30, could_guess, out.append)
    return out


def test_auto_stays_exact_and_tells_of_a_slow_link_what_helps() -> None:
    [text] = told(45.0)
    assert "45 ms away: 30 round trips allow 0.7 passes a second" in text and "--shadow q4" in text
    assert not told(45.0, could_guess=False), "somebody who guesses needs no advice"
    assert not told(45.0, asked="stream"), "nobody asked"
    assert not told(0.2) and not told(None)
    assert figures_of(MoeDispatchConfig(), None, 0.045).is_exact
