"""Choosing the next token, and log-probabilities (exactness rule 7; docs/numerics.md).

token = argmax(logit / temperature + g): Gumbel noise g from a counter-based generator keyed by
(seed; choice, position, token id), so that the draw does not depend on how a request is served.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal import _kernels
from shoal.errors import NumericError, RequestError

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen; the defaults are greedy.

    Order: logit_bias, penalties, temperature, top_k, top_p, min_p.

    temperature: 0 (the largest logit), or 0.001..1000.
    top_k: keep that many candidates; 0: all.
    top_p: keep the shortest run of the likeliest with this share of the mass, in (0, 1].
    min_p: keep candidates with at least this share of the likeliest one's mass, in [0, 1].
    repetition_penalty: divides a positive logit of a seen token, multiplies another; > 0.
    presence_penalty, frequency_penalty: taken off a seen token's logit once; per occurrence.
    seed: 0..2^64 - 1.
    logit_bias: (token id, what is added to its logit); -infinity bans the token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Raises RequestError that names the parameter and its legal range."""
        temperature = self.temperature
        _check(
            "temperature",
            temperature,
            temperature == 0 or 1e-3 <= temperature <= 1e3,
            "0 or 0.001..1000",
        )
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0..2147483647")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0..1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 1e-3 <= penalty <= 1e3, "0.001..1000")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, -100 <= value <= 100, "-100..100")
        _check("seed", self.seed, 0 <= self.seed < 2**64, "0..2^64 - 1")
        for token, bias in self.logit_bias:
            legal = abs(bias) <= 1e4 or bias == -math.inf
            _check(
                f"logit_bias of token {token}",
                bias,
                token >= 0 and legal,
                "-10000..10000 or -inf, for an id of the vocabulary",
            )


def sample(
    logits: F32, params: SamplingParams, history: I32, seed: int, choice: int, position: int
) -> int:
    """Return the id of the token drawn from logits [V].

    Args:
        history: [n] the ids that penalties see, repeats included.
        seed: of the request, 0..2^64 - 1.
        choice: index among the request's alternatives.
        position: of the token being chosen in its sequence.

    Raises:
        NumericError: a logit is not finite.
        RequestError: logit_bias names an id beyond the vocabulary, or bans every token.
    """
    _check_finite(logits)
    ids = np.array([token for token, _ in params.logit_bias], np.int32)
    biases = np.array([bias for _, bias in params.logit_bias], np.float32)
    try:
        return _kernels.sample(
            logits,
            history,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            ids,
            biases,
            seed,
            choice,
            position,
        )
    except ValueError as error:
        raise RequestError(str(error)) from error


def top_logprobs(logits: F32, k: int) -> tuple[I32, F32]:
    """Return the k ids of largest logit, ties to the lower id, and their natural log-probabilities.

    Raises:
        NumericError: a logit is not finite.
    """
    _check_finite(logits)
    ids = np.empty(k, np.int32)
    logprobs = np.empty(k, np.float32)
    _kernels.top_logprobs(logits, ids, logprobs)
    return ids, logprobs


def logprob_of(logits: F32, token: int) -> float:
    """Return the natural log-probability of one token under softmax of logits [V]."""
    _check_finite(logits)
    return _kernels.logprob_of(logits, token)


def _check_finite(logits: F32) -> None:
    if not _kernels.all_finite(logits):
        raise NumericError("a logit is not finite", (0,))


def _check(name: str, value: float, legal: bool, allowed: str) -> None:
    if not legal:
        raise RequestError(f"{name} = {value}: must be {allowed}")
