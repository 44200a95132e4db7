"""`shoal run`: one request, its text streamed to stdout, its figures to stderr."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.app import CoordinatorConfig, Feedback, OpenedModel, message, start_engine
from coordinator.interrupt import cancel_on_interrupt
from coordinator.report import Transcript, figures_line, json_report
from coordinator.request import Finished, FinishReason, GenerationRequest, TokenGenerated
from coordinator.tokenizer import NoTokenizer
from shoal.errors import UsageError

MAX_TOKENS = 128  # where neither the command line nor the model says


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the command line asks for. Exactly one of prompt and prompt_ids is not None."""

    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    is_chat: bool
    system: str | None
    max_tokens: int | None  # None: the model's own
    sampling: Mapping[str, Any]  # of SamplingParams, what is not the model's own
    stop: tuple[str, ...]
    ignore_eos: bool
    num_top_logprobs: int | None  # None: stream text; else collect one JSON object

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_ids is None):
            raise UsageError("give a prompt or --prompt-ids, not both")
        if self.is_chat and self.prompt is None:
            raise UsageError("--chat needs a prompt as text: --prompt-ids are used as they are")


def run_once(
    config: CoordinatorConfig,
    asked: RunRequest,
    feedback: Feedback,
) -> None:
    """Serve one request to stdout.

    Raises: ShoalError for whatever ends the request early; text that came before stays printed.
    """
    model = OpenedModel(config)
    request = GenerationRequest(
        prompt_ids=_prompt_ids(model, asked),
        max_tokens=model.max_tokens(MAX_TOKENS) if asked.max_tokens is None else asked.max_tokens,
        sampling=model.sampling(asked.sampling),
        stop=asked.stop,
        ignore_eos=asked.ignore_eos,
        num_top_logprobs=asked.num_top_logprobs,
    )
    model.check(request)
    if isinstance(model.tokenizer, NoTokenizer) and asked.num_top_logprobs is None:
        raise UsageError(f"{model.artifact.name} has no tokenizer: --json shows the ids that come")
    transcript = Transcript(request)
    is_json = asked.num_top_logprobs is not None
    with start_engine(model, feedback) as coordinator, cancel_on_interrupt() as cancellation:
        for event in coordinator.generate(transcript, cancellation):
            feedback.end_load()
            if not is_json and isinstance(event, TokenGenerated | Finished):
                sys.stdout.write(event.text)
                sys.stdout.flush()
        if not is_json:
            sys.stdout.write("\n")
            sys.stdout.flush()
        finished = transcript.finished
        assert finished is not None, "a request ends in a terminal event"
        if finished.error is not None:
            raise finished.error
        coordinator.check()
        if coordinator.recorder is not None:
            said = [token.token_id for token in transcript.tokens]
            feedback.tell(coordinator.recorder.write([*request.prompt_ids, *said]))
        if is_json:
            sys.stdout.buffer.write(json_report(transcript, coordinator.label))
        else:
            sys.stderr.write(figures_line(transcript) + "\n")
    if finished.reason is FinishReason.CANCELLED:
        raise KeyboardInterrupt


def _prompt_ids(model: OpenedModel, asked: RunRequest) -> tuple[int, ...]:
    if asked.prompt_ids is not None:
        return asked.prompt_ids
    assert asked.prompt is not None
    if not asked.is_chat:
        return tuple(model.tokenizer.encode(asked.prompt))
    messages = [] if asked.system is None else [message("system", asked.system)]
    messages.append(message("user", asked.prompt))
    text = model.chat_template().render(messages)
    return tuple(model.tokenizer.encode_templated(text))
