"""Which endpoints can compute which expert of which layer (core).

Built once from a checked shard map; asked once per layer and pass, so the answer is an array.

A *slot* is an ordered choice of replicas, the preferred one first. A range with n replicas has n
slots: expert e prefers replica e mod n, so its replicas share the work of each layer and each keeps
its own part of the experts in memory, while any of them can take over.
"""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from shoal import shard_map
from shoal.experts.ownership import OwnedRange
from shoal.model_spec import ModelSpec
from shoal.shard_map import Endpoint, ShardMap

Slot = tuple[int, ...]  # endpoints, the preferred one first


class Placement:
    """(layer, expert) -> slot, as indices into `slots`, whose endpoints index `endpoints`."""

    def __init__(self, parsed: ShardMap, spec: ModelSpec) -> None:
        """Raises ShardMapError when the map does not fit the model exactly."""
        entry = shard_map.entry_of_expert(parsed, spec)
        listed = [endpoint for one in parsed.entries for endpoint in one.endpoints]
        self.endpoints: tuple[Endpoint, ...] = tuple(dict.fromkeys(listed))
        self._num_experts = tuple(
            0 if layer.router is None else layer.router.num_experts for layer in spec.layers
        )
        slots: dict[Slot, int] = {}
        self._slot = np.zeros(entry.shape, np.int32)
        for index, one in enumerate(parsed.entries):
            replicas = tuple(self.endpoints.index(endpoint) for endpoint in one.endpoints)
            for first in range(len(replicas)):
                slot = slots.setdefault(replicas[first:] + replicas[:first], len(slots))
                mine = self._slot[:, first :: len(replicas)]
                mine[entry[:, first :: len(replicas)] == index] = slot
        self.slots: tuple[Slot, ...] = tuple(slots)

    def owners(self, layer: int) -> NDArray[np.int32]:
        """Return [E] int32: the slot of each expert of this layer. A view."""
        assert self._num_experts[layer] > 0, f"layer {layer} has no experts"
        return self._slot[layer, : self._num_experts[layer]]

    def assigned(self, endpoint: int) -> NDArray[np.bool_]:
        """Return [L, E] bool: what the map gives to this endpoint, alone or beside replicas."""
        return self._cells([index for index, slot in enumerate(self.slots) if endpoint in slot])

    def missing(self, endpoint: int, owned: tuple[OwnedRange, ...]) -> str:
        """Name what the map gives to this endpoint and it does not own; empty if nothing."""
        lacks = self.assigned(endpoint)
        for part in owned:
            layers = slice(part.first_layer, part.last_layer + 1)
            lacks[layers, part.first_expert : part.last_expert + 1] = False
        return shard_map.describe(lacks)

    def uncovered(self, alive: Collection[int]) -> str:
        """Name what none of these endpoints can compute; empty if nothing."""
        dead = [index for index, slot in enumerate(self.slots) if not set(slot) & set(alive)]
        return shard_map.describe(self._cells(dead))

    def range_of(self, slot: int) -> str:
        """Name the whole range whose replicas this slot chooses among."""
        same = [
            index for index, other in enumerate(self.slots) if set(other) == set(self.slots[slot])
        ]
        return shard_map.describe(self._cells(same))

    def _cells(self, slots: list[int]) -> NDArray[np.bool_]:
        cells: NDArray[np.bool_] = np.isin(self._slot, slots)
        for layer, num_experts in enumerate(self._num_experts):
            cells[layer, num_experts:] = False
        return cells
