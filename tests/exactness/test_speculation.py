"""Whoever guesses, and however much: tokens, texts and logits are those without guesses."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from coordinator.cancellation import Cancellation
from coordinator.request import FinishReason, GenerationRequest
from coordinator.speculation.history import History
from coordinator.speculation.lookup import LookupDrafter
from coordinator.speculation.model_drafter import ModelDrafter
from coordinator.speculation.shadow_drafter import ShadowDrafter
from coordinator.speculation.shadow_experts import ShadowExperts
from shoal.artifact import Artifact
from shoal.artifact.shadow_build import make_shadow
from shoal.ops import SamplingParams
from shoal.quant import Format
from support.fables import fables
from support.speculation import Answer, MakeDrafters, Rig
from support.tiny_model import make_tiny_artifact

TEXT = (
    "Once upon a time there was a fox. The fox said: I am hungry. The hen said: I am not here."
    " The fox said: I am hungry. The hen said: I am not here. The fox said: I"
)
NUM_TOKENS = 60
GREEDY = SamplingParams()
SAMPLED = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    repetition_penalty=1.02,
    presence_penalty=0.05,
    frequency_penalty=0.02,
    seed=5,
)
SAMPLINGS = {"greedy": GREEDY, "sampled": SAMPLED}
DRAFTERS = ("lookup", "draft", "shadow", "together")


@pytest.fixture(scope="module")
def makers(
    tmp_path_factory: pytest.TempPathFactory, alone: Rig, request_: GenerationRequest
) -> Iterator[dict[str, MakeDrafters]]:
    target = Artifact.open(fables())
    # What a user's history holds: the prompt again, and how it once went on.
    answers = [alone.run(replace(request_, sampling=s)).token_ids for s in SAMPLINGS.values()]
    tokenizer = target.text_file("tokenizer.json")
    assert tokenizer is not None
    history = History(tmp_path_factory.mktemp("history"), tokenizer.blake3, print)
    for answer in answers:
        history.add((*request_.prompt_ids, *answer))
    path = tmp_path_factory.mktemp("shadow") / "q4.shoal"
    make_shadow(target, Format.Q4_0, path, lambda _num_bytes: None, force=False)
    with closing(ShadowExperts(Artifact.open(path), lambda _progress: None)) as shadow:
        yield {
            "lookup": lambda _: [LookupDrafter(history)],
            # The model as its own draft model: every guess is right, at any temperature.
            "draft": lambda _: [ModelDrafter(target, 256, lambda _progress: None)],
            "shadow": lambda parts: [ShadowDrafter(shadow, parts.weights, parts.kv)],
            "together": lambda parts: [
                LookupDrafter(),
                ShadowDrafter(shadow, parts.weights, parts.kv),
            ],
        }


@pytest.fixture(scope="module")
def alone() -> Iterator[Rig]:
    with closing(Rig(fables())) as rig:
        yield rig


@pytest.fixture(scope="module")
def request_(alone: Rig) -> GenerationRequest:
    prompt_ids = tuple(alone.tokenizer.encode(TEXT))
    return GenerationRequest(prompt_ids, NUM_TOKENS, GREEDY, ignore_eos=True, num_top_logprobs=2)


def assert_same(with_guesses: Answer, without: Answer) -> None:
    """Assert that nothing a caller sees differs, and that guesses were accepted at all."""
    assert with_guesses.told == without.told
    assert without.finished.logits_digest is not None
    speculation = with_guesses.finished.speculation
    assert speculation is not None
    assert speculation.accepted > 0, "nothing was accepted: a blunt test"
    if with_guesses.finished.reason is FinishReason.LENGTH:
        num_passes = len(without.token_ids) - 1
        assert speculation.passes + speculation.accepted == num_passes, "each accepted saves one"


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_drafter_leaves_every_bit_as_it_was(
    drafter: str,
    sampling: str,
    makers: dict[str, MakeDrafters],
    alone: Rig,
    request_: GenerationRequest,
) -> None:
    asked = replace(request_, sampling=SAMPLINGS[sampling])
    # With round trips to wait for, the drafters that take time go on beside the passes.
    with closing(Rig(fables(), makers[drafter], round_trips=1)) as rig:
        answer = rig.run(asked)
        assert_same(answer, alone.run(asked))
        if drafter == "draft":
            assert answer.of("draft").accepted == answer.of("draft").drafted > NUM_TOKENS // 2
        if drafter == "shadow":
            assert answer.of("shadow").accepted > NUM_TOKENS // 2
        assert rig.run(asked).told == answer.told, "what was learned changes no bit"


@pytest.mark.parametrize("drafter", ["draft", "shadow"])
def test_a_text_that_ends_within_a_draft_ends_where_it_would(
    drafter: str, makers: dict[str, MakeDrafters], alone: Rig, request_: GenerationRequest
) -> None:
    """By an end-of-sequence token, by a stop string, by its length; at each place of a draft."""
    whole = alone.run(request_)
    for end in (22, 25, 29):
        eos = whole.token_ids[end]
        stop = whole.text[4 * end : 4 * end + 3]
        ways = [
            ((eos,), replace(request_, ignore_eos=False), FinishReason.EOS),
            ((), replace(request_, stop=(stop, "never seen")), FinishReason.STOP),
            ((), replace(request_, max_tokens=end), FinishReason.LENGTH),
        ]
        for eos_ids, asked, reason in ways:
            with closing(Rig(fables(), makers[drafter], eos_ids)) as rig:
                answer = rig.run(asked)
                assert answer.finished.reason is reason
                with closing(Rig(fables(), eos_ids=eos_ids)) as plain:
                    assert_same(answer, plain.run(asked))


def test_one_token_is_never_guessed_and_two_are_never_exceeded(
    makers: dict[str, MakeDrafters], request_: GenerationRequest
) -> None:
    with closing(Rig(fables(), makers["draft"])) as rig:
        for max_tokens in (1, 2, 3):
            answer = rig.run(replace(request_, max_tokens=max_tokens))
            assert len(answer.token_ids) == max_tokens
            assert answer.of("draft").drafted <= max(0, max_tokens - 2)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_context_is_filled_to_its_last_token(
    drafter: str, makers: dict[str, MakeDrafters], request_: GenerationRequest
) -> None:
    max_context = 128  # two blocks: the drafters' scratch lies beyond
    asked = replace(request_, max_tokens=max_context - len(request_.prompt_ids))
    with (
        closing(Rig(fables(), max_context=max_context)) as plain,
        closing(Rig(fables(), makers[drafter], max_context=max_context, max_draft=32)) as rig,
    ):
        assert_same(rig.run(asked), plain.run(asked))


@pytest.mark.parametrize("drafter", ["draft", "shadow"])
def test_chunks_of_the_prompt_and_turns_of_a_chat_change_nothing(
    drafter: str, makers: dict[str, MakeDrafters], alone: Rig, request_: GenerationRequest
) -> None:
    """The second turn reuses the KV of rows that verified guesses, and of none that was wrong."""
    with closing(Rig(fables(), makers[drafter], prefill_chunk=7)) as rig:
        asked = request_
        for words in (" And so the hen", " In the end the fox"):
            answer = rig.run(asked)
            with closing(Rig(fables())) as fresh:
                assert_same(answer, fresh.run(asked))
            more = rig.tokenizer.encode(words)
            asked = replace(
                asked,
                prompt_ids=(*asked.prompt_ids, *answer.token_ids, *more),
                max_tokens=30,
                sampling=SAMPLED,
            )
        assert rig.run(asked).finished.timings.num_reused_tokens > len(request_.prompt_ids) + 50


def test_a_draft_model_that_errs_is_followed_only_where_it_is_right(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Random weights at 4 bits agree with themselves at 32 on some tokens only."""
    folder = tmp_path_factory.mktemp("pair")
    target = make_tiny_artifact(folder, "qwen3_moe", "f32", seed=3, name="target")
    coarse = Artifact.open(make_tiny_artifact(folder, "qwen3_moe", "q4_0", seed=3, name="coarse"))
    asked = GenerationRequest(
        tuple(range(40, 60)), NUM_TOKENS, SAMPLED, ignore_eos=True, num_top_logprobs=2
    )
    with (
        closing(Rig(target)) as plain,
        closing(Rig(target, lambda _: [ModelDrafter(coarse, 256, lambda _p: None)])) as rig,
    ):
        answer = rig.run(asked)
        assert_same(answer, plain.run(asked))
        assert answer.of("draft").accepted < answer.of("draft").drafted


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_caller_who_walks_away_or_cancels_leaves_no_guess_behind(
    drafter: str, makers: dict[str, MakeDrafters], alone: Rig, request_: GenerationRequest
) -> None:
    whole = alone.run(request_)
    with closing(Rig(fables(), makers[drafter])) as rig:
        for num_events in (3, 9, 14):
            abandoned = rig.engine.generate(request_, Cancellation())
            for _ in range(num_events):
                next(abandoned)
            del abandoned
            rig.engine.check_integrity()
            cancellation = Cancellation()
            events = []
            for event in rig.engine.generate(request_, cancellation):
                events.append(event)
                if len(events) == num_events:
                    cancellation.request()
            cancelled = Answer(events)
            assert cancelled.finished.reason is FinishReason.CANCELLED
            assert cancelled.tokens == whole.tokens[: num_events - 1], "not one token more"
            rig.engine.check_integrity()
        assert rig.run(request_).told == whole.told


