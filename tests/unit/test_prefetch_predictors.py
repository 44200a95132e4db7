"""Predictors and their fusion: each learns what it is there to learn, and predicts it."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.experts.prefetch.calibration import Calibration, pool_adjacent
from shoal.experts.prefetch.fusion import Fusion
from shoal.experts.prefetch.guesser import (
    FUSED,
    PREDICTORS,
    PREGATE_BINS,
    CallKind,
    Guess,
    Guesser,
    RoutedLayer,
)
from shoal.experts.prefetch.locality import LocalityWindow
from shoal.experts.prefetch.markov import SetMarkov
from shoal.experts.prefetch.pregate import Pregate
from shoal.limits import MAX_PREFETCH_STREAMS
from shoal.quant import Format, Scheme
from shoal.rows import Rows

I64 = NDArray[np.int64]
NUM_EXPERTS, CHOSEN = 32, 4


def ids(*experts: int) -> I64:
    return np.array(experts, np.int64)


def rows_of(num_rows: int, dim: int = 32, seed: int = 0) -> Rows:
    values = np.random.default_rng(seed).standard_normal((num_rows, dim), np.float32)
    return ops.quantise_rows(Scheme.F32, values)


def layers(count: int = 3, owned: Sequence[int] = range(NUM_EXPERTS)) -> list[RoutedLayer]:
    return [RoutedLayer(i, NUM_EXPERTS, CHOSEN, tuple(owned)) for i in range(count)]


class TestLocality:
    def test_the_newest_use_counts_most(self) -> None:
        window = LocalityWindow(4)
        for experts in (ids(0), ids(1), ids(2), ids(0)):
            window.observe(experts)
        recent, lately = window.features()
        assert recent.tolist() == [0b1001, 0b0010, 0b0100, 0]
        assert lately[0] >= lately[2] >= lately[3] == 0

    def test_it_forgets(self) -> None:
        window = LocalityWindow(2)
        window.observe(ids(0))
        for _ in range(200):
            window.observe(ids(1))
        recent, lately = window.features()
        assert recent.tolist() == [0, 0b1111]
        assert lately[0] == 0 < lately[1]


class TestMarkov:
    def test_it_learns_which_set_follows_which(self) -> None:
        chain = SetMarkov(NUM_EXPERTS, (NUM_EXPERTS, NUM_EXPERTS))
        rng = np.random.default_rng(1)
        for _ in range(100):
            a = rng.integers(0, 16, 2)
            chain.observe((a, ids()), a + 16)
        scores = chain.scores((ids(3, 7), ids()))[0]
        assert set(np.argsort(-scores)[:2].tolist()) == {19, 23}

    def test_the_second_set_back_decides_where_the_first_does_not(self) -> None:
        # After {0}, what follows depends on the set before it alone: an order-1 chain cannot know.
        chain = SetMarkov(NUM_EXPERTS, (NUM_EXPERTS, NUM_EXPERTS))
        for turn in range(200):
            chain.observe((ids(0), ids(1 + turn % 2)), ids(10 + turn % 2))
        assert chain.scores((ids(0), ids(1)))[1].argmax() == 10
        assert chain.scores((ids(0), ids(2)))[1].argmax() == 11

    def test_unseen_context_falls_back_to_the_layers_own_frequencies(self) -> None:
        chain = SetMarkov(NUM_EXPERTS, (NUM_EXPERTS, NUM_EXPERTS))
        for turn in range(50):
            chain.observe((ids(0), ids(1)), ids(20 if turn % 5 else 21))
        scores = chain.scores((ids(9), ids(8)))[0]
        assert scores.argmax() == 20
        # What was never used stays far below what was: no uniform prior lifts it.
        assert scores[21] - scores[22] > 3

    def test_old_habits_fade(self) -> None:
        chain = SetMarkov(4, (4, 4))
        for expert, calls in ((2, 8000), (3, 6000)):
            for _ in range(calls):
                chain.observe((ids(0), ids(1)), ids(expert))
        assert chain.scores((ids(0), ids(1)))[0].argmax() == 3
        assert np.isfinite(chain.scores((ids(0), ids(1)))).all()


class TestPregate:
    def gate(self, parts: int = 1) -> tuple[Pregate, NDArray[np.float32]]:
        router = np.random.default_rng(5).standard_normal((NUM_EXPERTS, 32), np.float32)
        halves = [router] if parts == 1 else [router * np.float32(0.75), router * np.float32(0.25)]
        source = np.concatenate(halves).view(np.uint8)
        matrix = ops.pack_matrix(Format.F32, source, parts * NUM_EXPERTS, 32)
        return Pregate(matrix, parts, CHOSEN), router

    @pytest.mark.parametrize("parts", [1, 2])
    def test_the_chosen_are_on_one_side_and_the_others_on_the_other(self, parts: int) -> None:
        gate, router = self.gate(parts)
        rows = rows_of(1)
        bins = gate.features(rows)[0]
        wanted = set(np.argsort(-(router @ np.asarray(rows.values[0])))[:CHOSEN].tolist())
        assert {int(e) for e in np.flatnonzero(bins >= PREGATE_BINS // 2)} == wanted

    def test_of_several_rows_each_ones_choice_is_inside(self) -> None:
        gate, router = self.gate()
        rows = rows_of(5)
        bins = gate.features(rows)[0]
        wanted: set[int] = set()
        for row in np.asarray(rows.values):
            wanted.update(np.argsort(-(router @ row))[:CHOSEN].tolist())
        assert {int(e) for e in np.flatnonzero(bins >= PREGATE_BINS // 2)} == wanted

    def test_a_row_alone_is_binned_as_among_others(self) -> None:
        gate, _ = self.gate()
        rows = rows_of(1)
        twice = rows.take(np.zeros(2, np.intp))
        np.testing.assert_array_equal(gate.features(rows), gate.features(twice))

    def test_rows_that_are_no_numbers_give_bins_all_the_same(self) -> None:
        gate, _ = self.gate()
        values = np.full((2, 32), np.inf, np.float32)
        values[1] = np.nan
        bad = Rows(Scheme.F32, 32, values, np.empty((2, 0), np.float32))
        bins = gate.features(bad)
        assert bins.shape == (1, NUM_EXPERTS) and 0 <= bins.min() <= bins.max() < PREGATE_BINS


class TestCalibration:
    def test_pooling_makes_rates_ascend_and_keeps_their_mean(self) -> None:
        hits, seen = [1.0, 3.0, 2.0, 9.0], [10.0, 10.0, 10.0, 10.0]
        assert pool_adjacent(hits, seen) == [0.1, 0.25, 0.25, 0.9]
        assert pool_adjacent([5, 1], [5, 5]) == [0.6, 0.6]

    def test_probabilities_are_what_came_true(self) -> None:
        rates = np.array([0.02, 0.2, 0.7, 0.95])
        calibration = Calibration(np.full(4, 0.5))
        rng = np.random.default_rng(2)
        for _ in range(800):
            bins = rng.integers(0, 4, 64)
            calibration.update(bins, rng.random(64) < rates[bins])
        np.testing.assert_allclose(calibration.probability, rates, atol=0.03)

    def test_it_follows_a_change(self) -> None:
        calibration = Calibration(np.full(1, 0.5))
        for truth, calls in ((True, 4000), (False, 8000)):
            for _ in range(calls):
                calibration.update(np.zeros(1, np.int64), np.array([truth]))
        assert calibration.probability[0] < 0.2


def chances(fusion: Fusion, features: I64) -> NDArray[np.float64]:
    """Return each expert's probability."""
    everybody = np.arange(features.shape[1])
    ranked, p = fusion.rank(np.ascontiguousarray(features), everybody)
    assert (np.diff(p) <= 0).all() and sorted(ranked) == everybody.tolist()
    found = np.empty_like(p)
    found[ranked] = p
    return found


