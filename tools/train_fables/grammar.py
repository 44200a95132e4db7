"""Templates with alternatives, expanded by a seeded choice that also counts its own entropy.

    [a|b|c]     one of the alternatives, nested as needed; an empty one is allowed
    {x} {x.y}   a slot, or an attribute of a slot
    a/an WORD   the article that fits
    ^           the next letter is a capital

A text's `nats` (sum of the log of the number of ways at each choice) bounds its information from
above: no model can do better than the true entropy, which is at most this on average.
"""

import math
import random
import re
import zlib
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

T = TypeVar("T")
Node = str | tuple[tuple["Node", ...], ...]
HELD_OUT_EVERY = 16  # one combination of so many never appears in training text

_SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
_ARTICLE = re.compile(r"\b([aA])/an (\W*)(\w)")
_CAPITAL = re.compile(r"\^(\W*)(\w)")
_SENTENCE = re.compile(r"(^|[.!?] |\n|\.\" )([a-z])")


class Chooser:
    """Seeded choices. `split`: "train" avoids the held-out combinations, "held-out" uses only them,
    "seed" is as "train" with other seeds."""

    def __init__(self, seed: int, split: str) -> None:
        self._random = random.Random(f"{split}-{seed}")
        self.split = split
        self.nats = 0.0

    def pick(self, ways: Sequence[T]) -> T:
        """Return one of the ways."""
        self.nats += math.log(len(ways))
        return self._random.choice(ways)

    def pick_weighted(self, ways: Sequence[T], weights: Sequence[float]) -> T:
        """Return one of the ways, the heavier ones more often."""
        (index,) = self._random.choices(range(len(ways)), weights)
        self.nats -= math.log(weights[index] / sum(weights))
        return ways[index]

    def sample(self, ways: Sequence[T], count: int) -> list[T]:
        """Return `count` different ones, in random order."""
        self.nats += sum(math.log(len(ways) - i) for i in range(count))
        return self._random.sample(ways, count)

    def number(self, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return self.pick(range(low, high + 1))

    def chance(self, probability: float) -> bool:
        """Return true with that probability."""
        return self.pick_weighted((True, False), (probability, 1 - probability))

    def allows(self, *combination: str) -> bool:
        """Return whether this split may use a combination that generalisation is tested with."""
        is_held_out = zlib.crc32("|".join(combination).encode()) % HELD_OUT_EVERY == 0
        return is_held_out == (self.split == "held-out")

    def say(self, template: str, **slots: object) -> str:
        """Return the template with its choices made, its slots filled, its capitals set."""
        text = self._expand(_parse(template))
        while _SLOT.search(text):
            text = _SLOT.sub(lambda match: _fill(match, slots), text)
            if "[" in text:
                text = self._expand(_parse_from(text, 0, "")[0])  # not worth a place in the cache
        return tidy(text)

    def _expand(self, node: tuple[Node, ...]) -> str:
        parts: list[str] = []
        for part in node:
            parts.append(part if isinstance(part, str) else self._expand(self.pick(part)))
        return "".join(parts)


def tidy(text: str) -> str:
    """Set articles and capitals."""
    text = _ARTICLE.sub(
        lambda m: m[1] + ("n " if m[3].lower() in "aeio" else " ") + m[2] + m[3], text
    )
    text = _SENTENCE.sub(lambda m: m[1] + m[2].upper(), text)
    return _CAPITAL.sub(lambda m: m[1] + m[2].upper(), text)


def _fill(match: re.Match[str], slots: dict[str, object]) -> str:
    value = slots[match[1]]
    return str(value if match[2] is None else getattr(value, match[2]))


@cache
def _parse(template: str) -> tuple[Node, ...]:
    node, end = _parse_from(template, 0, "")
    assert end == len(template), template
    return node


def _parse_from(text: str, at: int, stop: str) -> tuple[tuple[Node, ...], int]:
    parts: list[Node] = []
    plain = ""
    while at < len(text) and text[at] not in (stop or "\0"):
        if text[at] != "[":
            plain += text[at]
            at += 1
            continue
        ways: list[tuple[Node, ...]] = []
        while True:
            way, at = _parse_from(text, at + 1, "|]")
            ways.append(way)
            assert at < len(text), f"unclosed [ in {text!r}"
            if text[at] == "]":
                break
        at += 1
        parts += [plain, tuple(ways)]
        plain = ""
    return (*parts, plain), at
