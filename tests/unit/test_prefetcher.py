"""ReadAhead: what it asks of its store and when; and whole passes in a simulated world."""

from collections.abc import Sequence

import numpy as np
import pytest

from shoal.experts.prefetch.governor import State
from shoal.experts.prefetch.guesser import CallKind
from shoal.experts.prefetch.interface import Mode
from support.prefetch_world import (
    EXPERT_BYTES,
    NUM_EXPERTS,
    NUM_LAYERS,
    Oracle,
    World,
    call_of,
    open_,
    run,
)


def test_a_guess_is_queued_behind_the_calls_own_reads_once() -> None:
    world, gate = World(64), Oracle()
    prefetcher, _ = open_(world, gate, Mode.PREGATE)
    run(world, prefetcher, gate, 200, 1.0, seed=1)
    gate.next = np.array([5, 6, 7, 9])
    absent = world.absent(1, [5, 6, 7, 9])
    world.log.clear()
    world.demand_reads = 4
    prefetcher.on_call(call_of(0, [1, 2, 3, 4]), [1, 2, 3, 4], world.now_s)
    assert world.log[-1] == f"prefetch 1 {absent}"
    prefetcher.on_loaded(0, world.now_s)
    assert len([entry for entry in world.log if "prefetch" in entry]) == 1, "once a call"


def test_nothing_is_begun_while_reads_of_other_calls_are_queued() -> None:
    world, gate = World(64), Oracle()
    prefetcher, _ = open_(world, gate, Mode.PREGATE)
    run(world, prefetcher, gate, 200, 1.0, seed=1)
    world.log.clear()
    gate.next = np.array([5, 6, 7, 9])
    world.cached.clear()
    world.demand_reads = 5
    prefetcher.on_call(call_of(0, [1, 2, 3, 4]), [1, 2, 3, 4], world.now_s)
    prefetcher.on_loaded(0, world.now_s)
    assert not any("prefetch" in entry for entry in world.log)


def test_what_the_real_call_does_not_need_is_cancelled() -> None:
    world, gate = World(64), Oracle()
    prefetcher, _ = open_(world, gate, Mode.PREGATE)
    run(world, prefetcher, gate, 200, 1.0, seed=1)
    for real, is_cancelled in (([5, 6, 7, 9], False), ([20, 21, 22, 23], True)):
        world.cached.clear()
        world.queue.clear()
        world.reading = None
        gate.next = np.array([5, 6, 7, 9])
        prefetcher.on_call(call_of(0, [1, 2, 3, 4]), [1, 2, 3, 4], world.now_s)
        prefetcher.on_loaded(0, world.now_s)
        world.log.clear()
        prefetcher.on_call(call_of(1, real), real, world.now_s)
        assert ("cancel 1" in world.log) is is_cancelled


@pytest.mark.parametrize("accuracy", [1.0, 0.8])
def test_where_the_next_layer_is_predictable_prefetching_wins(accuracy: float) -> None:
    alone, gate = World(40), Oracle()
    without_s = run(alone, None, gate, 500, accuracy, seed=3)
    world = World(40)
    prefetcher, governors = open_(world, gate)
    with_s = run(world, prefetcher, gate, 500, accuracy, seed=3)
    figures = prefetcher.figures()
    assert governors[CallKind.ONE].state is State.ON or figures.decode_state == "trial"
    assert with_s < 0.85 * without_s
    assert figures.stall_saved_s > 0
    assert figures.used_bytes > 0.6 * figures.issued_bytes
    assert figures.predictors["fused"].precision > 0.75
    assert figures.predictors["pregate"].recall > 0.5
    assert figures.issued_experts * EXPERT_BYTES == figures.issued_bytes


