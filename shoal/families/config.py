"""A checkpoint's config.json, read with types checked and every problem named."""

from collections.abc import Mapping
from typing import Any

from shoal.errors import UnsupportedModel


class Config:
    """Typed look-ups. A value that is absent or null is the default; a wrong type is an error.

    Multimodal checkpoints nest the text model's values under `text_config`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        nested = values.get("text_config")
        self.values: Mapping[str, Any] = nested if isinstance(nested, Mapping) else values

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UnsupportedModel(f"config: {key} = {value!r}: must be an integer >= {minimum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite positive number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedModel(f"config: {key} = {value!r}: must be a number")
        if not 0 < value < float("inf"):
            raise UnsupportedModel(f"config: {key} = {value!r}: must be positive and finite")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise UnsupportedModel(f"config: {key} = {value!r}: must be true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of non-negative integers; empty when absent."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(
            type(item) is int and item >= 0 for item in value
        ):
            raise UnsupportedModel(f"config: {key} = {value!r}: must be a list of integers")
        return tuple(value)

    def section(self, key: str) -> "Config":
        """Return a nested object; empty when absent."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise UnsupportedModel(f"config: {key} = {value!r}: must be an object")
        return Config(value)

    def require(self, key: str, implemented: object, default: object) -> None:
        """Refuse a value that changes the arithmetic to something we do not have."""
        value = self.values.get(key)
        if (default if value is None else value) != implemented:
            raise UnsupportedModel(
                f"config: {key} = {value!r}: only {implemented!r} is implemented"
            )

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise UnsupportedModel(f"config: {key} is missing")
        return default
