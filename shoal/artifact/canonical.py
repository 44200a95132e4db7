"""Canonical JSON: one byte sequence per value, so that a hash of it is a hash of the value (core).

UTF-8, keys sorted by code point, no spaces, no escapes beyond those JSON demands. Integers are
decimal; reals are the shortest decimal that reads back as the same float64, as Python prints it.
NaN and infinity have no form. docs/formats/artifact.md states this as the specification.
"""

import json
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

JsonObject = dict[str, Any]


class MalformedJson(ValueError):
    """Text that is not the JSON we accept; the message says why."""


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Return the canonical bytes of a JSON object."""
    text = json.dumps(
        value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
    )
    return text.encode()


def digest(data: bytes | bytearray | memoryview) -> str:
    """Return the blake3 hash of `data` in lower-case hexadecimal."""
    return blake3(data).hexdigest()


def parse_object(data: bytes) -> JsonObject:
    """Read a JSON object strictly: UTF-8, no repeated key, no NaN, no surplus.

    Raises:
        MalformedJson: anything else, whatever the bytes.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant
        )
    except MalformedJson:
        raise
    except RecursionError:
        raise MalformedJson("it is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, a number of 5000 digits
        raise MalformedJson(str(error)) from None
    if not isinstance(value, dict):
        raise MalformedJson(f"it is a {type(value).__name__}, not an object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> JsonObject:
    result: JsonObject = {}
    for key, value in pairs:
        if key in result:
            raise MalformedJson(f"key {key!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> float:
    raise MalformedJson(f"{name} is not a number of JSON")
