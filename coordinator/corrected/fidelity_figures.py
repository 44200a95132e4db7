"""How far logits are from the exact ones: figures for people, never for tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.array_types import F32

F64 = NDArray[np.float64]
GRAM = 4  # tokens: a text that repeats itself has few distinct runs of as many


@dataclass(frozen=True, slots=True)
class Closeness:
    """Logits of the same rows, exact and not.

    kl: mean of KL(exact || other), nats. agreement: share of rows with the same likeliest token.
    perplexity, exact_perplexity: of the tokens that follow, by either.
    """

    kl: float
    agreement: float
    perplexity: float
    exact_perplexity: float


def closeness(exact: F32, other: F32, next_ids: Sequence[int]) -> Closeness:
    """Compare logits [T, V], row by row; next_ids: the token that follows each of the rows."""
    assert exact.shape == other.shape and len(next_ids) == len(exact), (exact.shape, other.shape)
    kl = same = lost = exact_lost = 0.0
    for row, next_id in enumerate(next_ids):
        log_p, log_q = log_shares(exact[row]), log_shares(other[row])
        kl += float(np.sum(np.exp(log_p) * (log_p - log_q)))
        same += float(np.argmax(exact[row]) == np.argmax(other[row]))
        lost -= float(log_q[next_id])
        exact_lost -= float(log_p[next_id])
    count = len(next_ids)
    return Closeness(
        kl / count, same / count, float(np.exp(lost / count)), float(np.exp(exact_lost / count))
    )


def log_shares(logits: F32) -> F64:
    """Return the logarithm of the softmax of a row [V]."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))


def perplexity(logits: F32, next_ids: Sequence[int]) -> float:
    """Return the perplexity of the tokens that follow the rows [T, V]."""
    lost = [float(log_shares(row)[token]) for row, token in zip(logits, next_ids, strict=True)]
    return float(np.exp(-np.mean(lost)))


def overlap(exact: NDArray[np.int32], other: NDArray[np.int32]) -> float:
    """Return the share of each row's experts [T, A] that the other chose as well, on average."""
    shared = [
        len(set(a) & set(b)) / len(a) for a, b in zip(exact.tolist(), other.tolist(), strict=True)
    ]
    return sum(shared) / len(shared)


def distinct_grams(ids: Sequence[int]) -> float:
    """Return the share of a text's runs of four tokens that come once: near 1 where it moves on."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading tokens agree."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
