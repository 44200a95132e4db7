"""What an expert store keeps in memory: eviction policies and the cache that asks them."""