class TestFusion:
    def drive(
        self, draw: Callable[[np.random.Generator], tuple[I64, NDArray[np.float64]]], calls: int
    ) -> tuple[Fusion, np.random.Generator]:
        rng = np.random.default_rng(3)
        fusion = Fusion([4, 4], 0.25)
        for _ in range(calls):
            features, p = draw(rng)
            fusion.update(features, rng.random(p.size) < p)
        return fusion, rng

    def test_two_witnesses_are_more_than_one(self) -> None:
        def draw(rng: np.random.Generator) -> tuple[I64, NDArray[np.float64]]:
            features = rng.integers(0, 4, (2, 64))
            z = -3.0 + 1.2 * features[0] + 0.8 * features[1]
            return features, 1 / (1 + np.exp(-z))

        fusion, rng = self.drive(draw, 600)
        features, p = draw(rng)
        np.testing.assert_allclose(chances(fusion, features), p, atol=0.12)

    def test_one_witness_heard_twice_is_one_witness(self) -> None:
        # The second feature repeats the first: adding their evidence would overstate p.
        rates = np.array([0.05, 0.3, 0.6, 0.9])

        def draw(rng: np.random.Generator) -> tuple[I64, NDArray[np.float64]]:
            bins = rng.integers(0, 4, 64)
            return np.stack([bins, bins]), rates[bins]

        fusion, _ = self.drive(draw, 600)
        both = np.tile(np.arange(4), (2, 1))
        np.testing.assert_allclose(chances(fusion, both), rates, atol=0.06)

    def test_a_feature_of_noise_changes_little(self) -> None:
        def draw(rng: np.random.Generator) -> tuple[I64, NDArray[np.float64]]:
            features = rng.integers(0, 4, (2, 64))
            return features, np.where(features[0] == 3, 0.8, 0.1)

        fusion, _ = self.drive(draw, 600)
        for noise in range(4):
            p = chances(fusion, np.array([[0, 3], [noise, noise]]))
            np.testing.assert_allclose(p, [0.1, 0.8], atol=0.1)


