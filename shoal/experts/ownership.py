"""Which experts of which layers a node owns, and how people write that (core).

Grammar of `--experts` and `--layers`: spans joined by `+`, a span is `N` or `FIRST-LAST`, both
ends included: `0-63`, `0-31+96-127`, `7`. Ownership is strict: what is not named is not served.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import NotOwned, UsageError
from shoal.limits import MAX_EXPERTS, MAX_LAYERS


@dataclass(frozen=True, slots=True, order=True)
class OwnedRange:
    """Experts [first_expert, last_expert] of layers [first_layer, last_layer], ends included."""

    first_layer: int
    last_layer: int
    first_expert: int
    last_expert: int

    def __str__(self) -> str:
        experts = _span_text(self.first_expert, self.last_expert)
        return f"experts {experts} of layers {_span_text(self.first_layer, self.last_layer)}"


class Ownership:
    """The experts that a node owns; immutable.

    Args:
        experts_of_layer: layer -> its owned experts. Layers without experts may be left out.
    """

    def __init__(self, experts_of_layer: Mapping[int, Iterable[int]]) -> None:
        sets = {layer: frozenset(experts) for layer, experts in experts_of_layer.items()}
        self._experts = {layer: sets[layer] for layer in sorted(sets) if sets[layer]}
        self.ranges = _rectangles(self._experts)

    def __contains__(self, expert: tuple[int, int]) -> bool:
        layer, index = expert
        return index in self._experts.get(layer, frozenset())

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with at least one owned expert, ascending."""
        return tuple(self._experts)

    def experts(self, layer: int) -> tuple[int, ...]:
        """The owned experts of that layer, ascending."""
        return tuple(sorted(self._experts.get(layer, frozenset())))

    @property
    def num_experts(self) -> int:
        """How many experts over all layers."""
        return sum(len(experts) for experts in self._experts.values())

    def check(self, layer: int, experts: Sequence[int]) -> None:
        """Raise NotOwned naming the experts among `experts` that are not owned."""
        owned = self._experts.get(layer, frozenset())
        if owned.issuperset(experts):
            return
        missing = format_spans(sorted(set(experts) - owned))
        raise NotOwned(f"expert {missing} of layer {layer} is not owned here: this node has {self}")

    def __str__(self) -> str:
        return ", ".join(str(owned) for owned in self.ranges) or "no experts"


def parse_spans(text: str, *, name: str, limit: int) -> tuple[int, ...]:
    """Return the numbers that `text` names, ascending; every one must be below `limit`.

    Raises:
        UsageError: naming the option `name`, the span at fault and the legal range.
    """
    numbers: set[int] = set()
    for span in text.split("+"):
        first_text, dash, last_text = span.strip().partition("-")
        last_text = last_text if dash else first_text
        if not (_is_number(first_text) and _is_number(last_text)):
            raise UsageError(
                f"{name}: {span!r} in {text!r} is not a span: write 5, 0-63 or 0-31+64-95"
            )
        first, last = int(first_text), int(last_text)
        if first > last:
            raise UsageError(f"{name}: {span.strip()!r} runs backwards: write {last}-{first}")
        if last >= limit:
            raise UsageError(
                f"{name}: {span.strip()!r} is out of range: the model has 0-{limit - 1}"
            )
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def format_spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers as spans: 0-3+7."""
    return "+".join(_span_text(first, last) for first, last in spans_of(numbers))


def spans_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending distinct numbers as maximal spans (first, last), ends included."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans


def _is_number(text: str) -> bool:
    # 5 digits hold every legal index, and keep int() from chewing on a megabyte of them.
    return text.isascii() and text.isdigit() and len(text) <= 5


def _span_text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _rectangles(experts: dict[int, frozenset[int]]) -> tuple[OwnedRange, ...]:
    # Consecutive layers with the same experts share their rectangles.
    ranges: list[OwnedRange] = []
    first: int | None = None
    layers = list(experts)
    for position, layer in enumerate(layers):
        first = layer if first is None else first
        following = layers[position + 1] if position + 1 < len(layers) else None
        if (
            following is not None
            and following == layer + 1
            and (experts[following] == experts[layer])
        ):
            continue
        for low, high in spans_of(sorted(experts[layer])):
            ranges.append(OwnedRange(first, layer, low, high))
        first = None
    return tuple(ranges)


assert max(MAX_EXPERTS, MAX_LAYERS) < 10**5, "_is_number admits 5 digits"
