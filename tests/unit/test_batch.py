"""make_batch: flat arrays of several sequences' rows."""

from coordinator.batch import Piece, make_batch
from coordinator.kv_cache import KvBlockPool
from coordinator.sequence import Sequence
from shoal.limits import KV_BLOCK_TOKENS


def test_rows_of_two_sequences_keep_their_own_positions_and_blocks() -> None:
    pool = KvBlockPool(8)
    first, second = Sequence(pool), Sequence(pool)
    second.extend([7, 8, 9])
    assert second.try_reserve(3)  # block 0
    first.extend(list(range(KV_BLOCK_TOKENS + 2)))
    assert first.try_reserve(KV_BLOCK_TOKENS + 2)  # blocks 1 and 2
    first.advance(KV_BLOCK_TOKENS - 1)

    batch = make_batch([Piece(first, 3, num_logits=1), Piece(second, 2, num_logits=0)])

    last = KV_BLOCK_TOKENS - 1
    assert batch.token_ids.tolist() == [last, last + 1, last + 2, 7, 8]
    assert batch.positions.tolist() == [last, last + 1, last + 2, 0, 1]
    assert batch.row_sequence.tolist() == [0, 0, 0, 1, 1]
    assert batch.block_tables.tolist() == [[1, 2], [0, 0]]
    block = KV_BLOCK_TOKENS
    assert batch.slots.tolist() == [block + last, 2 * block, 2 * block + 1, 0, 1]
    assert batch.logit_rows.tolist() == [2]


def test_each_piece_gets_the_logits_of_as_many_of_its_last_rows_as_it_wants() -> None:
    pool = KvBlockPool(5)
    pieces = []
    for length, num_logits in ((1, 1), (4, 3), (2, 0), (2, 2)):
        sequence = Sequence(pool)
        sequence.extend(list(range(length)))
        assert sequence.try_reserve(length)
        pieces.append(Piece(sequence, length, num_logits))
    assert make_batch(pieces).logit_rows.tolist() == [0, 2, 3, 4, 7, 8]
