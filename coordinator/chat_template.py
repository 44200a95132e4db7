"""A model's chat template, rendered as transformers renders it, in a sandbox."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.errors import RequestError, UnsupportedModel


class TemplateRefusal(jinja2.TemplateError):
    """What a template's raise_exception() raises: these messages do not fit the model."""


class ChatTemplate:
    """Turns messages into the text that the model was trained on.

    Source: transformers.utils.chat_template_utils, whose globals, filters and whitespace rules
    templates rely on.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime],
    ) -> None:
        """Compile the template.

        Args:
            special_tokens: bos_token, eos_token... as the template names them.
            now: the time that strftime_now() tells.

        Raises: UnsupportedModel with the line of a syntax error.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UnsupportedModel(
                f"chat_template.jinja, line {error.lineno}: {error.message}"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, open for the assistant's answer.

        Args:
            messages: `{"role": ..., "content": ...}`, oldest first.
            variables: more names for the template, such as enable_thinking.

        Raises: RequestError if the template refuses the messages or fails on them.
        """
        names: dict[str, Any] = {**self._special_tokens, **(variables or {})}
        names |= {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(names)
        except TemplateRefusal as refusal:
            raise RequestError(f"the chat template refuses the messages: {refusal}") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise RequestError(f"the chat template fails on these messages: {error}") from None


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML characters, which no model has seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
