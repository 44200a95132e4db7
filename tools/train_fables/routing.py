"""How a model uses its experts: figures of recorded routing."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tools.train_fables.corpus import DOMAINS

I32 = NDArray[np.int32]
F64 = NDArray[np.float64]


def statistics(traces: Sequence[I32], num_experts: int) -> dict[str, list[float]]:
    """Return per layer what the table of docs/fables.md shows.

    traces: of each text [T, layers, top_k], the likeliest expert first.
    """
    whole = np.concatenate(list(traces))
    _, layers, top_k = whole.shape
    found: dict[str, list[float]] = {
        name: [] for name in ("dead", "least", "most", "entropy_bits", "reuse", "top1_from_before")
    }
    for layer in range(layers):
        share = np.bincount(whole[:, layer].ravel(), minlength=num_experts) / whole[:, layer].size
        found["dead"].append(int((share == 0).sum()))
        found["least"].append(float(share.min() * num_experts))
        found["most"].append(float(share.max() * num_experts))
        some = share[share > 0]
        found["entropy_bits"].append(float(-(some * np.log2(some)).sum()))
        found["reuse"].append(_reuse(traces, layer, top_k))
        found["top1_from_before"].append(_predictability(traces, layer, num_experts))
    return found


def domain_shares(traces: Sequence[I32], domains: Sequence[str], num_experts: int) -> F64:
    """Return [layers, domains, experts]: an expert's share of a domain's choices, times E.

    1: as often as by chance. Domains as in DOMAINS.
    """
    layers = traces[0].shape[1]
    shares = np.zeros((layers, len(DOMAINS), num_experts))
    for row, domain in enumerate(DOMAINS):
        mine = [t for t, d in zip(traces, domains, strict=True) if d == domain]
        whole = np.concatenate(mine)
        for layer in range(layers):
            counts = np.bincount(whole[:, layer].ravel(), minlength=num_experts)
            shares[layer, row] = counts / counts.sum() * num_experts
    return shares


def _reuse(traces: Sequence[I32], layer: int, top_k: int) -> float:
    """Return the mean share of a token's experts that the token before it had, too."""
    common = pairs = 0
    for trace in traces:
        now, before = trace[1:, layer], trace[:-1, layer]
        common += int((now[:, :, None] == before[:, None, :]).sum())
        pairs += now.shape[0]
    return common / (pairs * top_k)


def _predictability(traces: Sequence[I32], layer: int, num_experts: int) -> float:
    """Return how often the first expert follows from the one of the layer before.

    A table of the likeliest successor is made from the even texts and tried on the odd ones.
    """
    if layer == 0:
        return float("nan")
    table = np.zeros((num_experts, num_experts), np.int64)
    for trace in traces[0::2]:
        np.add.at(table, (trace[:, layer - 1, 0], trace[:, layer, 0]), 1)
    guess = table.argmax(-1)
    hits = [guess[trace[:, layer - 1, 0]] == trace[:, layer, 0] for trace in traces[1::2]]
    return float(np.concatenate(hits).mean())
