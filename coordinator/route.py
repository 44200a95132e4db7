"""A shard map in use: which nodes have the experts of each of its slots (core)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.placement import Placement


@dataclass(frozen=True, slots=True)
class Route:
    """A shard map in use. Replaced as a whole when the map is.

    candidates: of each slot, the nodes that have it, the preferred one first; None: this process.
    shards: of each slot, its range in words.
    has_local: whether this process has any.
    """

    placement: Placement
    candidates: tuple[tuple[int, ...] | None, ...]
    shards: tuple[str, ...]
    has_local: bool

    def owners(self, layer: int) -> NDArray[np.int32]:
        """Return [E] int32: the slot of each expert of this layer."""
        return self.placement.owners(layer)

    @property
    def nodes(self) -> set[int]:
        return {node for nodes in self.candidates if nodes is not None for node in nodes}
