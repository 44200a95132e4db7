"""Options that several verbs share, declared once: a dataclass whose fields are typer options.

    @dataclass(frozen=True)
    class Sampling:
        temperature: Annotated[float, typer.Option(help="...")] = 0.0

    @grouped
    def run(prompt: str, sampling: Sampling) -> None: ...

typer then sees a function with the fields in the group's place; the verb gets the group.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """Return the verb with every dataclass parameter spread out to its fields.

    All names must differ, and every field needs a default. Parameters become keyword-only: typer
    calls by name.
    """
    hints = get_type_hints(verb, include_extras=True)
    spread: dict[str, inspect.Parameter] = {}
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            groups[name] = hint
            kinds = get_type_hints(hint, include_extras=True)
            members = {field.name: (kinds[field.name], field.default) for field in fields(hint)}
        else:
            members = {name: (hint, parameter.default)}
        for member, (kind, default) in members.items():
            assert member not in spread, f"two options are called {member}"
            spread[member] = inspect.Parameter(
                member, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )

    @functools.wraps(verb)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        verb(**given)

    del vars(flat)["__wrapped__"]  # typer would look through it
    vars(flat)["__signature__"] = inspect.Signature(list(spread.values()))
    flat.__annotations__ = {name: parameter.annotation for name, parameter in spread.items()}
    return flat
