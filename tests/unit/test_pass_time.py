"""Pass time learns what passes take, through noise and stalls; what it never saw is dear."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.speculation.pass_time import LOOK_EVERY, LOOK_SOON, MAX_NEAR_ROWS, PassTime

E, A = 128, 8
FIXED, ROW, EXPERT = 1.3, 0.004, 0.002


def true_s(num_rows: int, parts: tuple[float, float, float] = (FIXED, ROW, EXPERT)) -> float:
    fixed, row, expert = parts
    return fixed + row * num_rows + expert * E * (1 - (1 - A / E) ** num_rows)


def taught(parts: tuple[float, float, float], seed: int, passes: int = 300) -> PassTime:
    """Noise of 5 %; every twentieth pass stalls and takes ten times as long."""
    rng, pass_time = random.Random(seed), PassTime(E, A)
    for _ in range(passes):
        rows = rng.choice([1, 2, 3, 5, 9, 17, 33, 200])
        seconds = true_s(rows, parts) * (1 + rng.gauss(0, 0.05))
        pass_time.observe(rows, seconds * (10 if rng.random() < 0.05 else 1))
    return pass_time


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "parts",
    [(FIXED, ROW, EXPERT), (0.01, 0.003, 0.0), (0.001, 0.0001, 0.0004), (0.05, 0.0, 0.0)],
    ids=["far", "rows are dear", "experts are dear", "nothing but round trips"],
)
def test_times_are_learned_through_noise_and_stalls(
    parts: tuple[float, float, float], seed: int
) -> None:
    pass_time = taught(parts, seed)
    for rows in range(1, MAX_NEAR_ROWS + 1):
        assert pass_time.predict(rows) == pytest.approx(true_s(rows, parts), rel=0.12), rows


def test_the_parts_are_found_where_nothing_disturbs() -> None:
    pass_time = PassTime(E, A)
    for rows in (1, 2, 3, 5, 9, 17, 33) * 5:
        pass_time.observe(rows, true_s(rows))
    assert pass_time.parts() == pytest.approx((FIXED, ROW, EXPERT), rel=1e-3)
    assert pass_time.predict(12) == pytest.approx(true_s(12), rel=1e-3), "never run"


def test_slices_that_are_always_chosen_make_a_straight_line() -> None:
    pass_time = PassTime(16, 16)
    assert pass_time.distinct_experts(1) == pass_time.distinct_experts(30) == 16
    for rows in (1, 4, 17) * 5:
        pass_time.observe(rows, 0.1 + 0.01 * rows)
    assert pass_time.predict(20) == pytest.approx(0.3, rel=1e-6)
    assert pass_time.predict(100) == pytest.approx(1.1, rel=1e-6)


def test_before_a_plain_pass_nothing_is_known() -> None:
    pass_time = PassTime(E, A)
    assert pass_time.predict(1) == float("inf")
    pass_time.observe(200, 2.0)
    assert not pass_time.is_known
    assert pass_time.predict(5) == float("inf")
    pass_time.observe(1, 1.5)
    assert pass_time.is_known
    assert pass_time.predict(1) == pytest.approx(1.5)


def test_a_first_plain_pass_slower_than_the_prompt_is_not_believed() -> None:
    pass_time = PassTime(E, A)
    pass_time.observe(200, 2.0)
    pass_time.observe(1, 15.0)
    assert not pass_time.is_known
    pass_time.observe(1, 1.5)
    assert pass_time.is_known
    assert pass_time.predict(1) == pytest.approx(1.5)


def test_with_plain_passes_alone_a_row_is_as_dear_as_a_pass() -> None:
    pass_time = PassTime(E, A)
    pass_time.observe(1, 0.5)
    assert [pass_time.predict(rows) for rows in (1, 2, 10)] == pytest.approx([0.5, 1.0, 5.0])


@given(
    fixed=st.floats(0.001, 2.0),
    row=st.floats(0.0, 0.1),
    expert=st.floats(0.0, 0.01),
    chunk=st.integers(34, 512),
    experts=st.sampled_from([(128, 8), (16, 16), (32, 4), (8, 2)]),
)
def test_a_prompts_chunk_prices_drafts_no_lower_than_they_are(
    fixed: float, row: float, expert: float, chunk: int, experts: tuple[int, int]
) -> None:
    """Whatever of a pass is wire and what is experts, of passes without noise."""
    pass_time = PassTime(*experts)

    def seconds(rows: int) -> float:
        return fixed + row * rows + expert * pass_time.distinct_experts(rows)

    pass_time.observe(chunk, seconds(chunk))
    pass_time.observe(1, seconds(1))
    for rows in range(1, MAX_NEAR_ROWS + 1):
        assert pass_time.predict(rows) >= seconds(min(rows, chunk)) * (1 - 1e-9)
        assert pass_time.predict(rows) <= rows * seconds(1) * (1 + 1e-9)


@given(
    passes=st.lists(st.tuples(st.integers(1, 600), st.floats(1e-6, 1e3)), min_size=1, max_size=60),
    experts=st.sampled_from([(128, 8), (16, 16), (1, 1)]),
)
def test_whatever_passes_take_more_rows_never_take_less(
    passes: list[tuple[int, float]], experts: tuple[int, int]
) -> None:
    pass_time = PassTime(*experts)
    for rows, seconds in passes:
        pass_time.observe(rows, seconds)
    times = [pass_time.predict(rows) for rows in range(1, 100)]
    assert all(a <= b for a, b in pairwise(times))
    assert all(time > 0 for time in times)
    assert min(pass_time.parts()) >= 0


def test_a_clock_too_coarse_teaches_nothing() -> None:
    pass_time = PassTime(E, A)
    pass_time.observe(1, 0.0)
    assert not pass_time.is_known


def test_one_stall_among_new_numbers_of_rows_moves_little() -> None:
    pass_time = PassTime(E, A)
    for rows in (1, 2, 3) * 5:
        pass_time.observe(rows, true_s(rows))
    pass_time.observe(6, 10 * true_s(6))
    for rows in range(1, 12):
        assert pass_time.predict(rows) < 1.4 * true_s(rows)


def test_what_lasts_is_learned() -> None:
    """The link becomes five times as slow, then as fast as it was."""
    pass_time = taught((FIXED, ROW, EXPERT), 0)
    for factor in (5, 1):
        for _ in range(6):
            for rows in (1, 5, 9):
                pass_time.observe(rows, factor * true_s(rows))
        for rows in (1, 5, 9):
            assert pass_time.predict(rows) == pytest.approx(factor * true_s(rows), rel=0.15)


def test_a_plain_pass_is_due_when_none_was_seen_for_long() -> None:
    pass_time = PassTime(E, A)
    for _ in range(4):
        pass_time.observe(1, 1.0)
    due = []
    for _ in range(1, 2 * LOOK_EVERY + 1):
        pass_time.observe(5, 1.2)
        due.append(pass_time.is_due)
        if pass_time.is_due:
            pass_time.observe(1, 1.0)
    assert [n for n, is_due in enumerate(due, 1) if is_due] == [LOOK_EVERY, 2 * LOOK_EVERY]


def test_a_plain_pass_is_due_soon_after_one_unlike_the_others() -> None:
    pass_time = PassTime(E, A)
    for _ in range(4):
        pass_time.observe(1, 1.0)
    pass_time.observe(1, 0.5)
    for _ in range(LOOK_SOON):
        assert not pass_time.is_due
        pass_time.observe(5, 1.2)
    assert pass_time.is_due
