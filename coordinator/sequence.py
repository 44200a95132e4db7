"""Sequence: the token state of one request, and where its KV lies (core).

    tokens    [ 0 ............ num_cached ............ num_tokens )
               KV is written    not run yet

Rules: 0 <= num_cached <= num_tokens; the blocks cover at least the cached tokens; only a finished
forward pass moves num_cached (`advance`), so a failed or cancelled pass leaves nothing behind and
may simply be run again.

A fork goes on from another sequence's tokens and reads that one's full KV blocks. It borrows them:
it never writes to them and never frees them, and it is let go of before they are.
"""

import numpy as np

from coordinator.array_types import I32
from coordinator.kv_cache import KvBlockPool, blocks_for
from shoal import limits


class Sequence:
    """Token ids, and the KV blocks that hold the first of them."""

    def __init__(self, pool: KvBlockPool) -> None:
        self._pool = pool
        self._ids: I32 = np.zeros(limits.KV_BLOCK_TOKENS, np.int32)
        self._num_tokens = 0
        self._num_cached = 0
        self._blocks: list[int] = []
        self._num_borrowed = 0  # leading blocks that belong to the sequence we were forked from

    @property
    def token_ids(self) -> I32:
        """All ids, [num_tokens] int32. A view: valid until the next change."""
        return self._ids[: self._num_tokens]

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self._blocks)

    def try_fork(self, num_tokens: int) -> "Sequence | None":
        """Return a sequence of the same tokens that reads our KV, or None when the pool is dry.

        Our full blocks count as its own cached tokens. The tokens of a last, partly filled block
        do not: copy that block into the fork's own (the first beyond `num_cached`) and `advance`,
        or run them again. Let go of the fork with `truncate(0)`, before we lose a lent block.

        Args:
            num_tokens: how long it may become: it holds the blocks for that from the start.
        """
        fork = Sequence(self._pool)
        fork.extend(self.token_ids)
        fork._num_borrowed = self._num_cached // limits.KV_BLOCK_TOKENS
        fork._blocks = self._blocks[: fork._num_borrowed]
        fork._num_cached = fork._num_borrowed * limits.KV_BLOCK_TOKENS
        return fork if fork.try_reserve(num_tokens) else None

    def extend(self, token_ids: list[int] | I32) -> None:
        """Append tokens; their KV is not written yet."""
        end = self._num_tokens + len(token_ids)
        if end > self._ids.size:
            grown = np.zeros(max(end, 2 * self._ids.size), np.int32)
            grown[: self._num_tokens] = self.token_ids
            self._ids = grown
        self._ids[self._num_tokens : end] = token_ids
        self._num_tokens = end

    def try_reserve(self, num_tokens: int) -> bool:
        """Hold blocks for that many tokens in all; False, and no change, when the pool is dry."""
        missing = max(0, blocks_for(num_tokens) - len(self._blocks))
        blocks = self._pool.try_allocate(missing)
        if blocks is None:
            return False
        self._blocks += blocks
        return True

    def advance(self, num_rows: int) -> None:
        """Note that a forward pass has written the KV of the next `num_rows` tokens."""
        assert self._num_cached + num_rows <= self._num_tokens, "a pass ran tokens we do not have"
        assert blocks_for(self._num_cached + num_rows) <= len(self._blocks), "KV without a block"
        self._num_cached += num_rows

    def truncate(self, num_tokens: int) -> None:
        """Forget all tokens from `num_tokens` on, their KV too; blocks left empty are freed.

        A fork keeps what it borrowed, or with 0 gives all of it back.
        """
        assert 0 <= num_tokens <= self._num_tokens, num_tokens
        if num_tokens == 0:
            del self._blocks[: self._num_borrowed]
            self._num_borrowed = 0
        self._num_tokens = num_tokens
        self._num_cached = min(self._num_cached, num_tokens)
        assert self._num_cached >= self._num_borrowed * limits.KV_BLOCK_TOKENS, "a lent block"
        keep = blocks_for(self._num_cached)
        self._pool.free(self._blocks[keep:])
        del self._blocks[keep:]

    def common_prefix(self, token_ids: list[int] | I32) -> int:
        """Return how many leading ids agree with ours."""
        shortest = min(self._num_tokens, len(token_ids))
        ours = self._ids[:shortest]
        differs = np.flatnonzero(ours != np.asarray(token_ids[:shortest], np.int32))
        return int(differs[0]) if differs.size else shortest

    def check_integrity(self) -> None:
        """Assert the rules at the head of this file."""
        assert 0 <= self._num_cached <= self._num_tokens <= self._ids.size
        assert blocks_for(self._num_cached) <= len(self._blocks)
        assert self._num_borrowed * limits.KV_BLOCK_TOKENS <= self._num_cached
        assert len(set(self._blocks)) == len(self._blocks), "a block is held twice"
