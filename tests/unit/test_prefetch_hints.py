"""Hints of a coordinator: followed where that wins, as far as the drive gets, dropped if wrong."""

from collections.abc import Sequence

import numpy as np
import pytest

from shoal.experts.prefetch.governor import Governor, State
from shoal.experts.prefetch.guesser import CallKind
from shoal.experts.prefetch.hints import FIRST_GAP_S, Hints
from shoal.experts.prefetch.interface import Mode
from shoal.experts.prefetch.prefetcher import ReadAhead
from shoal.limits import MAX_PREFETCH_STREAMS
from support.prefetch_world import (
    COMPUTE_S,
    NUM_EXPERTS,
    NUM_LAYERS,
    READ_S,
    Oracle,
    World,
    call_of,
    open_,
)

ROWS, WANTED = 3, 9  # of a pass that verifies guesses, and its experts a layer
DRAFT_S = 0.03
WINDOW, GUARD = 4 * NUM_LAYERS, NUM_LAYERS


def open_auto(world: World) -> tuple[ReadAhead, Governor, Governor]:
    """A governed prefetcher, the governor of its guesses, and that of hints."""
    hints = Governor(WINDOW, GUARD, 1)
    prefetcher, governors = open_(world, Oracle(), hint_governor=hints)
    return prefetcher, governors[CallKind.FEW], hints


def verify(
    world: World, prefetcher: ReadAhead | None, passes: int, accuracy: float, seed: int
) -> float:
    """Draft, hinting at what the pass will need, and run the pass; return the time of all."""
    rng = np.random.default_rng(seed)
    began_s = world.now_s
    for _ in range(passes):
        routing = [sorted(rng.choice(NUM_EXPERTS, WANTED, replace=False)) for _ in range(4)]
        for layer, experts in enumerate(routing):
            hinted = [
                int(e) if rng.random() < accuracy else int(rng.integers(NUM_EXPERTS))
                for e in experts
            ]
            if prefetcher is not None:
                prefetcher.on_hint(layer, list(dict.fromkeys(hinted)), world.now_s)
            world.pass_time(DRAFT_S / NUM_LAYERS)
        for layer, chosen in enumerate(routing):
            call(world, prefetcher, layer, [int(expert) for expert in chosen])
    return world.now_s - began_s


def call(
    world: World, prefetcher: ReadAhead | None, layer: int, experts: Sequence[int], stream: int = 0
) -> None:
    """Run one call of several rows from its arrival to its answer."""
    made = call_of(layer, experts, ROWS)
    if prefetcher is not None:
        prefetcher.on_call(made, experts, world.now_s, stream)
    stall_s = world.demand(layer, experts)
    if prefetcher is not None:
        prefetcher.on_loaded(layer, world.now_s, stream)
    world.pass_time(COMPUTE_S)
    if prefetcher is not None:
        prefetcher.on_done(layer, stall_s, world.now_s, stream)


def test_hints_that_are_right_are_followed_by_default_and_win() -> None:
    alone, world = World(40), World(40)
    without_s = verify(alone, None, 150, 1.0, seed=2)
    prefetcher, _, hints = open_auto(world)
    with_s = verify(world, prefetcher, 150, 1.0, seed=2)
    figures = prefetcher.figures()
    assert hints.state is State.ON and figures.hint_state == "on"
    assert with_s < 0.9 * without_s
    assert figures.hinted_experts > 1000 and world.used > 0.9 * world.issued


def test_hints_that_are_wrong_cost_next_to_nothing() -> None:
    alone, world = World(40), World(40)
    without_s = verify(alone, None, 300, 0.0, seed=3)
    prefetcher, _, _ = open_auto(world)
    with_s = verify(world, prefetcher, 300, 0.0, seed=3)
    assert with_s < 1.01 * without_s
    assert world.issued < 60, "how often hints are right is learned while nothing is read"


class Harmful(World):
    """Reads ahead make the demand after them slower than they can ever spare."""

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        self.extra_s += 0.015
        return super().prefetch(layer, experts)

    extra_s = 0.0

    def demand(self, layer: int, experts: Sequence[int]) -> float:
        self.now_s += self.extra_s
        extra_s, self.extra_s = self.extra_s, 0.0
        return extra_s + super().demand(layer, experts)


def test_hints_whose_reads_cost_more_than_they_spare_are_left_alone() -> None:
    alone, world = Harmful(40), Harmful(40)
    without_s = verify(alone, None, 600, 1.0, seed=4)
    prefetcher, _, hints = open_auto(world)
    with_s = verify(world, prefetcher, 600, 1.0, seed=4)
    assert hints.state is State.OFF and prefetcher.figures().hint_state == "off"
    assert with_s < 1.02 * without_s, "the price of finding out"
    forced_world = Harmful(40)
    forced, _ = open_(forced_world, Oracle(), Mode.MARKOV)
    assert verify(forced_world, forced, 600, 1.0, seed=4) > 1.05 * without_s, "harmful indeed"


def test_a_lost_trial_of_guesses_does_not_stop_hints() -> None:
    world = World(40)
    prefetcher, guesses, hints = open_auto(world)
    while guesses.state is not State.OFF:
        guesses.on_done(1.0 + guesses.may_issue, 1)
    verify(world, prefetcher, 60, 1.0, seed=5)
    assert guesses.state is State.OFF and hints.state is State.ON
    assert prefetcher.figures().hinted_experts == world.issued > 0


