"""Which endpoint computes which expert of which layer (core).

Built once from a checked shard map; asked once per layer and pass, so the answer is an array.
"""

import numpy as np
from numpy.typing import NDArray

from shoal import shard_map
from shoal.experts.ownership import OwnedRange
from shoal.model_spec import ModelSpec
from shoal.shard_map import Endpoint, ShardMap


class Placement:
    """(layer, expert) -> endpoint, as indices into `endpoints` (each listed once)."""

    def __init__(self, parsed: ShardMap, spec: ModelSpec) -> None:
        """Raises ShardMapError when the map does not fit the model exactly."""
        entry = shard_map.entry_of_expert(parsed, spec)
        firsts = [entry.endpoints[0] for entry in parsed.entries]
        self.endpoints: tuple[Endpoint, ...] = tuple(dict.fromkeys(firsts))
        # One more element: entries that nobody owns lie beyond the layer's experts.
        of_entry = np.array([self.endpoints.index(first) for first in firsts] + [0], np.int32)
        self._owner = of_entry[entry]
        self._num_experts = tuple(
            0 if layer.router is None else layer.router.num_experts for layer in spec.layers
        )

    def owners(self, layer: int) -> NDArray[np.int32]:
        """Return [E] int32: the endpoint index of each expert of this layer. A view."""
        assert self._num_experts[layer] > 0, f"layer {layer} has no experts"
        return self._owner[layer, : self._num_experts[layer]]

    def assigned(self, endpoint: int) -> NDArray[np.bool_]:
        """Return [L, E] bool: what the map gives to this endpoint."""
        cells: NDArray[np.bool_] = self._owner == endpoint
        for layer, num_experts in enumerate(self._num_experts):
            cells[layer, num_experts:] = False
        return cells

    def missing(self, endpoint: int, owned: tuple[OwnedRange, ...]) -> str:
        """Name what the map gives to this endpoint and it does not own; empty if nothing."""
        lacks = self.assigned(endpoint)
        for part in owned:
            layers = slice(part.first_layer, part.last_layer + 1)
            lacks[layers, part.first_expert : part.last_expert + 1] = False
        return shard_map.describe(lacks)
