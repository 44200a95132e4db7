"""Which budgets can serve which experts (core)."""

from collections.abc import Mapping

from shoal.errors import UsageError
from shoal.experts.cache.extents import Extents
from shoal.experts.cache.policy import Key
from shoal.sizes import format_size


def smallest_budget(sizes: Mapping[Key, int]) -> int:
    """Return the least bytes that serve these experts: two of the largest, or all."""
    return min(2 * max(sizes.values(), default=0), sum(sizes.values()))


def check_size(num_bytes: int, sizes: Mapping[Key, int]) -> None:
    """Raise UsageError where a cache of so many bytes cannot serve these experts, ever."""
    least = smallest_budget(sizes)
    if num_bytes < least:
        raise UsageError(
            f"a cache of {format_size(num_bytes)} is too small: two of the largest expert, the "
            f"least that can serve, take {format_size(least)}: raise --cache"
        )


def check_budget(num_bytes: int, sizes: Mapping[Key, int], extents: Extents) -> None:
    """Raise UsageError where so many bytes of an arena cannot hold two of the largest expert.

    Args:
        sizes: owned expert -> bytes. extents: of the arena, which may grow to the budget.
    """
    check_size(num_bytes, sizes)
    largest = max(sizes.values(), default=0)
    is_contended = num_bytes < sum(sizes.values())
    if is_contended and extents.num_places_of(largest, num_bytes) < 2:
        raise UsageError(
            f"the memory of this cache is in pieces too short for two experts of {largest} bytes, "
            "which were not owned when it was opened: start anew"
        )