def test_the_kv_of_the_target_is_written_by_exact_passes_only(
    makers: dict[str, MakeDrafters], request_: GenerationRequest
) -> None:
    """After a shadow's drafts every cached row is what a run without guesses has there."""
    kept: list[bytes] = []
    for maker in (None, makers["shadow"]):
        with closing(Rig(fables(), maker)) as rig:
            answer = rig.run(request_)
            kept.append(_kv_bytes(rig, len(request_.prompt_ids) + NUM_TOKENS - 1))
            assert maker is None or answer.of("shadow").accepted > 0
    assert kept[0] == kept[1]


def _kv_bytes(rig: Rig, num_tokens: int) -> bytes:
    """Return K and V of the first tokens in every layer."""
    sequence, kv = rig.engine._sequence, rig.engine._kv
    assert sequence.num_cached >= num_tokens - 1
    parts: list[bytes] = []
    for layer in range(rig.artifact.spec.num_layers):
        k, v = kv.layer(layer)
        heads, head_dim = v.shape[1], v.shape[3]
        for position in range(num_tokens - 1):
            block, offset = sequence.blocks[position // 64], position % 64
            parts.append(v[block, :, offset].tobytes())
            per_lane = k[block].transpose(0, 1, 3, 2).reshape(heads, 64, head_dim)
            parts.append(per_lane[:, offset].tobytes())
    return b"".join(parts)
