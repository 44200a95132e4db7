"""Acceptance learns what a drafter's chances are worth, and follows when the text changes."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.speculation.acceptance import CENTRES, EDGES, MAX_CHANCE, Acceptance

CHANCES = st.floats(0.001, 1.0)


def teach(
    acceptance: Acceptance, rng: random.Random, worth: float, tokens: int, drafts: int = 4
) -> None:
    """A drafter whose chances are worth `worth` times what it says."""
    for _ in range(tokens):
        raws = [rng.uniform(0.05, 1.0) for _ in range(drafts)]
        accepted = 0
        while accepted < drafts and rng.random() < worth * raws[accepted]:
            accepted += 1
        acceptance.observe(raws, accepted)


def test_before_anything_was_seen_a_chance_is_what_the_drafter_says() -> None:
    acceptance = Acceptance()
    for raw in CENTRES:
        assert acceptance.chance(raw) == pytest.approx(min(raw, MAX_CHANCE))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("worth", [1.0, 0.7, 0.3])
def test_chances_become_what_they_are_worth(worth: float, seed: int) -> None:
    acceptance, rng = Acceptance(), random.Random(seed)
    teach(acceptance, rng, worth, 1500)
    seen = []
    for _ in range(40):  # the fast factor sways: its mean is what counts
        teach(acceptance, rng, worth, 5)
        seen.append([acceptance.chance(raw) for raw in (0.25, 0.5, 0.75)])
    for column, raw in enumerate((0.25, 0.5, 0.75)):
        mean = sum(row[column] for row in seen) / len(seen)
        assert mean == pytest.approx(worth * raw, abs=0.1), raw


def test_a_harder_text_is_noticed_within_a_dozen_tokens_and_an_easier_one_too() -> None:
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.observe([0.8] * 4, 4)
    assert acceptance.chance(0.8) > 0.95
    for _ in range(12):
        acceptance.observe([0.8] * 4, 0)
    assert acceptance.chance(0.8) < 0.75
    for _ in range(60):
        acceptance.observe([0.8] * 4, 0)
    assert acceptance.chance(0.8) < 0.2
    for _ in range(40):
        acceptance.observe([0.8] * 4, 4)
    assert acceptance.chance(0.8) > 0.8


def test_guesses_after_the_first_wrong_one_say_nothing() -> None:
    short, long = Acceptance(), Acceptance()
    for _ in range(50):
        short.observe([0.9, 0.6], 1)
        long.observe([0.9, 0.6, 0.3, 0.3, 0.3], 1)
    for raw in (0.1, 0.3, 0.6, 0.9):
        assert short.chance(raw) == long.chance(raw)


def test_the_mean_is_of_late() -> None:
    acceptance = Acceptance()
    for _ in range(50):
        acceptance.observe([0.5], 1)
    assert acceptance.mean > 0.9
    for _ in range(50):
        acceptance.observe([0.5], 0)
    assert acceptance.mean < 0.1


@given(
    drafts=st.lists(
        st.lists(CHANCES, max_size=8).flatmap(
            lambda raws: st.tuples(st.just(raws), st.integers(0, len(raws)))
        ),
        max_size=80,
    ),
    raws=st.lists(CHANCES, min_size=2, max_size=10),
)
def test_a_higher_chance_is_never_worth_less(
    drafts: list[tuple[list[float], int]], raws: list[float]
) -> None:
    acceptance = Acceptance()
    for chances, accepted in drafts:
        acceptance.observe(chances, accepted)
    worths = [acceptance.chance(raw) for raw in sorted(raws)]
    assert all(a <= b + 1e-12 for a, b in pairwise(worths))
    assert all(0 < worth <= MAX_CHANCE for worth in worths)
    assert 0 <= acceptance.mean <= 1


def test_bins_ascend_to_one() -> None:
    assert list(EDGES) == sorted(EDGES) and EDGES[-1] == 1.0
    assert len(CENTRES) == len(EDGES)
