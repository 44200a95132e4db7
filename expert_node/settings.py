"""Settings of a verb: its flags, then the environment, then a TOML file, then the defaults.

The verb's signature is the only declaration: typer makes flags and variables of it, and this file
reads the same names, with the same types, from TOML. A running process reads the file again and
merges it again with the flags that it was started with.

Why not pydantic-settings: it would declare every setting a second time beside typer's options, with
its own defaults, help and errors, and it cannot say which of typer's values were typed and which
are defaults, which is what the order of precedence needs. click knows.
"""

import difflib
import inspect
import tomllib
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import typer

from shoal import limits
from shoal.errors import UsageError

NOT_IN_FILES = frozenset({"config"})
_TYPED = ("COMMANDLINE", "ENVIRONMENT", "PROMPT")  # of click's ParameterSource


class Settings:
    """The values that a verb goes by, as often as somebody wants to know."""

    def __init__(
        self,
        verb: Callable[..., Any],
        given: Mapping[str, Any],
        typed: Collection[str],
        path: Path | None,
    ) -> None:
        """Remember what was typed.

        Args:
            given: every parameter of `verb`, as it was called. typed: those that a flag or a
                variable set: no file changes them. path: of the TOML file; None: there is none.
        """
        hints = get_type_hints(verb)
        self._hints = {name: hints[name] for name in given if name not in NOT_IN_FILES}
        self._defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(verb).parameters.items()
        }
        self._fixed = {name: value for name, value in given.items() if name in typed}
        self.path = path

    @classmethod
    def of_context(
        cls, context: typer.Context, verb: Callable[..., Any], given: Mapping[str, Any]
    ) -> "Settings":
        """Return the settings of a verb that typer has called with `given` (and `config`)."""
        typed = [name for name in given if _is_typed(context, name)]
        path = given["config"]
        return cls(verb, given, typed, path)

    def read(self) -> dict[str, Any]:
        """Read the file, if there is one, and return every value.

        Raises:
            UsageError: naming the file, and the key that is unknown or of the wrong type.
            OSError: the file cannot be read.
        """
        values = {name: self._defaults[name] for name in self._hints}
        if self.path is not None:
            values |= _read_file(self.path, self._hints)
        return values | {name: v for name, v in self._fixed.items() if name in self._hints}


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in _TYPED


def _read_file(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if path.stat().st_size > limits.MAX_CONFIG_BYTES:
            raise UsageError(f"{path}: more than {limits.MAX_CONFIG_BYTES} bytes: no configuration")
        entries = tomllib.loads(path.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no TOML: {error}") from None
    values: dict[str, Any] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise UsageError(_unknown(path, key, hints))
        if name in values:
            raise UsageError(f"{path}: {key} comes twice, with - and with _: keep one")
        values[name] = _converted(value, hints[name], f"{path}: {key}")
    return values


def _unknown(path: Path, key: str, hints: Mapping[str, Any]) -> str:
    names = sorted(name.replace("_", "-") for name in hints)
    close = difflib.get_close_matches(key.replace("_", "-"), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
    return f"{path}: {key} is no setting: {hint}"


def _converted(value: Any, hint: Any, where: str) -> Any:
    is_union = isinstance(hint, UnionType)
    wanted = [each for each in (get_args(hint) if is_union else (hint,)) if each is not NoneType]
    for each in wanted:
        if each in (bool, int, str) and type(value) is each:
            return value
        if each is float and type(value) in (int, float):
            return float(value)
        if each is Path and isinstance(value, str):
            return Path(value)
        if isinstance(each, type) and issubclass(each, StrEnum):
            return _chosen(value, each, where)
        if get_origin(each) is list:
            return _texts(value, where)
    raise UsageError(f"{where} = {value!r}: must be {' or '.join(map(_named, wanted))}")


def _texts(value: Any, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f'{where} = {value!r}: must be a list of texts, such as ["/a", "/b"]')
    return texts


def _chosen(value: Any, choices: type[StrEnum], where: str) -> StrEnum:
    try:
        return choices(value)
    except ValueError:
        raise UsageError(f"{where} = {value!r}: must be one of {', '.join(choices)}") from None


def _named(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(kind, 'a text, such as "8GiB"')
