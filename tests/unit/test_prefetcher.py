"""ReadAhead: what it asks of its store and when; and whole passes in a simulated world."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.experts.call import ExpertCall
from shoal.experts.prefetch.governor import Governor, State
from shoal.experts.prefetch.guesser import PREGATE_BINS, CallKind, Guesser, RoutedLayer
from shoal.experts.prefetch.interface import Mode
from shoal.experts.prefetch.prefetcher import ReadAhead
from shoal.quant import Scheme
from shoal.rows import Rows

I64 = NDArray[np.int64]
NUM_LAYERS, NUM_EXPERTS, CHOSEN = 4, 32, 4
EXPERT_BYTES = 1 << 20
READ_S, COMPUTE_S = 0.001, 0.004  # a read; what a layer takes beyond waiting: the disk is idle then


class Oracle:
    """A pre-gate that knows the next call, or draws lots."""

    def __init__(self) -> None:
        self.next = np.empty(0, np.int64)

    def features(self, rows: Rows) -> I64:
        bins = np.full((1, NUM_EXPERTS), 3, np.int64)
        bins[0, self.next] = PREGATE_BINS - 1
        return bins


@dataclass
class Budget:
    budget_bytes: int


class World:
    """A store and its disk in virtual time: one read at a time, demand first, an LRU cache."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_bytes = NUM_LAYERS * NUM_EXPERTS * EXPERT_BYTES
        self.now_s = 0.0
        self.cached: OrderedDict[tuple[int, int], bool] = OrderedDict()  # key -> was used
        self.queue: list[tuple[int, int]] = []
        self.reading: tuple[tuple[int, int], float] | None = None  # what, and when it ends
        self.log: list[str] = []
        self.demand_reads = 0
        self.issued = self.used = self.wasted = 0

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        self.log.append("absent")
        held = {*self.cached, *self.queue, *([self.reading[0]] if self.reading else [])}
        return [expert for expert in experts if (layer, expert) not in held]

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        self.log.append(f"prefetch {layer} {sorted(experts)}")
        self.queue += [(layer, expert) for expert in experts]
        self.issued += len(experts)
        return len(experts)

    def cancel_prefetch(self, layer: int | None = None) -> None:
        self.log.append(f"cancel {layer}")
        dropped = [key for key in self.queue if layer in (None, key[0])]
        self.queue = [key for key in self.queue if key not in dropped]
        self.wasted += len(dropped)

    def num_demand_reads(self) -> int:
        return self.demand_reads

    def prefetch_bytes(self) -> tuple[int, int, int]:
        return (self.issued * EXPERT_BYTES, self.used * EXPERT_BYTES, self.wasted * EXPERT_BYTES)

    def read_bandwidth(self) -> float:
        return EXPERT_BYTES / READ_S

    def figures(self) -> Budget:
        return Budget(self.num_slots * EXPERT_BYTES)

    def pass_time(self, seconds: float) -> None:
        """Let the disk work on what was prefetched."""
        end_s = self.now_s + seconds
        while self.reading or self.queue:
            if self.reading is None:
                self.reading = (self.queue.pop(0), self.now_s + READ_S)
            key, done_s = self.reading
            if done_s > end_s:
                break
            self.now_s, self.reading = done_s, None
            self.insert(key, was_used=False)
        self.now_s = end_s

    def insert(self, key: tuple[int, int], *, was_used: bool) -> None:
        self.cached[key] = was_used
        while len(self.cached) > self.num_slots:
            _, old_was_used = self.cached.popitem(last=False)
            self.wasted += not old_was_used

    def demand(self, layer: int, experts: Sequence[int]) -> float:
        """Make a call's experts present; return the stall."""
        began_s = self.now_s
        if self.reading is not None:  # a read at the device is not stopped
            self.pass_time(self.reading[1] - self.now_s)
        for expert in experts:
            key = (layer, expert)
            if key not in self.cached:
                self.queue = [queued for queued in self.queue if queued != key]
                self.now_s += READ_S
                self.insert(key, was_used=True)
            self.used += not self.cached[key]
            self.cached[key] = True
            self.cached.move_to_end(key)
        return self.now_s - began_s


