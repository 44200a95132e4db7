"""The native loops of reading ahead against NumPy: the same numbers, and nothing out of bounds."""

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.ops.guesses import (
    chain_bins,
    chain_learn,
    gate_bins,
    learn_experts,
    note_uses,
    rank_experts,
)

I64 = NDArray[np.int64]
EXPERTS, CHOSEN, BINS, SPREAD = 40, 5, 24, 7.0


def ids(*values: int) -> I64:
    return np.array(values, np.int64)


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (1, 2), (7, 2)])
def test_a_gate_has_zero_between_the_last_chosen_and_the_first_not(rows: int, parts: int) -> None:
    scores = np.random.default_rng(rows).standard_normal((rows, parts * EXPERTS)).astype(np.float32)
    bins = np.empty(EXPERTS, np.int64)
    gate_bins(scores, parts, CHOSEN, BINS, SPREAD, bins)
    total = scores.reshape(rows, parts, EXPERTS).sum(axis=1)
    falling = -np.sort(-total, axis=1)
    above = total - (falling[:, CHOSEN - 1] + falling[:, CHOSEN])[:, None] / 2
    places = (above * SPREAD / np.abs(above).mean(axis=1, keepdims=True)).max(axis=0)
    expected = np.clip(np.trunc(places + BINS // 2), 0, BINS - 1).astype(np.int64)
    assert np.abs(bins - expected).max() <= 1, "at most a rounding at the edge of a bin"
    assert (bins == expected).mean() > 0.9
    assert np.unique(bins).size > 4, "the scores are degenerate"
    if rows == 1:
        assert set(np.argsort(-total[0])[:CHOSEN]) == set(np.flatnonzero(bins >= BINS // 2))


def test_rows_that_are_no_numbers_give_bins_all_the_same() -> None:
    scores = np.full((2, EXPERTS), np.nan, np.float32)
    scores[1, ::2], scores[1, 1] = np.inf, -np.inf
    bins = np.full(EXPERTS, -1, np.int64)
    gate_bins(scores, 1, CHOSEN, BINS, SPREAD, bins)
    assert ((bins >= 0) & (bins < BINS)).all()


def test_a_chain_counts_and_compares_with_what_is_usual() -> None:
    rng = np.random.default_rng(1)
    pairs, uses = np.zeros((12, EXPERTS), np.float32), np.zeros(12, np.float32)
    ratios = np.zeros_like(pairs)
    share = rng.random(EXPERTS).astype(np.float32)
    for _ in range(50):
        before = rng.choice(12, 3, replace=False)
        used = rng.choice(EXPERTS, CHOSEN, replace=False)
        chain_learn(pairs, uses, before, used, share, 1.5, 4.0, True, ratios)
    assert uses.sum() == pytest.approx(50 * 3 * 1.5)
    assert pairs.sum() == pytest.approx(50 * 3 * CHOSEN * 1.5)
    expected = np.log((pairs + 4 * share) / ((uses + 4)[:, None] * share))
    seen = uses > 0
    np.testing.assert_allclose(ratios[seen], expected[seen], atol=1e-5)
    bins = np.empty(EXPERTS, np.int64)
    chain_bins(ratios, ids(2, 7), np.log(share), 20, bins)
    scores = ratios[[2, 7]].sum(axis=0) + np.log(share)
    assert np.abs(bins - np.clip(np.trunc(scores * 2 + 16), 0, 19)).max() <= 1


def test_uses_move_back_and_fade() -> None:
    bins, lately = np.zeros((2, 4), np.int64), np.zeros(4)
    note_uses(bins, lately, ids(1, 2), 4, 0.75, 20.0, 8)
    note_uses(bins, lately, ids(2), 4, 0.75, 20.0, 8)
    assert bins[0].tolist() == [0, 4, 12, 0]
    assert lately.tolist() == [0, 0.1875, 0.4375, 0]
    assert bins[1].tolist() == [0, 3, 7, 0]


def test_experts_are_ranked_by_what_their_bins_are_worth() -> None:
    rng = np.random.default_rng(2)
    first, weights = ids(0, 6), rng.standard_normal(16)
    features = np.stack([rng.integers(0, 6, EXPERTS), rng.integers(0, 10, EXPERTS)])
    probability = np.sort(rng.random(30))
    owned = np.arange(3, EXPERTS, 2)
    ranked, chances = np.empty_like(owned), np.empty(owned.size)
    rank_experts(first, weights, 0.25, 0.4, probability, features, owned, ranked, chances)
    z = 0.25 + weights[features[0]] + weights[6 + features[1]]
    p = probability[np.clip(np.trunc(z / 0.4 + 15), 0, 29).astype(np.int64)][owned]
    order = np.argsort(-p, kind="stable")
    assert ranked.tolist() == owned[order].tolist()
    assert chances.tolist() == p[order].tolist()


def test_learning_is_a_step_of_adagrad() -> None:
    rng = np.random.default_rng(3)
    first, weights, squares = ids(0, 6), rng.standard_normal(16), np.full(16, 1e-6)
    features = np.stack([rng.integers(0, 6, EXPERTS), rng.integers(0, 10, EXPERTS)])
    truth, z_bins = rng.random(EXPERTS) < 0.2, np.empty(EXPERTS, np.int64)
    before = weights.copy()
    learn_experts(first, weights, squares, -1.0, 0.4, 30, features, truth, 0.5, 0.999, z_bins)
    z = -1.0 + before[features[0]] + before[6 + features[1]]
    residual = truth - 1 / (1 + np.exp(-z))
    gradient = np.bincount(features[0], residual, 16)
    gradient += np.bincount(6 + features[1], residual, 16)
    moved = 1e-6 * 0.999 + gradient**2
    np.testing.assert_allclose(squares, moved, rtol=1e-9)
    np.testing.assert_allclose(weights, before + 0.5 * gradient / np.sqrt(moved), rtol=1e-9)
    assert z_bins.tolist() == np.clip(np.trunc(z / 0.4 + 15), 0, 29).astype(int).tolist()


def test_what_lies_outside_of_an_array_is_refused() -> None:
    pairs, uses = np.zeros((2, 4), np.float32), np.zeros(2, np.float32)
    share, bins = np.ones(4, np.float32), np.empty(4, np.int64)
    with pytest.raises(ValueError, match="before"):
        chain_learn(pairs, uses, ids(2), ids(0), share, 1.0, 1.0, False, pairs)
    with pytest.raises(ValueError, match="used"):
        chain_learn(pairs, uses, ids(1), ids(4), share, 1.0, 1.0, False, pairs)
    with pytest.raises(ValueError, match="before"):
        chain_bins(pairs, ids(-1), share, 20, bins)
    with pytest.raises(ValueError, match="used"):
        note_uses(pairs.astype(np.int64), np.zeros(4), ids(9), 4, 0.5, 1.0, 2)
    with pytest.raises(ValueError, match="chosen"):
        gate_bins(np.zeros((1, 4), np.float32), 1, 4, BINS, SPREAD, bins)
    features = np.full((1, 4), 3)
    with pytest.raises(ValueError, match="features"):
        rank_experts(ids(0), np.zeros(3), 0, 1, np.ones(2), features, ids(0), bins[:1], np.ones(1))
