"""Engine: one terminal event with the right reason, whatever happens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.cancellation import Cancellation
from coordinator.engine import Engine, EngineConfig
from coordinator.expert_dispatch import LocalDispatch, PendingSums
from coordinator.kv_arrays import KvArrays
from coordinator.request import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptRead,
    TokenGenerated,
)
from coordinator.tokenizer import Tokenizer
from coordinator.transformer import exact_transformer
from shoal.artifact import Artifact
from shoal.errors import NodeUnreachable, RequestError
from shoal.ops import SamplingParams
from shoal.router import RoutingPlan
from shoal.rows import Rows
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor

PROMPT = (40, 41, 42, 43, 44, 45, 46)
GREEDY = SamplingParams()
MAX_CONTEXT = 200


class BreakableDispatch(LocalDispatch):
    """Experts in this process, until `num_calls_left` fan-outs have passed."""

    num_calls_left: int | None = None

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        if self.num_calls_left is not None:
            self.num_calls_left -= 1
            if self.num_calls_left < 0:
                raise NodeUnreachable("node grpc://a:1 hung up")
        return super().start(layer, rows, plan)


class Rig:
    """An engine on a tiny model, its dispatch in reach, its end-of-sequence ids chosen."""

    def __init__(self, path: Path, eos_ids: list[int], prefill_chunk: int = 4) -> None:
        artifact = Artifact.open(path)
        self.dispatch = BreakableDispatch(whole_executor(artifact))
        self.tokenizer = Tokenizer(artifact.text("tokenizer.json"), {"eos_token_id": eos_ids})
        self.num_layers = artifact.spec.num_layers
        self.engine = Engine(
            exact_transformer(artifact, self.dispatch),
            self.tokenizer,
            lambda num_blocks: KvArrays(artifact.spec, artifact.kv_dtype, num_blocks),
            EngineConfig(MAX_CONTEXT, prefill_chunk),
            lambda: 0.0,
        )

    def run(self, request: GenerationRequest) -> list[Event]:
        events = list(self.engine.generate(request, Cancellation()))
        assert [isinstance(event, Finished) for event in events[:-1]] == [False] * (len(events) - 1)
        self.engine.check_integrity()
        return events


def finished(events: list[Event]) -> Finished:
    last = events[-1]
    assert isinstance(last, Finished)
    return last


def token_ids(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenGenerated)]


def text(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, TokenGenerated | Finished))


def request(**changes: Any) -> GenerationRequest:
    return replace(GenerationRequest(PROMPT, 12, GREEDY), **changes)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("engine"), "qwen3_moe", "f32", seed=3)


@pytest.fixture
def rig(path: Path) -> Iterator[Rig]:
    rig = Rig(path, eos_ids=[])
    yield rig
    rig.dispatch.close()


@pytest.fixture(scope="module")
def greedy_ids(path: Path) -> list[int]:
    ids = token_ids(Rig(path, eos_ids=[]).run(request()))
    assert len(set(ids)) > 4, "a model that repeats itself tests nothing"
    return ids


def test_a_request_ends_at_its_length(rig: Rig, greedy_ids: list[int]) -> None:
    events = rig.run(request(max_tokens=12))
    assert isinstance(events[0], PromptRead)
    assert finished(events).reason is FinishReason.LENGTH
    assert len(greedy_ids) == 12
    assert finished(events).timings.num_generated_tokens == 12


def test_a_request_ends_at_an_end_of_sequence_token_whose_text_is_not_shown(
    path: Path, greedy_ids: list[int]
) -> None:
    eos = greedy_ids[5]
    first = greedy_ids.index(eos)
    rig = Rig(path, eos_ids=[999_999, eos])
    events = rig.run(request())
    assert finished(events).reason is FinishReason.EOS
    assert token_ids(events) == greedy_ids[: first + 1]
    assert text(events) == rig.tokenizer.decode(greedy_ids[:first])


def test_ignoring_end_of_sequence_goes_on(path: Path, greedy_ids: list[int]) -> None:
    events = Rig(path, eos_ids=[greedy_ids[2]]).run(request(ignore_eos=True))
    assert token_ids(events) == greedy_ids
    assert finished(events).reason is FinishReason.LENGTH


def test_a_request_ends_before_a_stop_string(rig: Rig, greedy_ids: list[int]) -> None:
    whole = rig.tokenizer.decode(greedy_ids)
    stop = whole[4:7]
    events = rig.run(request(stop=(stop, "never to be seen")))
    assert finished(events).reason is FinishReason.STOP
    assert text(events) == whole[: whole.index(stop)]


def test_text_held_back_for_a_stop_string_that_never_completes_comes_at_the_end(
    rig: Rig, greedy_ids: list[int]
) -> None:
    whole = rig.tokenizer.decode(greedy_ids)
    events = rig.run(request(stop=(whole[-2:] + "and more",)))
    assert finished(events).reason is FinishReason.LENGTH
    assert text(events) == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_ids": ()}, "empty"),
        ({"prompt_ids": (5, -1)}, "prompt id -1 at index 1"),
        ({"prompt_ids": (5, 10**6)}, "prompt id 1000000 at index 1"),
        ({"prompt_ids": (5,) * MAX_CONTEXT}, "shorten the prompt"),
        ({"max_tokens": MAX_CONTEXT - 6}, "set max_tokens to at most 193"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"stop": ("a", "")}, "empty"),
        ({"num_top_logprobs": -1}, "top_logprobs = -1"),
    ],
)
def test_what_cannot_be_served_is_refused_before_any_work(
    rig: Rig, changes: dict[str, Any], words: str
) -> None:
    rig.dispatch.num_calls_left = 0
    with pytest.raises(RequestError, match=words):
        rig.engine.generate(request(**changes), Cancellation())


def test_a_request_that_fills_the_context_exactly_is_served(rig: Rig) -> None:
    events = rig.run(request(prompt_ids=(9,) * (MAX_CONTEXT - 3), max_tokens=3))
    assert len(token_ids(events)) == 3


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_lost_node_ends_the_request_and_not_the_engine(
    rig: Rig, greedy_ids: list[int], after: int
) -> None:
    rig.dispatch.num_calls_left = after * rig.num_layers + 1
    events = rig.run(request())
    assert finished(events).reason is FinishReason.ERROR
    assert isinstance(finished(events).error, NodeUnreachable)
    assert len(token_ids(events)) < len(greedy_ids)
    rig.dispatch.num_calls_left = None
    assert token_ids(rig.run(request())) == greedy_ids


def test_a_cancelled_request_stops_within_a_pass_and_leaves_no_trace(
    rig: Rig, greedy_ids: list[int]
) -> None:
    cancellation = Cancellation()
    events: list[Event] = []
    for event in rig.engine.generate(request(), cancellation):
        events.append(event)
        if len(token_ids(events)) == 3:
            cancellation.request()
    assert finished(events).reason is FinishReason.CANCELLED
    assert token_ids(events) == greedy_ids[:3]
    assert token_ids(rig.run(request())) == greedy_ids


def test_a_caller_who_walks_away_leaves_the_engine_usable(rig: Rig, greedy_ids: list[int]) -> None:
    abandoned = rig.engine.generate(request(), Cancellation())
    next(abandoned)
    next(abandoned)
    del abandoned
    assert token_ids(rig.run(request())) == greedy_ids


def test_the_kv_of_a_shared_prefix_is_reused_and_changes_nothing(path: Path) -> None:
    longer = (*PROMPT, 60, 61, 62, 63)
    fresh = Rig(path, eos_ids=[]).run(request(prompt_ids=longer, num_top_logprobs=3))
    rig = Rig(path, eos_ids=[])
    rig.run(request())
    again = rig.run(request(prompt_ids=longer, num_top_logprobs=3))
    assert finished(fresh).timings.num_reused_tokens == 0
    assert finished(again).timings.num_reused_tokens >= len(PROMPT)
    assert finished(fresh).logits_digest == finished(again).logits_digest
    assert token_ids(fresh) == token_ids(again)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(rig: Rig) -> None:
    warm = SamplingParams(temperature=1.5, top_k=50, top_p=0.95, seed=11)
    first = token_ids(rig.run(request(sampling=warm)))
    assert token_ids(rig.run(request(sampling=warm))) == first
    assert token_ids(rig.run(request(sampling=replace(warm, seed=12)))) != first


def test_the_digest_of_logits_tells_models_apart_and_needs_logprobs(rig: Rig) -> None:
    assert finished(rig.run(request())).logits_digest is None
    one = finished(rig.run(request(num_top_logprobs=0))).logits_digest
    two = finished(rig.run(request(num_top_logprobs=0))).logits_digest
    other = finished(rig.run(request(prompt_ids=(1, 2), num_top_logprobs=0))).logits_digest
    assert one == two != other


def test_the_likeliest_logprobs_come_first_and_hold_the_greedy_choice(rig: Rig) -> None:
    for event in rig.run(request(num_top_logprobs=4)):
        if isinstance(event, TokenGenerated):
            logprobs = [candidate.logprob for candidate in event.top_logprobs]
            assert logprobs == sorted(logprobs, reverse=True)
            assert event.top_logprobs[0].token_id == event.token_id
            assert event.logprob == logprobs[0] < 0
