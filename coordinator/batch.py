"""Batch: the rows of one forward pass, of one or several sequences, as flat arrays (core)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.array_types import I32
from coordinator.sequence import Sequence
from shoal import limits


@dataclass(frozen=True, slots=True)
class Piece:
    """The next `num_rows` tokens of a sequence that are not cached yet.

    num_logits: how many of its last rows have their logits computed.
    """

    sequence: Sequence
    num_rows: int
    num_logits: int


@dataclass(frozen=True, slots=True)
class Batch:
    """T rows of S sequences.

    token_ids, positions, row_sequence, slots: [T] int32; positions count from the sequence's
        first token; row_sequence indexes block_tables; slot = KV block * KV_BLOCK_TOKENS + offset.
    block_tables: [S, M] int32, the blocks of each sequence in order, padded with 0.
    logit_rows: [R] intp, the rows whose logits are wanted, in order of the pieces.
    """

    token_ids: I32
    positions: I32
    row_sequence: I32
    slots: I32
    block_tables: I32
    logit_rows: NDArray[np.intp]

    @property
    def num_rows(self) -> int:
        return int(self.token_ids.shape[0])


def make_batch(pieces: list[Piece]) -> Batch:
    """Lay the pieces out one after the other. Every piece's blocks must be reserved."""
    num_rows = np.array([piece.num_rows for piece in pieces], np.intp)
    assert num_rows.min() > 0, "a piece has no rows"
    assert all(0 <= piece.num_logits <= piece.num_rows for piece in pieces), "logits of which row?"
    ends = np.cumsum(num_rows)
    starts = np.array([piece.sequence.num_cached for piece in pieces], np.intp)
    for piece, start, rows in zip(pieces, starts, num_rows, strict=True):
        assert start + rows <= piece.sequence.num_tokens, "a piece is longer than its sequence"
    row_sequence = np.repeat(np.arange(len(pieces)), num_rows)
    positions = np.arange(ends[-1]) - (ends - num_rows)[row_sequence] + starts[row_sequence]
    tables = _block_tables(pieces)
    blocks = tables[row_sequence, positions // limits.KV_BLOCK_TOKENS]
    slots = blocks * limits.KV_BLOCK_TOKENS + positions % limits.KV_BLOCK_TOKENS
    token_ids = np.concatenate(
        [
            piece.sequence.token_ids[start : start + rows]
            for piece, start, rows in zip(pieces, starts, num_rows, strict=True)
        ]
    )
    from_end = ends[row_sequence] - np.arange(ends[-1])  # 1 for the last row of a piece
    wanted = from_end <= np.array([piece.num_logits for piece in pieces])[row_sequence]
    return Batch(
        token_ids=token_ids,
        positions=positions.astype(np.int32),
        row_sequence=row_sequence.astype(np.int32),
        slots=slots.astype(np.int32),
        block_tables=tables,
        logit_rows=np.flatnonzero(wanted),
    )


def _block_tables(pieces: list[Piece]) -> I32:
    tables = [piece.sequence.blocks for piece in pieces]
    padded: I32 = np.zeros((len(pieces), max(map(len, tables))), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded
