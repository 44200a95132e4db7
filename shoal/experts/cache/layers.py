"""PerLayer: a budget and a policy of its own for each layer; budgets may follow the hits (core)."""

from collections import OrderedDict
from collections.abc import Callable

from shoal.experts.cache.policy import CachePolicy, Key


class _Layer:
    __slots__ = ("ghost_hits", "ghosts", "num_experts", "policy", "quota")

    def __init__(self, policy: CachePolicy, quota: float) -> None:
        self.policy = policy
        self.quota = quota
        self.num_experts = 0
        self.ghosts: OrderedDict[Key, None] = OrderedDict()  # evicted lately, the oldest first
        self.ghost_hits = 0.0


class PerLayer:
    """Splits the places evenly over the layers seen so far.

    Args:
        make: returns a layer's policy for a number of places.
        is_adaptive: a miss of what its layer evicted lately brings that layer a place, at the cost
            of the layer with the fewest such misses.
    """

    GHOST_SHARE = 0.5  # of an even quota: how far back an eviction counts as too early
    STEP = 0.25  # places a ghost hit: four agree before a place changes hands
    FADE = 0.99  # of the hit counts, a ghost hit anywhere

    def __init__(
        self, num_experts: int, make: Callable[[int], CachePolicy], *, is_adaptive: bool
    ) -> None:
        self._num_experts = num_experts
        self._make = make
        self._is_adaptive = is_adaptive
        self._layers: dict[int, _Layer] = {}

    def resize(self, num_experts: int) -> None:
        """See CachePolicy. Quotas start again from equal ones."""
        self._num_experts = num_experts
        quota = num_experts / max(1, len(self._layers))
        for layer in self._layers.values():
            layer.quota = quota
            layer.policy.resize(max(1, int(quota)))

    def touch(self, key: Key) -> None:
        """See CachePolicy."""
        self._layers[key[0]].policy.touch(key)

    def insert(self, key: Key, is_prefetch: bool) -> None:
        """See CachePolicy."""
        layer = self._layer(key)
        layer.num_experts += 1
        layer.policy.insert(key, is_prefetch)
        if key in layer.ghosts:
            del layer.ghosts[key]
            if self._is_adaptive and not is_prefetch:
                self._give_place(layer)

    def victim(self, newcomer: Key, may_evict: Callable[[Key], bool]) -> Key | None:
        """See CachePolicy."""
        own = self._layer(newcomer)
        if own.num_experts >= own.quota:
            key = own.policy.victim(newcomer, may_evict)
            if key is not None:
                return key
        others = sorted(self._layers.values(), key=lambda layer: layer.quota - layer.num_experts)
        for layer in others:
            key = layer.policy.victim(newcomer, may_evict)
            if key is not None:
                return key
        return None

    def remove(self, key: Key) -> None:
        """See CachePolicy."""
        layer = self._layers[key[0]]
        layer.num_experts -= 1
        layer.policy.remove(key)
        layer.ghosts[key] = None
        # As many for each layer: a share of its own quota would make the rich richer.
        even = self._num_experts / len(self._layers)
        while len(layer.ghosts) > max(1.0, even * self.GHOST_SHARE):
            layer.ghosts.popitem(last=False)

    def _layer(self, key: Key) -> _Layer:
        layer = self._layers.get(key[0])
        if layer is None:
            layer = self._layers[key[0]] = _Layer(self._make(1), 0.0)
            self.resize(self._num_experts)
        return layer

    def _give_place(self, layer: _Layer) -> None:
        for other in self._layers.values():
            other.ghost_hits *= self.FADE
        layer.ghost_hits += 1.0
        donors = [
            other for other in self._layers.values() if other is not layer and other.quota > 2.0
        ]
        if donors:
            donor = min(donors, key=lambda other: other.ghost_hits)
            donor.quota -= self.STEP
            layer.quota += self.STEP