def call_of(layer: int, experts: Sequence[int], num_rows: int = 1) -> ExpertCall:
    rows = ops.quantise_rows(Scheme.F32, np.ones((num_rows, 32), np.float32))
    offsets = np.arange(num_rows + 1, dtype=np.int32) * (len(experts) // num_rows)
    ids = np.array(experts, np.int32)
    return ExpertCall(layer, rows, offsets, ids, np.ones(ids.size, np.float32))


def open_(
    world: World, gate: Oracle, mode: Mode = Mode.AUTO, window_passes: int = 8
) -> tuple[ReadAhead, dict[CallKind, Governor]]:
    layers = [
        RoutedLayer(index, NUM_EXPERTS, CHOSEN, tuple(range(NUM_EXPERTS)))
        for index in range(NUM_LAYERS)
    ]
    gates = dict.fromkeys(range(NUM_LAYERS - 1), gate)
    guesser = Guesser(
        layers, gates, ("pregate",) if mode is Mode.PREGATE else ("pregate", "markov")
    )
    governor = Governor(window_passes * NUM_LAYERS, NUM_LAYERS)
    governors = {CallKind.ONE: governor} if mode is Mode.AUTO else {}
    sizes = dict.fromkeys(range(NUM_LAYERS), EXPERT_BYTES)
    return ReadAhead(mode, guesser, world, sizes, governors), governors


def run(
    world: World,
    prefetcher: ReadAhead | None,
    gate: Oracle,
    tokens: int,
    accuracy: float,
    seed: int,
) -> float:
    """Run passes; the gate knows each of the next experts with `accuracy`. Return their time."""
    rng = np.random.default_rng(seed)
    began_s = world.now_s

    def draw() -> list[int]:
        return sorted(int(e) for e in rng.choice(NUM_EXPERTS, CHOSEN, replace=False))

    following = draw()
    for step in range(tokens * NUM_LAYERS):
        layer, experts, following = step % NUM_LAYERS, following, draw()
        known = [expert for expert in following if rng.random() < accuracy]
        lots = rng.choice(NUM_EXPERTS, CHOSEN - len(known), replace=False)
        gate.next = np.unique(np.array([*known, *lots], np.int64))
        call = call_of(layer, experts)
        if prefetcher is not None:
            prefetcher.on_call(call, experts, world.now_s)
        stall_s = world.demand(layer, experts)
        if prefetcher is not None:
            prefetcher.on_loaded(layer, world.now_s)
        world.pass_time(COMPUTE_S)
        if prefetcher is not None:
            prefetcher.on_done(layer, stall_s, world.now_s)
        world.pass_time(COMPUTE_S / 4)
    return world.now_s - began_s


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


def test_a_hint_begins_reads_of_what_is_absent_and_gives_way_to_calls() -> None:
    world = World(16)
    prefetcher, _ = open_(world, Oracle(), Mode.PREGATE)
    world.cached[2, 6] = True
    prefetcher.on_hint(2, [9, 6, 5])
    assert world.log == ["absent", "prefetch 2 [5, 9]"] and world.queue == [(2, 9), (2, 5)]
    world.demand_reads = 1
    prefetcher.on_hint(3, [1])
    prefetcher.on_hint(NUM_LAYERS, [1])
    assert world.issued == 2, "a call waits for the disk; the model ends there"
    prefetcher.close()
    world.demand_reads = 0
    world.log.clear()
    prefetcher.on_hint(3, [1])
    assert world.log == []


def test_hints_are_followed_where_reading_ahead_for_several_rows_wins() -> None:
    class Judged(Governor):
        wins = False

        @property
        def may_issue(self) -> bool:
            return self.wins

    world = World(16)
    prefetcher, governors = open_(world, Oracle())
    governors[CallKind.MANY] = judged = Judged(2, 0)
    prefetcher.on_hint(2, [9])
    assert not world.queue
    judged.wins = True
    prefetcher.on_hint(2, [9])
    assert world.queue == [(2, 9)]
