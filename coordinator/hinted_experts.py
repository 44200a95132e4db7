"""Which experts nodes have been told of ahead of a call: each one once.

A drafter gives hints on its own thread while the forward pass makes calls on another.
"""

import threading
from collections.abc import Iterable


class HintedExperts:
    """By layer: those told of since its last call. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[int, set[int]] = {}

    def take_new(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Return those that nobody was told of yet, each once and in order; now they are told."""
        with self._lock:
            told = self._told.setdefault(layer, set())
            new = [expert for expert in dict.fromkeys(experts) if expert not in told]
            told.update(new)
            return new

    def forget(self, layer: int) -> None:
        """Begin anew: the layer is called."""
        with self._lock:
            self._told.pop(layer, None)

    def told(self, layer: int) -> frozenset[int]:
        """Return those told of."""
        with self._lock:
            return frozenset(self._told.get(layer, ()))
