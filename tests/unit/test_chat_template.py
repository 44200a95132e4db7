"""ChatTemplate renders as transformers does, and its failures are messages, not tracebacks."""

from datetime import datetime

import pytest

from coordinator.chat_template import ChatTemplate
from shoal.errors import RequestError, UnsupportedModel

USER = {"role": "user", "content": "hi <b> 'é'"}


def _template(source: str, **special: str) -> ChatTemplate:
    return ChatTemplate(source, special, lambda: datetime(2026, 11, 21, 9, 5))


def test_messages_special_tokens_and_the_generation_prompt_reach_the_template() -> None:
    template = _template(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        bos_token="<s>",
    )
    assert template.render([USER]) == "<s>[user]hi <b> 'é'[assistant]"
    assert template.render([USER], add_generation_prompt=False) == "<s>[user]hi <b> 'é'"


def test_a_blocks_newline_and_indentation_are_trimmed() -> None:
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}"
    )
    assert _template(source).render([USER]) == "user\n"


def test_loop_controls_dates_and_json_are_those_of_transformers() -> None:
    loop = "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert _template(loop).render([]) == "01"
    assert _template("{{ strftime_now('%d %b %Y') }}").render([]) == "21 Nov 2026"
    assert _template("{{ messages[0] | tojson }}").render([USER]) == (
        '{"role": "user", "content": "hi <b> \'é\'"}'
    )
    assert (
        _template("{{ {'a': [1]} | tojson(indent=2) }}").render([]) == '{\n  "a": [\n    1\n  ]\n}'
    )
    marked = "{% generation %}{{ messages[0].role }}{% endgeneration %}!"
    assert _template(marked).render([USER]) == "user!"


def test_a_refusal_by_the_template_is_the_callers_error() -> None:
    template = _template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="refuses the messages: roles must alternate"):
        template.render([USER])


@pytest.mark.parametrize(
    "source",
    ["{{ nothing.there }}", "{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{{ messages.append(1) }}"],
)
def test_a_template_that_fails_is_a_clear_error(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template fails on these messages"):
        _template(source).render([USER])


def test_the_sandbox_keeps_the_template_from_python() -> None:
    with pytest.raises(RequestError, match="unsafe"):
        _template("{{ messages.__class__.__mro__ }}").render([USER])


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(UnsupportedModel, match=r"chat_template\.jinja, line 2"):
        _template("\n{% if %}")
