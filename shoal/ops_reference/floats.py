"""Float64 oracles of norms, rope, routing and attention, and plain-integer ones of the sampler.

Written from the definitions, not from the kernels: a test that compares the two can fail.
"""

import numpy as np
from numpy.typing import NDArray

from shoal.ops.sampling import SamplingParams

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    """x / rms(x) * weight over the last axis."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + eps) * weight)


def rope(x: F64, angles: F64) -> F64:
    """Turn pairs (i, i + r/2) of the first r values of each head of x [T, H, d] by angles."""
    half = angles.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return np.concatenate(turned, axis=-1)


def softmax(x: F64) -> F64:
    """Softmax over the last axis."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def route(logits: F64, experts_per_token: int, renormalise: bool) -> tuple[I32, F64]:
    """Experts and weights [T, A]: the largest of softmax, ties to the lower index."""
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :experts_per_token]
    weights = np.take_along_axis(probabilities, order, axis=1)
    if renormalise:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return order.astype(np.int32), weights


def attention(q: F64, keys: F64, values: F64, scale: float) -> F64:
    """One row [H, d] over the keys and values [n, KVH, d] that it sees."""
    group = q.shape[0] // keys.shape[1]
    out = np.empty_like(q)
    for head in range(q.shape[0]):
        scores = keys[:, head // group] @ q[head] * scale
        out[head] = softmax(scores) @ values[:, head // group]
    return out


def logprobs(logits: F64) -> F64:
    """Natural log-probabilities of softmax."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers. Source: Salmon et al., SC11, section 4."""
    mask = 0xFFFFFFFF
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (right >> 32) ^ c1 ^ k0,
            right & mask,
            (left >> 32) ^ c3 ^ k1,
            left & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def gumbel(seed: int, choice: int, position: int, token: int) -> float:
    """The noise of one token: -log(-log u), u in (0, 1) from the first Philox word."""
    word = philox((seed & 0xFFFFFFFF, seed >> 32), (token, position, choice, 0))[0]
    return float(-np.log(-np.log((word + 0.5) / 2**32)))


def adjusted(logits: F64, params: SamplingParams, history: I32) -> F64:
    """Logits after bias and penalties, before temperature."""
    result = logits.copy()
    for token, bias in params.logit_bias:
        result[token] += bias
    for token, count in zip(*np.unique(history, return_counts=True), strict=True):
        repetition = params.repetition_penalty
        result[token] *= 1 / repetition if result[token] > 0 else repetition
        result[token] -= params.frequency_penalty * count + params.presence_penalty
    return result


def candidates(logits: F64, params: SamplingParams) -> list[int]:
    """Ids that survive top-k, top-p and min-p of logits already divided by the temperature."""
    order = [int(i) for i in np.lexsort((np.arange(len(logits)), -logits))]
    order = [i for i in order if logits[i] > -np.inf]
    if params.top_k:
        order = order[: params.top_k]
    masses = np.exp(logits[order] - logits[order[0]])
    if params.top_p < 1:
        before = np.cumsum(masses) - masses
        order = [
            i
            for i, mass in zip(order, before, strict=True)
            if mass < params.top_p * masses.sum() or i == order[0]
        ]
        masses = masses[: len(order)]
    return [i for i, mass in zip(order, masses, strict=True) if mass >= params.min_p]
