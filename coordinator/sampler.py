"""Sampler: from one row of logits to the next token and what the caller wants to know of it."""

from dataclasses import dataclass

from coordinator.array_types import F32, I32
from coordinator.request import GenerationRequest, TokenLogprob
from shoal import ops


@dataclass(frozen=True, slots=True)
class Choice:
    token_id: int
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...]


def choose(logits: F32, request: GenerationRequest, history: I32) -> Choice:
    """Sample the token that follows `history`.

    Args:
        logits: [V] float32.
        history: all ids so far, prompt and answer. Its length is the position of the new token:
            with the seed and the token id it determines the noise (exactness rule 7).

    Raises: NumericError for non-finite logits.
    """
    params = request.sampling
    token_id = ops.sample(logits, params, history, params.seed, 0, history.size)
    if request.num_top_logprobs is None:
        return Choice(token_id, None, ())
    top: tuple[TokenLogprob, ...] = ()
    if request.num_top_logprobs:
        ids, logprobs = ops.top_logprobs(logits, request.num_top_logprobs)
        top = tuple(map(TokenLogprob, ids.tolist(), logprobs.tolist()))
    return Choice(token_id, ops.logprob_of(logits, token_id), top)