class OracleGate:
    """A pre-gate that knows: what the next call wants is in its top bins, with some slips."""

    def __init__(self) -> None:
        self.next = ids()

    def features(self, rows: Rows) -> I64:
        bins = np.full((1, NUM_EXPERTS), 4, np.int64)
        bins[0, self.next] = PREGATE_BINS - 1
        return bins


def walk(rng: np.random.Generator, tokens: int, num_layers: int) -> list[list[I64]]:
    """Routing with habits: two experts follow from the layer before, two stay for some tokens."""
    half = NUM_EXPERTS // 2
    passes: list[list[I64]] = []
    kept = [half + rng.choice(half, 2, replace=False) for _ in range(num_layers)]
    for _ in range(tokens):
        chosen: list[I64] = []
        chained = rng.choice(half, 2, replace=False)
        for layer in range(num_layers):
            if rng.random() < 0.2:
                kept[layer] = half + rng.choice(half, 2, replace=False)
            chained = (chained * 5 + 3) % half
            chosen.append(np.sort(np.concatenate([chained, kept[layer]])))
        passes.append(chosen)
    return passes


def replay(
    guesser: Guesser, passes: list[list[I64]], gate: OracleGate | None = None, stream: int = 0
) -> list[Guess]:
    guesses: list[Guess] = []
    order = [(layer, experts) for chosen in passes for layer, experts in enumerate(chosen)]
    for (layer, experts), (_, following) in pairwise(order):
        guesser.settle(stream, layer, 1, experts)
        if gate is not None:
            gate.next = following
        guesses.append(guesser.guess(stream, layer, rows_of(1)))
    return guesses


