"""The planner drafts where that is faster by its own arithmetic, and its mistakes stay cheap."""

import random
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.speculation.pass_time import PassTime
from coordinator.speculation.planner import CEILING, EARNED, FLOOR, MARGIN, Planner
from shoal import limits
from support.speculation_world import Outcome, World, run_auto, run_static

CHANCE = st.floats(0.01, 1.0)
CHANCES = st.lists(CHANCE, max_size=limits.MAX_DRAFT)


def line(fixed: float, row: float) -> PassTime:
    """Passes that take so long, all of them run before."""
    pass_time = PassTime(1, 1)
    for rows in (1, 2, 9, 33) * 5:
        pass_time.observe(rows, fixed + row * rows)
    pass_time.observe(1, fixed + row)  # none is due
    return pass_time


def rich(pass_time: PassTime, max_draft: int = limits.MAX_DRAFT) -> Planner:
    """A planner that has won a lot, so that nothing holds it back but arithmetic."""
    planner = Planner(pass_time, max_draft)
    for _ in range(20):
        planner.observe(3, 4, pass_time.predict(1), 0.0)
    return planner


def rate(pass_time: PassTime, chances: list[float], length: int, draft_s: float) -> float:
    tokens = 1 + sum(prod(chances[:n]) for n in range(1, length + 1))
    return tokens / (pass_time.predict(1 + length) + draft_s)


@given(chances=CHANCES, row=st.floats(0.0, 0.5), draft_s=st.floats(0.0, 2.0))
def test_the_length_has_the_highest_rate_or_is_nothing(
    chances: list[float], row: float, draft_s: float
) -> None:
    pass_time = line(1.0, row)
    planner = rich(pass_time)
    length = planner.best_length(chances, draft_s)
    rates = [rate(pass_time, chances, n, draft_s) for n in range(len(chances) + 1)]
    if planner.num_probes:
        assert length <= 3 and max(rates) <= (1 + MARGIN) * rates[0] * (1 + 1e-9)
    elif length:
        assert rates[length] == pytest.approx(max(rates))
        assert rates[length] > (1 + MARGIN) * rates[0] * (1 - 1e-9), "never a loss by its own model"
    else:
        assert max(rates) <= (1 + MARGIN) * rates[0] * (1 + 1e-9)


@settings(max_examples=50)
@given(
    chances=st.lists(CHANCE, min_size=1, max_size=limits.MAX_DRAFT),
    index=st.integers(0, limits.MAX_DRAFT - 1),
    better=st.floats(0.0, 1.0),
    row=st.floats(0, 0.5),
)
def test_a_better_chance_never_makes_a_draft_shorter(
    chances: list[float], index: int, better: float, row: float
) -> None:
    pass_time = line(1.0, row)
    raised = list(chances)
    at = index % len(raised)
    raised[at] += (1.0 - raised[at]) * better
    before, after = rich(pass_time), rich(pass_time)
    lengths = before.best_length(chances, 0.0), after.best_length(raised, 0.0)
    if not before.num_probes and not after.num_probes:
        assert lengths[0] <= lengths[1]


@settings(max_examples=50)
@given(chances=CHANCES, row=st.floats(0, 0.3), more=st.floats(0, 0.3))
def test_dearer_rows_never_make_a_draft_longer(
    chances: list[float], row: float, more: float
) -> None:
    cheap, dear = rich(line(1.0, row)), rich(line(1.0, row + more))
    lengths = cheap.best_length(chances, 0.0), dear.best_length(chances, 0.0)
    if not cheap.num_probes and not dear.num_probes:
        assert lengths[0] >= lengths[1]


