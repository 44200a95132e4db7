"""CachePolicy: which expert to evict (core).

A policy knows the experts that are in memory and the order in which calls touched them, nothing
else: it has no clock and draws no lots, so a replayed trace gives the same evictions.
"""

from collections.abc import Callable
from typing import Protocol

Key = tuple[int, int]  # (layer, index of the expert in it)


class CachePolicy(Protocol):
    """Told of every use and of every expert that comes or goes; asked for victims."""

    def touch(self, key: Key) -> None:
        """A call used an expert that is in memory."""
        ...

    def insert(self, key: Key, is_prefetch: bool) -> None:
        """An expert came into memory: because a call missed it, or as a prefetch (no use yet)."""
        ...

    def victim(self, newcomer: Key, may_evict: Callable[[Key], bool]) -> Key | None:
        """Return the expert to evict among those that may be; None: there is none.

        The victim stays in memory, as far as the policy knows, until `remove`.

        Args:
            newcomer: for whom room is made; not in memory.
        """
        ...

    def remove(self, key: Key) -> None:
        """An expert left memory."""
        ...

    def resize(self, num_experts: int) -> None:
        """Memory now holds about that many experts."""
        ...
