"""KvBlockPool and Sequence: blocks are never lost, never shared, lowest first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.kv_cache import KvBlockPool, blocks_for
from coordinator.sequence import Sequence
from shoal.limits import KV_BLOCK_TOKENS


def test_the_lowest_free_block_is_given_first() -> None:
    pool = KvBlockPool(8)
    assert pool.try_allocate(4) == [0, 1, 2, 3]
    pool.free([2, 0])
    assert pool.try_allocate(3) == [0, 2, 4]
    assert pool.num_touched == 5
    pool.check_integrity()


def test_a_dry_pool_gives_nothing_rather_than_some() -> None:
    pool = KvBlockPool(3)
    assert pool.try_allocate(2) == [0, 1]
    assert pool.try_allocate(2) is None
    assert pool.num_free == 1
    pool.check_integrity()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_no_history_of_allocations_loses_or_shares_a_block(history: list[tuple[bool, int]]) -> None:
    pool = KvBlockPool(12)
    held: list[list[int]] = []
    for is_allocation, number in history:
        if is_allocation:
            free = pool.num_free
            blocks = pool.try_allocate(number)
            assert (blocks is None) == (number > free)
            held += [] if blocks is None else [blocks]
        elif held:
            pool.free(held.pop(number % len(held)))
        everything = [block for blocks in held for block in blocks]
        assert len(set(everything)) == len(everything)
        assert pool.num_free == 12 - len(everything)
        pool.check_integrity()


def test_a_sequence_holds_blocks_for_what_it_reserves_and_frees_what_it_forgets() -> None:
    pool = KvBlockPool(4)
    sequence = Sequence(pool)
    sequence.extend(list(range(3 * KV_BLOCK_TOKENS)))
    assert sequence.try_reserve(2 * KV_BLOCK_TOKENS + 1)
    assert list(sequence.blocks) == [0, 1, 2]
    sequence.advance(2 * KV_BLOCK_TOKENS + 1)
    sequence.truncate(KV_BLOCK_TOKENS)
    assert (sequence.num_tokens, sequence.num_cached) == (KV_BLOCK_TOKENS, KV_BLOCK_TOKENS)
    assert list(sequence.blocks) == [0]
    assert pool.num_free == 3
    sequence.check_integrity()


def test_blocks_reserved_for_a_pass_that_failed_are_freed_by_truncation() -> None:
    pool = KvBlockPool(4)
    sequence = Sequence(pool)
    sequence.extend([1, 2, 3])
    assert sequence.try_reserve(4 * KV_BLOCK_TOKENS)
    sequence.truncate(3)
    assert pool.num_free == 4
    assert sequence.num_tokens == 3


def test_a_reservation_beyond_the_pool_changes_nothing() -> None:
    pool = KvBlockPool(2)
    sequence = Sequence(pool)
    assert not sequence.try_reserve(2 * KV_BLOCK_TOKENS + 1)
    assert sequence.blocks == ()
    assert pool.num_free == 2


def test_the_common_prefix_ends_at_the_first_difference_or_the_shorter_end() -> None:
    sequence = Sequence(KvBlockPool(1))
    sequence.extend([5, 6, 7])
    assert sequence.common_prefix([5, 6, 8, 9]) == 2
    assert sequence.common_prefix([5, 6]) == 2
    assert sequence.common_prefix([5, 6, 7, 7]) == 3
    assert sequence.common_prefix([]) == 0


def test_ids_survive_growth() -> None:
    sequence = Sequence(KvBlockPool(1))
    for token_id in range(1000):
        sequence.extend([token_id])
    assert sequence.token_ids.tolist() == list(range(1000))
    assert blocks_for(1000) == -(-1000 // KV_BLOCK_TOKENS)


def test_a_fork_borrows_full_blocks_and_owns_what_it_writes() -> None:
    pool = KvBlockPool(6)
    sequence = Sequence(pool)
    sequence.extend(list(range(2 * KV_BLOCK_TOKENS + 10)))
    assert sequence.try_reserve(2 * KV_BLOCK_TOKENS + 10)
    sequence.advance(2 * KV_BLOCK_TOKENS + 9)
    fork = sequence.try_fork(2 * KV_BLOCK_TOKENS + 30)
    assert fork is not None
    assert fork.token_ids.tolist() == sequence.token_ids.tolist()
    assert fork.num_cached == 2 * KV_BLOCK_TOKENS
    assert fork.blocks[:2] == sequence.blocks[:2] and fork.blocks[2] not in sequence.blocks
    fork.advance(9)
    fork.extend([7] * 20)
    fork.advance(21)
    fork.check_integrity()
    fork.truncate(2 * KV_BLOCK_TOKENS + 5)
    fork.truncate(0)
    assert pool.num_free == 3
    pool.check_integrity()
    sequence.check_integrity()
    sequence.truncate(0)
    assert pool.num_free == 6


def test_a_fork_of_what_is_not_cached_borrows_nothing() -> None:
    pool = KvBlockPool(4)
    sequence = Sequence(pool)
    sequence.extend([1, 2, 3])
    fork = sequence.try_fork(3)
    assert fork is not None and fork.num_cached == 0 and len(fork.blocks) == 1
    fork.truncate(0)
    assert pool.num_free == 4


def test_a_dry_pool_has_no_fork_and_loses_nothing() -> None:
    pool = KvBlockPool(2)
    sequence = Sequence(pool)
    sequence.extend([1] * (KV_BLOCK_TOKENS + 1))
    assert sequence.try_reserve(KV_BLOCK_TOKENS + 1)
    sequence.advance(KV_BLOCK_TOKENS)
    assert sequence.try_fork(KV_BLOCK_TOKENS + 1) is None
    assert pool.num_free == 0
    sequence.truncate(0)
    pool.check_integrity()


def test_a_fork_never_cuts_into_what_it_borrowed() -> None:
    pool = KvBlockPool(3)
    sequence = Sequence(pool)
    sequence.extend([1] * KV_BLOCK_TOKENS)
    assert sequence.try_reserve(KV_BLOCK_TOKENS)
    sequence.advance(KV_BLOCK_TOKENS)
    fork = sequence.try_fork(KV_BLOCK_TOKENS + 1)
    assert fork is not None
    with pytest.raises(AssertionError, match="a lent block"):
        fork.truncate(3)