def test_far_nodes_make_long_drafts_and_near_ones_short() -> None:
    chances = [0.8] * limits.MAX_DRAFT
    planners = [rich(line(fixed, 0.01)) for fixed in (0.001, 0.01, 0.1, 1.0)]
    lengths = [planner.best_length(chances, 0.0) for planner in planners]
    lengths = [0 if p.num_probes else n for p, n in zip(planners, lengths, strict=True)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0 < lengths[1] < lengths[3]


def test_no_more_than_asked_for() -> None:
    pass_time = line(1.0, 0.0)
    assert rich(pass_time, 5).best_length([0.99] * 32, 0.0) == 5
    assert rich(pass_time, 0).best_length([0.99] * 32, 0.0) == 0
    planner = rich(pass_time, 2)
    assert planner.wants([], 0.9, 0.0) and planner.wants([0.9], 0.9, 0.0)
    assert not planner.wants([0.9, 0.9], 0.9, 0.0)


def test_more_guesses_are_wanted_until_they_are_not_worth_it() -> None:
    def drafted(chance: float, guess_s: float) -> int:
        planner = rich(line(1.0, 0.01))
        chances: list[float] = []
        while planner.wants(chances, chance, guess_s):
            chances.append(chance)
        return len(chances)

    assert drafted(0.9, 0.0) > drafted(0.6, 0.0) > 1
    assert drafted(0.9, 0.02) > drafted(0.9, 0.2) >= 1
    assert drafted(0.9, 2.0) == 0


def test_a_first_guess_is_wanted_for_the_sake_of_those_that_follow() -> None:
    """Two rows cost as much as twenty, and more than one guess brings."""
    pass_time = PassTime(1, 1)
    for rows, seconds in ((1, 1.0), (2, 2.2), (9, 2.2), (33, 2.3)) * 5:
        pass_time.observe(rows, seconds)
    pass_time.observe(1, 1.0)
    assert rate(pass_time, [0.9], 1, 0.0) < rate(pass_time, [], 0, 0.0)
    planner = rich(pass_time)
    assert planner.wants([], 0.9, 0.0)
    assert planner.num_probes == 0


def test_before_a_plain_pass_and_when_one_is_due_nothing_is_drafted() -> None:
    pass_time = PassTime(1, 1)
    planner = Planner(pass_time)
    assert not planner.wants([], 0.99, 0.0)
    assert planner.best_length([0.99] * 8, 0.0) == 0
    pass_time = line(1.0, 0.0)
    planner = rich(pass_time)
    while not pass_time.is_due:
        pass_time.observe(9, 1.0)
    assert planner.best_length([0.99] * 8, 0.0) == 0
    pass_time.observe(1, 1.0)
    planner.observe(0, 1, 1.0, 0.0)
    assert planner.best_length([0.99] * 8, 0.0) == 8


def test_what_another_drafter_did_in_between_begins_a_new_step() -> None:
    pass_time = line(1.0, 0.0)
    planner = rich(pass_time)
    while not pass_time.is_due:
        pass_time.observe(9, 1.0)
    assert planner.best_length([0.99] * 8, 0.0) == 0
    pass_time.observe(1, 1.0)  # nobody tells this planner
    assert planner.best_length([0.99] * 8, 0.0) == 8


def test_losses_take_the_right_to_draft_until_time_has_paid_them_off() -> None:
    """The models say that drafts win; they bring nothing and take twice as long."""
    pass_time = line(1.0, 0.0)
    planner, drafted, num_steps = Planner(pass_time), 0, 1000
    for _ in range(num_steps):
        length = planner.best_length([0.9] * 4, 0.0)
        drafted += length > 0
        seconds = 2.0 if length else 1.0
        pass_time.observe(1, 1.0)
        planner.observe(length, 1, seconds, 0.0)
    assert 0 < drafted <= EARNED * num_steps + 6
    assert planner.saved_s >= 2 * FLOOR


def test_luck_is_not_hoarded() -> None:
    planner = rich(line(1.0, 0.0))
    assert planner.saved_s == CEILING


def test_drafting_that_came_to_nothing_is_a_loss() -> None:
    planner = rich(line(1.0, 0.0))
    before = planner.saved_s
    planner.observe(0, 1, 1.0, 0.5)
    assert planner.saved_s == pytest.approx(before - 0.5, abs=0.03)


def test_probes_grow_rare_where_they_lose_and_come_back_where_they_win() -> None:
    """Rows are said to be as dear as passes: only a probe can find out that they are not."""
    dear, cheap = PassTime(1, 1), PassTime(1, 1)
    num_probes = []
    for pass_time, row_s in ((dear, 1.0), (cheap, 0.0)):
        pass_time.observe(1, 1.0)
        planner = Planner(pass_time)
        for _ in range(2000):
            length = planner.best_length([0.5] * 8, 0.0)
            seconds = 1.0 + row_s * length
            pass_time.observe(1 + length, seconds)
            planner.observe(length, 1 + length // 3, seconds, 0.0)
        num_probes.append(planner.num_probes)
    assert 2 <= num_probes[0] <= 20
    assert cheap.predict(9) < 1.2, "it found out"


COSTS = [  # row_s, expert_s, guess_s, optimism
    (0.0, 0.0, 0.0, 1.0),
    (0.009, 0.0, 0.0, 2.0),
    (0.001, 0.0, 0.004, 1.0),
    (0.003, 0.0, 0.0, 0.5),
    (0.03, 0.0, 0.0, 1.0),
    (0.0, 4e-5, 0.0, 2.0),
]
TEXTS = [(0.02,), (0.3,), (0.5,), (0.7,), (0.9,), (0.97,), (0.05, 0.9)]


def worlds(rtt_s: float) -> list[World]:
    """Every text, with costs that go round."""
    return [
        World(
            rtt_s=rtt_s,
            chances=chances,
            row_s=row_s,
            expert_s=expert_s,
            guess_s=guess_s,
            optimism=optimism,
            spell=60,
        )
        for number, chances in enumerate(TEXTS)
        for row_s, expert_s, guess_s, optimism in [
            COSTS[(number + round(rtt_s * 500)) % len(COSTS)]
        ]
    ]


@pytest.mark.parametrize("rtt_s", [0.0, 0.001, 0.005, 0.02, 0.045, 0.1])
def test_in_no_world_is_it_slower_than_without_by_more_than_three_per_cent(rtt_s: float) -> None:
    """500 tokens; chances good, bad and changing, rows cheap and dear, stalls, false optimism."""
    slow = {
        world: outcome.slower
        for number, world in enumerate(worlds(rtt_s))
        if (outcome := run_auto(world, 500, number)).slower > 1.03
    }
    assert not slow


UNLUCKY = [  # number of the draw, and a drafter that costs time and is hardly ever right
    (110, World(rtt_s=0.045, num_layers=6, row_s=0.01, chances=(0.02,), optimism=2.0, prompt=5)),
    (207, World(rtt_s=0.02, row_s=0.001, expert_s=4e-5, chances=(0.02,), spell=30, prompt=5)),
    (2, World(rtt_s=0.045, num_layers=6, row_s=0.001, chances=(0.02,), spell=30)),
    (227, World(rtt_s=0.02, row_s=0.003, chances=(0.02,), spell=30, prompt=512)),
    (292, World(rtt_s=0.1, num_layers=6, row_s=0.003, chances=(0.05, 0.9), prompt=5)),
]


@pytest.mark.parametrize(("number", "world"), UNLUCKY, ids=str)
def test_nor_is_a_first_short_answer_over_a_long_link(number: int, world: World) -> None:
    """64 tokens, beginning with no knowledge: nothing is won back within so few."""
    for optimism in (0.5, world.optimism):
        unlucky = replace(world, guess_s=0.05, noise=0.0, optimism=optimism)
        assert run_auto(unlucky, 64, number).slower <= 1.03


@pytest.mark.parametrize("seed", range(8))
def test_nor_in_worlds_drawn_at_random(seed: int) -> None:
    rng = random.Random(seed)
    for number in range(3):
        world = World(
            rtt_s=rng.choice((0.0, 0.001, 0.02, 0.1)),
            num_layers=rng.choice((1, 6, 30)),
            row_s=rng.choice((0.0, 0.003, 0.03)),
            expert_s=rng.choice((0.0, 1e-5, 4e-5)),
            num_experts=rng.choice((16, 128)),
            chances=tuple(rng.uniform(0, 1) for _ in range(rng.choice((1, 2)))),
            spell=rng.choice((30, 200)),
            optimism=rng.choice((0.5, 1.0, 3.0)),
            guess_s=rng.choice((0.0, 0.002, 0.01, 0.05)),
            noise=rng.choice((0.0, 0.05, 0.15)),
            prompt=rng.choice((0, 5, 100, 512)),
        )
        assert run_auto(world, 600, 100 * seed + number).slower <= 1.03, world


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("world", "regret"),
    [
        (World(rtt_s=0.045, chances=(0.8,), row_s=0.003), 1.10),
        (World(rtt_s=0.045, chances=(0.8,), row_s=0.03, guess_s=0.01), 1.10),
        (World(rtt_s=0.02, chances=(0.6,), expert_s=4e-5), 1.10),
        (World(rtt_s=0.02, chances=(0.05, 0.95), row_s=0.003, spell=60), 1.02),
    ],
    ids=["a shadow", "a draft model", "sparse", "lookup"],
)
def test_where_drafts_pay_it_is_close_to_the_best_fixed_length_in_hindsight(
    world: World, regret: float, seed: int
) -> None:
    def best() -> Outcome:
        lengths = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        return min((run_static(world, n, 800, seed) for n in lengths), key=lambda o: o.seconds)

    assert run_auto(world, 800, seed).slower <= regret * best().slower < 0.8
