"""`shoal chat`: a conversation on a terminal, or line by line from a pipe.

Every turn renders the whole conversation with the model's template; the engine reuses the KV of
the prefix that it shares with the turn before.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.app import (
    Coordinator,
    CoordinatorConfig,
    Feedback,
    OpenedModel,
    message,
    start_engine,
)
from coordinator.chat_template import ChatTemplate
from coordinator.interrupt import cancel_on_interrupt
from coordinator.report import Transcript, figures_line
from coordinator.request import Finished, GenerationRequest, TokenGenerated
from shoal.errors import RequestError, ShoalError, UsageError

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit leaves"


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """max_tokens: of one answer at most; less where the context ends before.

    sampling: of SamplingParams, what is not the model's own.
    """

    system: str | None
    max_tokens: int
    sampling: Mapping[str, Any]
    stop: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: must be at least 1")


def run_chat(
    config: CoordinatorConfig,
    chat: ChatConfig,
    feedback: Feedback,
) -> None:
    """Answer until stdin ends or somebody types /exit.

    Raises: ShoalError: on a terminal only for what makes every further answer impossible; from a
        pipe for whatever goes wrong first.
    """
    model = OpenedModel(config)
    template = model.chat_template()
    with start_engine(model, feedback) as coordinator:
        feedback.end_load()  # what is typed stands on the same lines
        conversation = _Conversation(coordinator, template, chat)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            sys.stderr.write(f"{coordinator.label.name}: {HELP}\n")
        for line in _lines(is_terminal):
            if line.strip() == "/exit":
                break
            try:
                conversation.on_line(line)
            except ShoalError as error:
                if not is_terminal:
                    raise
                coordinator.check()
                sys.stderr.write(f"error: {error}\n")
        coordinator.check()


class _Conversation:
    """The messages so far. A turn that fails leaves them as they were."""

    def __init__(self, coordinator: Coordinator, template: ChatTemplate, chat: ChatConfig) -> None:
        self._coordinator = coordinator
        self._template = template
        self._chat = chat
        self._system = chat.system
        self._messages: list[dict[str, str]] = []

    def on_line(self, line: str) -> None:
        """Do what the line says: a command, or a message to answer."""
        text = line.strip()
        command, _, rest = text.partition(" ")
        if not text:
            return
        if command == "/reset":
            self._messages = []
        elif command == "/system":
            self._messages, self._system = [], rest.strip() or None
        elif command.startswith("/"):
            raise RequestError(f"{command} is not a command: {HELP}")
        else:
            self._answer(message("user", text))

    def _answer(self, question: dict[str, str]) -> None:
        asked = [*self._messages, question]
        system = [] if self._system is None else [message("system", self._system)]
        text = self._template.render([*system, *asked])
        transcript = Transcript(self._request(text))
        with cancel_on_interrupt() as cancellation:
            for event in self._coordinator.generate(transcript, cancellation):
                if isinstance(event, TokenGenerated | Finished):
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        finished = transcript.finished
        assert finished is not None, "a request ends in a terminal event"
        if finished.error is not None:
            raise finished.error
        sys.stderr.write(figures_line(transcript) + "\n")
        self._messages = [*asked, message("assistant", transcript.text)]

    def _request(self, prompt: str) -> GenerationRequest:
        model = self._coordinator.model
        prompt_ids = tuple(model.tokenizer.encode_templated(prompt))
        room = model.engine_config.max_context - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(prompt_ids)} tokens, the context holds "
                f"{model.engine_config.max_context}: /reset starts a new one"
            )
        return GenerationRequest(
            prompt_ids=prompt_ids,
            max_tokens=min(self._chat.max_tokens, room),
            sampling=model.sampling(self._chat.sampling),
            stop=self._chat.stop,
        )


def _lines(is_terminal: bool) -> Iterator[str]:
    if not is_terminal:
        yield from sys.stdin
        return
    _edit_lines()
    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # forgets the line that was being typed


def _edit_lines() -> None:
    try:
        import readline  # noqa: F401  its import gives input() line editing and history
    except ImportError:
        return  # a Python without it still chats
