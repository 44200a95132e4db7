"""Baselines: a unigram and an interpolated Kneser-Ney 5-gram, over the model's own tokens.

Source: S. F. Chen, J. Goodman, "An empirical study of smoothing techniques for language modeling",
1998, section 2.7: one discount per order, n1 / (n1 + 2 n2). Every distribution sums to one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDER = 5
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """Counts of one order; keys are n-grams, and contexts, packed base V, ascending."""

    keys: I64
    counts: I64
    contexts: I64
    totals: I64
    types: I64
    discount: float


class KneserNey:
    """P(token | up to four tokens before it in its document)."""

    def __init__(self, tokens: NDArray[np.uint16], starts: I64, vocab_size: int) -> None:
        """tokens: whole documents one after another. starts: [documents], where each begins."""
        self._vocab = vocab_size
        assert vocab_size**ORDER < 2**62, "an n-gram must fit in an int64"
        document = np.zeros(tokens.size, np.int64)
        document[starts[1:]] = 1
        document = np.cumsum(document)
        found: list[_Order] = []
        keys, counts = np.unique(_windows(tokens, document, ORDER, vocab_size), return_counts=True)
        found.append(self._order(keys, counts))
        for order in range(ORDER - 1, 0, -1):
            # Continuation counts: distinct tokens seen before; plus what begins a document.
            heads = _heads(tokens, starts, document, order, vocab_size)
            shortened = np.concatenate((keys % vocab_size**order, np.unique(heads)))
            keys, counts = np.unique(shortened, return_counts=True)
            found.append(self._order(keys, counts))
        self._orders = found[::-1]

    def _order(self, keys: I64, counts: I64) -> _Order:
        contexts, first = np.unique(keys // self._vocab, return_index=True)
        totals = np.add.reduceat(counts, first)
        types = np.diff(np.append(first, keys.size))
        ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        return _Order(keys, counts, contexts, totals, types, discount)

    def log_probs(self, document: NDArray[np.uint16]) -> F64:
        """Return [T - 1]: of each token after the first."""
        ids = document.astype(np.int64)
        p = np.full(ids.size - 1, 1 / self._vocab)
        for order in range(1, ORDER + 1):
            # Tokens with fewer than order - 1 before them keep the lower order's probability.
            begin = max(order - 1, 1)
            if begin >= ids.size:
                break
            key = np.zeros(ids.size - begin, np.int64)
            for back in range(order - 1, -1, -1):
                key = key * self._vocab + ids[begin - back : ids.size - back]
            p[begin - 1 :] = self._interpolate(self._orders[order - 1], key, p[begin - 1 :])
        return np.log(p)

    def _interpolate(self, order: _Order, key: I64, lower: F64) -> F64:
        total, is_known = _lookup(order.contexts, order.totals, key // self._vocab)
        types, _ = _lookup(order.contexts, order.types, key // self._vocab)
        count, _ = _lookup(order.keys, order.counts, key)
        total = np.maximum(total, 1)
        seen = np.maximum(count - order.discount, 0) / total
        return np.where(is_known, seen + order.discount * types / total * lower, lower)


def unigram_log_probs(tokens: NDArray[np.uint16], vocab_size: int) -> F64:
    """Return [V]: log of the share of each token, one added to every count."""
    counts = np.bincount(tokens, minlength=vocab_size) + 1.0
    return np.log(counts / counts.sum())


def _windows(tokens: NDArray[np.uint16], document: I64, order: int, vocab: int) -> I64:
    """Return the packed n-grams that lie within one document."""
    count = tokens.size - order + 1
    key = np.zeros(count, np.int64)
    for i in range(order):
        key = key * vocab + tokens[i : i + count]
    return key[document[:count] == document[order - 1 :]]


def _heads(tokens: NDArray[np.uint16], starts: I64, document: I64, order: int, vocab: int) -> I64:
    """Return the packed n-grams with which documents begin."""
    begins = starts[starts + order <= tokens.size]
    begins = begins[document[begins] == document[begins + order - 1]]
    key = np.zeros(begins.size, np.int64)
    for i in range(order):
        key = key * vocab + tokens[begins + i]
    return key


def _lookup(keys: I64, values: I64, wanted: I64) -> tuple[I64, NDArray[np.bool_]]:
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    is_known = keys[place] == wanted
    return np.where(is_known, values[place], 0), is_known
