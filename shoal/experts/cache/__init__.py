"""What an expert store keeps in memory: eviction policies and the cache that asks them."""

from collections.abc import Callable, Mapping

from shoal.experts.cache.expert_cache import ExpertCache
from shoal.experts.cache.frequency import FadingLfu, LfuDa
from shoal.experts.cache.layers import PerLayer
from shoal.experts.cache.policies import Lru, S3Fifo, WTinyLfu
from shoal.experts.cache.policy import CachePolicy, Key

# Name -> policy for a number of experts that fit. docs/expert-cache.md compares them.
POLICIES: Mapping[str, Callable[[int], CachePolicy]] = {
    "lru": Lru,
    "s3-fifo": S3Fifo,
    "w-tinylfu": WTinyLfu,
    "lfu-da": LfuDa,
    "fading-lfu": FadingLfu,
    "lru-per-layer": lambda n: PerLayer(n, Lru, is_adaptive=False),
    "lru-adaptive-layers": lambda n: PerLayer(n, Lru, is_adaptive=True),
    "fading-lfu-per-layer": lambda n: PerLayer(n, FadingLfu, is_adaptive=False),
}
DEFAULT_POLICY = "fading-lfu"

__all__ = ["DEFAULT_POLICY", "POLICIES", "CachePolicy", "ExpertCache", "Key"]