def test_where_guesses_are_worthless_the_default_costs_nothing() -> None:
    """Routing is random and the pre-gate draws lots: calibration alone keeps the disk quiet."""
    alone, gate = World(40), Oracle()
    without_s = run(alone, None, gate, 400, 0.0, seed=5)
    world = World(40)
    prefetcher, _ = open_(world, gate)
    with_s = run(world, prefetcher, gate, 400, 0.0, seed=5)
    assert with_s < 1.002 * without_s
    assert world.issued < 40


class Harmful(World):
    """Reads ahead spoil the drive: while one was begun in a call, each demand read takes longer."""

    def demand(self, layer: int, experts: Sequence[int]) -> float:
        began_s = self.now_s
        extra = 0.004 if any("prefetch" in entry for entry in self.log) else 0.0
        self.log.clear()
        super().demand(layer, experts)
        self.now_s += extra
        return self.now_s - began_s


def test_where_right_guesses_cost_more_than_they_save_it_goes_off() -> None:
    alone, gate = Harmful(40), Oracle()
    without_s = run(alone, None, gate, 500, 1.0, seed=6)
    world = Harmful(40)
    prefetcher, _ = open_(world, gate)
    with_s = run(world, prefetcher, gate, 500, 1.0, seed=6)
    assert prefetcher.figures().decode_state == "off"
    assert prefetcher.figures().stall_saved_s < 0
    assert with_s < 1.03 * without_s, "the price of finding out"
    forced_world = Harmful(40)
    forced, _ = open_(forced_world, gate, Mode.PREGATE)
    forced_s = run(forced_world, forced, gate, 500, 1.0, seed=6)
    assert forced.figures().decode_state == "forced"
    assert forced_s > 1.05 * without_s, "the world is harmful indeed"


def test_a_store_that_holds_everything_is_left_alone() -> None:
    world, gate = World(NUM_LAYERS * NUM_EXPERTS), Oracle()
    prefetcher, _ = open_(world, gate, Mode.PREGATE)
    run(world, prefetcher, gate, 50, 1.0, seed=1)
    assert world.issued == 0
    assert prefetcher.figures().predictors["fused"].wanted == 0, "and nothing is guessed"


def test_a_prompt_sweeps_the_next_layer() -> None:
    world, gate = World(60), Oracle()
    prefetcher, _ = open_(world, gate, Mode.PREGATE)
    everyone = list(range(NUM_EXPERTS))
    for step in range(40 * NUM_LAYERS):
        layer = step % NUM_LAYERS
        prefetcher.on_call(call_of(layer, everyone, NUM_EXPERTS), everyone, world.now_s)
        stall_s = world.demand(layer, everyone)
        prefetcher.on_loaded(layer, world.now_s)
        world.pass_time(0.010)
        prefetcher.on_done(layer, stall_s, world.now_s)
    asked = [entry for entry in world.log if entry.startswith("prefetch 2")]
    assert asked[-1] == f"prefetch 2 {everyone[:10]}", "as many reads as the gap has room for"
    assert world.used > 0.9 * world.issued > 0


def test_nobody_waits_inside_it() -> None:
    """Another call comes while one is inside: it goes by unobserved, it does not wait."""

    class Reentrant(World):
        def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
            prefetcher.on_call(call_of(0, [1]), [1], self.now_s, stream=9)
            prefetcher.on_loaded(0, self.now_s, stream=9)
            prefetcher.on_done(0, 0.0, self.now_s, stream=9)
            return super().absent(layer, experts)

    world, gate = Reentrant(64), Oracle()
    prefetcher, _ = open_(world, gate, Mode.PREGATE)
    run(world, prefetcher, gate, 60, 1.0, seed=1)
    assert world.issued > 0


def test_after_close_nothing_is_begun() -> None:
    world, gate = World(64), Oracle()
    prefetcher, _ = open_(world, gate, Mode.PREGATE)
    run(world, prefetcher, gate, 100, 1.0, seed=1)
    before = world.issued
    assert before > 0
    prefetcher.close()
    assert world.log[-1] == "cancel None"
    run(world, prefetcher, gate, 20, 1.0, seed=2)
    assert world.issued == before
