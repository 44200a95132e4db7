"""Batch: the rows of one forward pass, of one or several sequences, as flat arrays (core)."""

from dataclasses import dataclass
from typing import Any

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
    tables = _block_tables(pieces)
    token_ids, positions, row_sequence, slots, logit_rows = [], [], [], [], []
    num_rows = 0
    for index, (piece, table) in enumerate(zip(pieces, tables, strict=True)):
        assert piece.num_rows > 0, "a piece has no rows"
        assert 0 <= piece.num_logits <= piece.num_rows, "logits of which row?"
        start = piece.sequence.num_cached
        end = start + piece.num_rows
        assert end <= piece.sequence.num_tokens, "a piece is longer than its sequence"
        places = np.arange(start, end, dtype=np.int32)
        blocks = table[places // limits.KV_BLOCK_TOKENS]
        num_rows += piece.num_rows
        token_ids.append(piece.sequence.token_ids[start:end].copy())
        positions.append(places)
        row_sequence.append(np.full(piece.num_rows, index, np.int32))
        slots.append(blocks * limits.KV_BLOCK_TOKENS + places % limits.KV_BLOCK_TOKENS)
        logit_rows.append(np.arange(num_rows - piece.num_logits, num_rows, dtype=np.intp))
    return Batch(
        token_ids=_joined(token_ids),
        positions=_joined(positions),
        row_sequence=_joined(row_sequence),
        slots=_joined(slots),
        block_tables=tables,
        logit_rows=_joined(logit_rows),
    )


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _block_tables(pieces: list[Piece]) -> I32:
    tables = [piece.sequence.blocks for piece in pieces]
    padded: I32 = np.zeros((len(pieces), max(map(len, tables))), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded
