"""A simulated store and disk for prefetchers: virtual time, one read at a time, an LRU cache."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.experts.call import ExpertCall
from shoal.experts.prefetch.governor import Governor
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
    world: World,
    gate: Oracle,
    mode: Mode = Mode.AUTO,
    window_passes: int = 8,
    hint_governor: Governor | None = None,
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
    governors = {CallKind.ONE: governor, CallKind.FEW: governor} if mode is Mode.AUTO else {}
    sizes = dict.fromkeys(range(NUM_LAYERS), EXPERT_BYTES)
    return ReadAhead(mode, guesser, world, sizes, governors, hint_governor), governors


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
