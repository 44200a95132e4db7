"""ModelPasses: a model that drafts, token after token, with the request's own sampling and noise.

The noise of a token is keyed by seed, position and id (exactness rule 7), so a drafter whose logits
are near the target's draws the token that the target will draw, at any temperature.
"""

import math
from collections.abc import Generator

from coordinator.array_types import F32
from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.expert_branch import WatchedExperts
from coordinator.kv_arrays import KvArrays
from coordinator.request import GenerationRequest
from coordinator.sampler import choose
from coordinator.sequence import Sequence
from coordinator.speculation.interface import DraftToken
from coordinator.transformer import Transformer
from shoal import limits, ops

MIN_CHANCE = 1e-6  # a token of a hot draw may be this unlikely: a chance is above 0


class ModelPasses:
    """A transformer and the KV arrays it writes to. Changes only sequences that are handed in."""

    def __init__(
        self, transformer: Transformer, kv: KvArrays, watched: WatchedExperts | None = None
    ) -> None:
        """Args: watched: the transformer's experts, if its routing is to be told."""
        self._transformer = transformer
        self._kv = kv
        self._watched = watched

    def guess(
        self, sequence: Sequence, request: GenerationRequest, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        """Run what is not cached of a sequence of ours, draw a token, append it, and go on.

        Ends when the sequence has no room for another token. Raises as `Transformer.forward`.
        """
        while True:
            while (num_left := sequence.num_tokens - sequence.num_cached) > limits.PREFILL_CHUNK:
                if not sequence.try_reserve(sequence.num_cached + limits.PREFILL_CHUNK):
                    return
                self._run(sequence, limits.PREFILL_CHUNK, 0, cancellation)
            if not sequence.try_reserve(sequence.num_tokens):
                return
            logits = self._run(sequence, num_left, 1, cancellation)[0]
            choice = choose(logits, request, sequence.token_ids)
            chance = chance_of(logits, choice.token_id)
            routing = None if self._watched is None else self._watched.last_rows(1)[0]
            sequence.extend([choice.token_id])
            yield DraftToken(choice.token_id, chance, routing)

    def _run(
        self, sequence: Sequence, num_rows: int, num_logits: int, cancellation: Cancellation
    ) -> F32:
        batch = make_batch([Piece(sequence, num_rows, num_logits)])
        logits = self._transformer.forward(batch, self._kv, cancellation)
        sequence.advance(num_rows)
        return logits


def chance_of(logits: F32, token_id: int) -> float:
    """Return the probability that logits [V] give to a token: a cheap estimate, to be calibrated.

    Not what it was drawn with, which knows penalties, cuts and the noise; but where a drafter is
    sure, the target mostly agrees.
    """
    return max(MIN_CHANCE, min(1.0, math.exp(ops.logprob_of(logits, token_id))))