def test_one_thing_is_tried_at_a_time() -> None:
    """While guesses are on trial, hints on trial are not followed and nothing is learned of them;
    hints that have won are followed in both kinds of window.
    """
    for has_won in (False, True):
        world = World(40)
        prefetcher, guesses, hints = open_auto(world)
        goal = State.ON if has_won else State.TRIAL
        while hints.state is not goal or not hints.may_issue:
            hints.on_done(1.0 - 0.5 * hints.may_issue, 1)
        while guesses.state is not State.TRIAL:
            guesses.on_done(1.0, 1)
        before = vars(hints)["_window"]
        world.log.clear()
        prefetcher.on_hint(2, [1, 2, 3], world.now_s)
        call(world, prefetcher, 2, [1, 2, 3])
        assert ("prefetch 2 [1, 2, 3]" in world.log) is has_won
        assert vars(hints)["_window"] == before


def test_what_a_call_does_not_need_of_a_hint_is_cancelled() -> None:
    for real, is_cancelled in (([5, 6, 7], False), ([5, 6, 20], True)):
        world = World(40)
        prefetcher, _ = open_(world, Oracle(), Mode.MARKOV)
        prefetcher.on_hint(2, [5, 6, 7], world.now_s)
        assert world.log[-1] == "prefetch 2 [5, 6, 7]"
        prefetcher.on_call(call_of(1, [5, 6, 7], ROWS), [5, 6, 7], world.now_s)
        assert "cancel 2" not in world.log, "another layer's call says nothing about it"
        prefetcher.on_call(call_of(2, real, ROWS), real, world.now_s)
        assert ("cancel 2" in world.log) is is_cancelled


def test_a_hint_speaks_of_its_own_streams_next_call() -> None:
    world = World(40)
    prefetcher, _ = open_(world, Oracle(), Mode.MARKOV)
    prefetcher.on_hint(2, [5, 6, 7], world.now_s, stream=1)
    call(world, prefetcher, 2, [8, 9, 10], stream=2)
    assert "cancel 2" not in world.log
    prefetcher.on_call(call_of(2, [8, 9, 10], ROWS), [8, 9, 10], world.now_s, stream=1)
    assert "cancel 2" in world.log


def test_reads_of_hints_are_as_many_as_the_drive_gets_through_until_the_call() -> None:
    world = World(100)
    prefetcher, _ = open_(world, Oracle(), Mode.MARKOV)
    everyone = list(range(NUM_EXPERTS))
    gap_s = 6 * READ_S
    for _ in range(60):  # hints are right, and their calls come six reads later
        world.cached.clear()
        world.queue.clear()
        for layer in (1, 2):
            prefetcher.on_hint(layer, everyone, world.now_s)
        world.now_s += gap_s
        for layer in (1, 2):
            call(world, prefetcher, layer, everyone)
    world.cached.clear()
    world.queue.clear()
    world.reading = None
    world.now_s += 1.0
    prefetcher.on_hint(1, everyone[:4], world.now_s)
    prefetcher.on_hint(1, everyone[4:], world.now_s)
    assert 6 <= len(world.queue) <= 7, "two hints, one room"
    world.now_s += 20 * READ_S
    num_before = len(world.queue)
    prefetcher.on_hint(1, everyone[20:], world.now_s)
    assert len(world.queue) == num_before, "its call is overdue: there is no room any more"


def test_a_hint_begins_reads_of_what_is_absent_and_gives_way_to_calls() -> None:
    world = World(16)
    prefetcher, _ = open_(world, Oracle(), Mode.PREGATE)
    world.cached[2, 6] = True
    prefetcher.on_hint(2, [9, 6, 5], world.now_s)
    assert world.log == ["absent", "prefetch 2 [5, 9]"] and world.queue == [(2, 9), (2, 5)]
    world.demand_reads = 1
    prefetcher.on_hint(3, [1], world.now_s)
    prefetcher.on_hint(NUM_LAYERS, [1], world.now_s)
    assert world.issued == 2, "a call waits for the disk; the model ends there"
    prefetcher.close()
    world.demand_reads = 0
    world.log.clear()
    prefetcher.on_hint(3, [1], world.now_s)
    assert world.log == []


class TestHints:
    def test_a_call_that_nothing_was_said_of_settles_nothing(self) -> None:
        hints = Hints()
        assert hints.settle(0, 1, [1, 2], 0.0) is None
        hints.hear(0, 1, [1], 0.0)
        assert hints.settle(0, 2, [1], 0.0) is None
        assert hints.settle(0, 1, [1], 0.0) == frozenset()
        assert hints.settle(0, 1, [1], 0.0) is None, "once"

    def test_how_often_hints_are_right_decides_what_they_are_worth(self) -> None:
        hints = Hints()
        for _ in range(60):
            hints.hear(0, 1, [1, 2, 3, 4], 0.0)
            hints.settle(0, 1, [1, 9, 10], 1.0)
        assert hints.precision == pytest.approx(0.25, abs=0.01)
        hints.hear(0, 1, [1, 2], 0.0)
        assert hints.admitted(0, 1, [1, 2], READ_S, 0.0) == []

    def test_before_a_layers_first_call_a_draft_is_given_its_usual_time(self) -> None:
        hints = Hints()
        hints.hear(0, 1, range(64), 5.0)
        num = len(hints.admitted(0, 1, range(64), READ_S, 5.0))
        assert num == pytest.approx(FIRST_GAP_S / READ_S, abs=1)

    def test_streams_that_never_call_are_forgotten(self) -> None:
        hints = Hints()
        for stream in range(MAX_PREFETCH_STREAMS + 5):
            hints.hear(stream, 1, [1], 0.0)
        assert hints.settle(0, 1, [1], 0.0) is None
        assert hints.settle(MAX_PREFETCH_STREAMS + 4, 1, [1], 0.0) is not None
