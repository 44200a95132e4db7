"""KvBlockPool: which KV blocks are free and which are held (core).

A KV block is room for `limits.KV_BLOCK_TOKENS` tokens in every layer at once, so that one index
names the same tokens in each layer's arrays. The pool knows indices only; the memory behind them
belongs to `kv_arrays.KvArrays`, who holds a block is the `Sequence` that allocated it.

    free --try_allocate--> held --free--> free

Rules: a block is free or held, never both; the lowest free index is given first, so that memory
which was once touched is used again before new memory is.
"""

import heapq

from shoal import limits


class KvBlockPool:
    """Hands out KV block indices in [0, num_blocks), lowest first."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, num_blocks
        self._num_blocks = num_blocks
        self._returned: list[int] = []  # a heap of freed indices, all below _untouched
        self._untouched = 0  # every index from here on was never given
        self._held: set[int] = set()

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_free(self) -> int:
        return self._num_blocks - len(self._held)

    @property
    def num_touched(self) -> int:
        """Blocks that were held at least once: what the cache's memory has grown to."""
        return self._untouched

    def try_allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks; None, and nothing taken, when fewer are free."""
        assert count >= 0, count
        if count > self.num_free:
            return None
        blocks = [self._take_lowest() for _ in range(count)]
        self._held.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give back blocks that are held. Their contents may be overwritten at once."""
        for block in blocks:
            assert block in self._held, f"KV block {block} is not held"
            self._held.remove(block)
            heapq.heappush(self._returned, block)

    def check_integrity(self) -> None:
        """Assert that every block is exactly one of held, returned and untouched."""
        returned = set(self._returned)
        assert len(returned) == len(self._returned), "a block was returned twice"
        assert not returned & self._held, "a block is both free and held"
        assert returned | self._held == set(range(self._untouched)), "a block is lost"
        assert 0 <= self._untouched <= self._num_blocks, self._untouched

    def _take_lowest(self) -> int:
        if self._returned:
            return heapq.heappop(self._returned)
        self._untouched += 1
        return self._untouched - 1


def blocks_for(num_tokens: int) -> int:
    """KV blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // limits.KV_BLOCK_TOKENS)
