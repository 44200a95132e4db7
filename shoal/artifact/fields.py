"""Strict reading of decoded JSON: each wrong field is one error that names its place (core)."""

import math
import string
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from shoal.errors import CorruptArtifact

_Choice = TypeVar("_Choice")
_HEX = frozenset(string.hexdigits.lower())


class Fields:
    """The fields of one JSON object, each taken once; `done()` refuses what was not taken."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise CorruptArtifact(f"{where}: expected an object, found {_kind(value)}")
        self._left: dict[str, Any] = dict(value)
        self.where = where

    def fail(self, key: str, why: str) -> CorruptArtifact:
        return CorruptArtifact(f"{self.where}.{key}: {why}")

    def take(self, key: str) -> Any:
        if key not in self._left:
            raise CorruptArtifact(f"{self.where}: field {key!r} is missing")
        return self._left.pop(key)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.take(key)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"expected an integer in [{low}, {high}], found {_show(value)}")
        return value

    def real(self, key: str) -> float:
        value = self.take(key)
        if type(value) not in (int, float) or not math.isfinite(_as_float(value)):
            raise self.fail(key, f"expected a finite number, found {_show(value)}")
        return _as_float(value)

    def boolean(self, key: str) -> bool:
        value = self.take(key)
        if type(value) is not bool:
            raise self.fail(key, f"expected true or false, found {_show(value)}")
        return value

    def text(self, key: str, max_chars: int = 4096) -> str:
        value = self.take(key)
        if not isinstance(value, str) or len(value) > max_chars or not value.isprintable():
            raise self.fail(key, f"expected text of at most {max_chars} characters on one line")
        return value

    def hash(self, key: str) -> str:
        return check_hash(self.take(key), f"{self.where}.{key}")

    def choice(self, key: str, known: Mapping[str, _Choice]) -> _Choice:
        value = self.take(key)
        if not isinstance(value, str) or value not in known:
            raise self.fail(key, f"expected one of {', '.join(known)}, found {_show(value)}")
        return known[value]

    def items(self, key: str, max_items: int) -> Iterator[tuple[object, str]]:
        """Yield (value, place) for each element of a list."""
        value = self.take(key)
        if not isinstance(value, list) or len(value) > max_items:
            raise self.fail(key, f"expected a list of at most {max_items} elements")
        for index, element in enumerate(value):
            yield element, f"{self.where}.{key}[{index}]"

    def object(self, key: str) -> "Fields":
        return Fields(self.take(key), f"{self.where}.{key}")

    def has(self, key: str) -> bool:
        """Return whether a field is there that may be left out."""
        return key in self._left

    def optional(self, key: str) -> bool:
        """Return whether the field holds a value; a null is taken away."""
        if key in self._left and self._left[key] is None:
            del self._left[key]
            return False
        return True

    def done(self) -> None:
        if self._left:
            unknown = ", ".join(sorted(map(_show, self._left)))
            raise CorruptArtifact(f"{self.where}: unknown field {unknown}")


def check_hash(value: object, where: str) -> str:
    """Return `value` if it is a blake3 hash in lower-case hexadecimal."""
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= _HEX:
        raise CorruptArtifact(f"{where}: expected 64 hexadecimal digits, found {_show(value)}")
    return value


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _show(value: object) -> str:
    if isinstance(value, dict | list):
        return f"a {_kind(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