class TestGuesser:
    @pytest.mark.parametrize("name", PREDICTORS)
    def test_each_predictor_alone_beats_chance_by_far(self, name: str) -> None:
        """A predictor that predicts nothing, or predicts at random, fails here."""
        gate = OracleGate()
        guesser = Guesser(layers(), {0: gate, 1: gate}, (name,))
        replay(guesser, walk(np.random.default_rng(7), 400, 3), gate)
        # Layer 0 follows no layer of its token: a pre-gate cannot see it.
        figures = guesser.figures(1)[FUSED]
        assert figures.wanted > 500
        chance = CHOSEN / NUM_EXPERTS
        assert figures.recall > {"pregate": 0.9, "markov": 3 * chance, "locality": 3 * chance}[name]
        assert figures.admitted > 50, "it never dares"
        surely = {"pregate": 0.9, "markov": 0.45, "locality": 0.6}[name]
        assert figures.precision > surely, "what it is sure of comes true"

    def test_fused_beats_each_alone(self) -> None:
        # Without the oracle: half of each set is the chain's to find, half the window's.
        guesser = Guesser(layers(), {}, ("markov", "locality"))
        replay(guesser, walk(np.random.default_rng(8), 300, 3))
        figures = guesser.figures(1)
        best = max(figures[name].recall for name in ("markov", "locality"))
        assert figures[FUSED].recall > best + 0.08

    def test_a_pre_gate_that_says_it_all_is_heard_alone_until_it_fails(self) -> None:
        class Fading(OracleGate):
            is_blind = False

            def features(self, rows: Rows) -> I64:
                return np.full((1, NUM_EXPERTS), 4) if self.is_blind else super().features(rows)

        gate = Fading()
        guesser = Guesser(layers(), {0: gate, 1: gate})
        passes = walk(np.random.default_rng(11), 700, 3)
        seeing = replay(guesser, passes[:300], gate)[-90:]
        of_gate_alone = [guess for guess in seeing if len(guess.features) == 1]
        assert {guess.target for guess in of_gate_alone} == {1, 2}
        assert len(of_gate_alone) > 0.6 * 60
        gate.is_blind = True
        blind = replay(guesser, passes[300:], gate)[-90:]
        assert not any(len(guess.features) == 1 for guess in blind)

    def test_what_is_random_is_not_predicted(self) -> None:
        rng = np.random.default_rng(9)
        passes = [[rng.choice(NUM_EXPERTS, 4, False) for _ in range(3)] for _ in range(200)]
        guesser = Guesser(layers(), {}, ("markov", "locality"))
        guesses = replay(guesser, [[np.sort(s) for s in chosen] for chosen in passes])
        late = np.concatenate([guess.probabilities[:4] for guess in guesses[-100:]])
        assert late.max() < 0.5
        assert abs(late.mean() - CHOSEN / NUM_EXPERTS) < 0.12
        assert 0 < late.size < 2 * 100, "and most calls are not even guessed"

    def test_probabilities_are_honest(self) -> None:
        gate = OracleGate()
        passes = walk(np.random.default_rng(10), 400, 3)
        guesser = Guesser(layers(), {0: gate, 1: gate})
        guesses = replay(guesser, passes, gate)
        order = [experts for chosen in passes for experts in chosen]
        said, true = 0.0, 0
        for guess, wanted in list(zip(guesses, order[1:], strict=True))[600:]:
            likely = guess.probabilities > 0.3
            said += float(guess.probabilities[likely].sum())
            true += int(np.isin(guess.experts[likely], wanted).sum())
        assert true > 400
        assert abs(said - true) / true < 0.1

    def test_streams_that_take_turns_keep_their_own_history(self) -> None:
        one, two = ids(1, 2, 3, 4), ids(21, 22, 23, 24)
        guesser = Guesser(layers(1), {}, ("locality",))
        for _ in range(120):
            for stream, experts in ((1, one), (2, two)):
                guesser.settle(stream, 0, 1, experts)
                guesser.guess(stream, 0, rows_of(1))
        guess = guesser.guess(2, 0, rows_of(1))
        assert set(guess.experts[:4].tolist()) == set(two.tolist())
        assert guesser.figures()["locality"].recall > 0.9

    def test_only_owned_experts_are_guessed(self) -> None:
        guesser = Guesser(layers(2, owned=range(8)), {}, ("markov", "locality"))
        guesser.settle(0, 0, 1, ids(1, 2))
        for num_rows in (1, 4, 100):
            assert set(guesser.guess(0, 0, rows_of(num_rows)).experts.tolist()) == set(range(8))

    def test_many_rows_sweep_the_next_layer_in_file_order(self) -> None:
        guesser = Guesser(layers(2), {}, ("locality",))
        for _ in range(40):
            for layer in (0, 1):
                guesser.settle(0, layer, 200, np.arange(NUM_EXPERTS))
                guesser.guess(0, layer, rows_of(200))
        guess = guesser.guess(0, 1, rows_of(200))
        assert guess.kind is CallKind.MANY
        assert guess.experts.tolist() == list(range(NUM_EXPERTS))
        assert guess.probabilities.min() > 0.95

    def test_a_guess_is_settled_by_its_own_layers_call_only(self) -> None:
        guesser = Guesser(layers(3), {}, ("locality",))
        guesser.settle(0, 0, 1, ids(1))
        guess = guesser.guess(0, 0, rows_of(1))
        assert guess.target == 1
        assert guesser.settle(0, 2, 1, ids(1)) is None
        guesser.guess(0, 0, rows_of(1))
        assert guesser.settle(0, 1, 3, ids(1)) is None, "another kind of call"
        guesser.guess(0, 0, rows_of(1))
        guesser.forget(0)
        assert guesser.settle(0, 1, 1, ids(1)) is None
        assert guesser.guess(0, 2, rows_of(1)).target == 0, "after the last layer comes the first"

    def test_streams_are_forgotten_the_least_recent_first(self) -> None:
        guesser = Guesser(layers(1), {}, ("locality",))
        for stream in range(MAX_PREFETCH_STREAMS + 1):
            guesser.settle(stream, 0, 1, ids(1))
            guesser.guess(stream, 0, rows_of(1))
        assert guesser.settle(0, 0, 1, ids(1)) is None
        assert guesser.settle(MAX_PREFETCH_STREAMS, 0, 1, ids(1)) is not None
