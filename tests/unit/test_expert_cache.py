"""The cache core, one event after another, and in seeded worlds of many calls and readers."""

import random
from collections.abc import Mapping

import pytest

from shoal.errors import UsageError
from shoal.experts.cache import POLICIES, ExpertCache, Key
from shoal.experts.cache.entries import Demand, Entry

PAGE = 4096


def make_cache(sizes: Mapping[Key, int], budget: int, policy: str = "lru") -> ExpertCache:
    cache = ExpertCache(sizes, POLICIES[policy](8))
    cache.check_budget(budget)
    cache.extents.grow(budget)
    cache.set_budget(budget)
    return cache


def equal_sizes(num_layers: int, num_experts: int) -> dict[Key, int]:
    return {(layer, i): PAGE for layer in range(num_layers) for i in range(num_experts)}


def load(cache: ExpertCache, layer: int, *experts: int) -> None:
    """Bring experts into memory as a call would, and let go of them."""
    for index in experts:
        held, demand, _ = cache.want(layer, [index])
        for entry in cache.next_loads():
            cache.loaded(entry)
        cache.release([entry for _, entry in (*held, *cache.take(demand))])
        cache.check_integrity()


def test_one_read_serves_everybody_who_waits() -> None:
    cache = make_cache(equal_sizes(1, 8), 4 * PAGE)
    demands = [cache.want(0, [3])[1] for _ in range(8)]
    [entry] = cache.next_loads()
    assert cache.next_loads() == []
    assert cache.loaded(entry) == demands
    assert [cache.take(demand) for demand in demands] == [[(0, entry)]] * 8
    assert entry.refs == 8
    assert (cache.counters.misses, cache.counters.joined) == (8, 0)
    cache.release([entry] * 8)
    cache.check_integrity()


def test_what_is_read_for_nobody_becomes_a_demand_when_a_call_comes_for_it() -> None:
    cache = make_cache(equal_sizes(1, 8), 8 * PAGE)
    background = Demand()
    entry = cache.warm((0, 3), background, is_demand=False)
    assert entry is not None and (cache.num_pending, cache.loading_bytes) == (0, 0)
    _, demand, promoted = cache.want(0, [3])
    assert promoted == [entry] and cache.next_loads() == []
    assert (cache.num_pending, cache.loading_bytes) == (1, PAGE)
    assert cache.want(0, [3])[2] == [], "once is enough"
    assert cache.loaded(entry)[:2] == [background, demand]
    assert (cache.num_pending, cache.loading_bytes) == (0, 0)
    assert (cache.counters.misses, cache.counters.joined) == (2, 2)
    assert cache.counters.prefetch_issued == cache.counters.prefetch_used == 0
    cache.check_integrity()


def test_what_is_in_memory_is_held_at_once_and_the_rest_is_read() -> None:
    cache = make_cache(equal_sizes(1, 8), 4 * PAGE)
    load(cache, 0, 1, 2)
    held, demand, _ = cache.want(0, [5, 2, 1])
    assert [(position, entry.key) for position, entry in held] == [(1, (0, 2)), (2, (0, 1))]
    [entry] = cache.next_loads()
    cache.loaded(entry)
    assert cache.take(demand) == [(0, entry)]
    assert cache.hold(0, [1, 2, 5]) is not None
    assert cache.hold(0, [1, 2, 6]) is None
    assert cache.counters.hits == 2 + 3


def test_what_a_call_holds_is_never_evicted() -> None:
    cache = make_cache(equal_sizes(1, 8), 2 * PAGE)
    load(cache, 0, 0, 1)
    held = cache.hold(0, [0, 1])
    assert held is not None
    _, demand, _ = cache.want(0, [2])
    assert cache.next_loads() == []
    assert cache.lacks_room
    cache.release([held[0]])
    [entry] = cache.next_loads()
    assert not cache.lacks_room
    assert cache.is_resident(0, [1]) and not cache.is_resident(0, [0])
    assert cache.loaded(entry) == [demand]


def test_a_pinned_expert_stays() -> None:
    cache = make_cache(equal_sizes(1, 8), 4 * PAGE)
    assert cache.pin([(0, 0), (0, 1)]) == 2
    load(cache, 0, *range(8))
    assert cache.is_resident(0, [0, 1])
    assert cache.pinned_bytes == 2 * PAGE


def test_pins_leave_room_for_two_experts() -> None:
    cache = make_cache(equal_sizes(1, 8), 4 * PAGE)
    assert cache.pin([(0, index) for index in range(8)]) == 2
    load(cache, 0, *range(8))
    assert cache.is_resident(0, [0, 1])
    cache.check_integrity()


def test_pins_between_experts_of_other_sizes_leave_room_for_two_of_the_largest() -> None:
    # 1. small ones are pinned; 2. they arrive between others, so that the gaps are too short;
    # 3. some lose their pin, and the largest can still be read.
    sizes = {(0, i): PAGE for i in range(10)} | {(1, i): 4 * PAGE for i in range(4)}
    cache = make_cache(sizes, 12 * PAGE)
    cache.pin([(0, 1), (0, 4), (0, 7)])
    load(cache, 0, *range(10))
    load(cache, 1, *range(4))
    assert cache.num_pinned < 3


def test_a_budget_below_two_experts_is_refused_with_the_least_that_serves() -> None:
    sizes = {(0, 0): 2 * PAGE, (0, 1): PAGE, (0, 2): PAGE}
    with pytest.raises(UsageError, match=r"16\.00 KiB"):
        make_cache(sizes, 3 * PAGE)
    make_cache({(0, 0): 2 * PAGE}, 2 * PAGE)  # all there is


def test_an_error_reaches_everybody_who_waits_and_is_not_remembered() -> None:
    cache = make_cache(equal_sizes(1, 4), 2 * PAGE)
    demands = [cache.want(0, [1])[1] for _ in range(2)]
    [entry] = cache.next_loads()
    error = OSError("bad sector")
    assert cache.failed(entry, error) == demands
    assert [demand.error for demand in demands] == [error, error]
    cache.check_integrity()
    load(cache, 0, 1)
    assert cache.is_resident(0, [1])


def test_a_call_that_gives_up_leaves_its_reads_to_others() -> None:
    cache = make_cache(equal_sizes(1, 4), 2 * PAGE)
    _, first, _ = cache.want(0, [0, 1, 2])
    _, second, _ = cache.want(0, [2])
    started = cache.next_loads()
    assert [entry.key for entry in started] == [(0, 0), (0, 2)]
    cache.withdraw(first)
    cache.check_integrity()
    for entry in started:
        cache.loaded(entry)
    assert [entry.key for _, entry in cache.take(second)] == [(0, 2)]
    assert cache.next_loads() == [], "nobody wants expert 1 any more"
    assert cache.is_resident(0, [0])


def test_calls_take_turns_so_that_a_short_one_is_not_behind_a_long_one() -> None:
    cache = make_cache(equal_sizes(1, 16), 4 * PAGE)
    cache.want(0, range(10))
    cache.want(0, [12, 13])
    assert [entry.key[1] for entry in cache.next_loads()] == [0, 12, 1, 13]


def test_a_prefetch_is_used_when_a_call_comes_for_it_and_wasted_when_none_does() -> None:
    cache = make_cache(equal_sizes(1, 64), 32 * PAGE)
    used, joined, wasted = cache.prefetch(0, [7, 8, 9])
    for entry in (used, wasted):
        assert cache.loaded(entry) == []
    held = cache.hold(0, [7])
    assert held is not None
    cache.release(held)
    _, demand, promoted = cache.want(0, [8])
    assert promoted == [joined]
    assert cache.loaded(joined) == [demand]
    cache.release([entry for _, entry in cache.take(demand)])
    load(cache, 0, *range(16, 64))
    assert not cache.is_resident(0, [9])
    counters = cache.counters
    assert (counters.prefetch_issued, counters.prefetch_used) == (3, 2)
    assert (counters.prefetch_wasted, counters.prefetch_wasted_bytes) == (1, PAGE)


def test_a_prefetch_takes_nothing_that_a_demand_needs() -> None:
    cache = make_cache(equal_sizes(1, 64), 8 * PAGE)
    load(cache, 0, *range(8))
    held = cache.hold(0, range(8))
    assert held is not None
    assert cache.prefetch(0, [20]) == [], "all is held"
    cache.want(0, [30])
    cache.next_loads()
    cache.release(held)
    assert cache.prefetch(0, [20]) == [], "a demand waits for room"


def test_unused_prefetches_fill_a_quarter_and_make_room_for_each_other() -> None:
    cache = make_cache(equal_sizes(1, 64), 16 * PAGE)
    first = cache.prefetch(0, range(10))
    assert [entry.key[1] for entry in first] == [0, 1, 2, 3]
    for entry in first:
        cache.loaded(entry)
    assert [entry.key[1] for entry in cache.prefetch(0, [20])] == [20]
    assert not cache.is_resident(0, [0])


def test_a_demand_that_comes_for_a_prefetch_given_up_is_read_anyway() -> None:
    cache = make_cache(equal_sizes(1, 8), 8 * PAGE)
    [entry] = cache.prefetch(0, [1])
    assert cache.unwanted_prefetches() == [entry]
    _, demand, _ = cache.want(0, [1])
    assert cache.unwanted_prefetches() == []
    cache.retry(entry)  # its cancellation was under way already
    cache.check_integrity()
    assert cache.next_loads() == [entry]
    assert cache.loaded(entry) == [demand]


def test_a_smaller_budget_takes_effect_as_calls_let_go() -> None:
    cache = make_cache(equal_sizes(1, 8), 8 * PAGE)
    load(cache, 0, *range(8))
    held = cache.hold(0, [6, 7])
    assert held is not None
    cache.set_budget(3 * PAGE)
    cache.check_integrity()
    assert [i for i in range(8) if cache.is_resident(0, [i])] == [0, 1, 2]
    assert not cache.extents.is_closed_part_free()
    cache.release(held)
    assert cache.extents.is_closed_part_free()
    load(cache, 0, 6)
    cache.set_budget(8 * PAGE)
    load(cache, 0, 3, 4, 5)
    assert cache.num_ready == 6


def test_other_owned_experts_keep_what_stays_owned() -> None:
    cache = make_cache(equal_sizes(1, 8), 8 * PAGE)
    load(cache, 0, 0, 1, 2)
    held = cache.hold(0, [1])
    assert held is not None
    cache.own({(0, index): PAGE for index in range(2, 12)})
    cache.check_integrity()
    assert cache.is_resident(0, [2]) and not cache.is_resident(0, [1])
    assert held[0].address >= 0 and cache.resident_bytes == 2 * PAGE
    cache.release(held)
    assert cache.resident_bytes == PAGE
    load(cache, 0, 11)


def test_experts_too_large_for_the_pieces_of_a_grown_cache_are_refused() -> None:
    cache = make_cache({(0, index): PAGE for index in range(8)}, 2 * PAGE)
    cache.extents.grow(3 * PAGE)
    cache.set_budget(5 * PAGE)
    larger = {(1, index): 2 * PAGE for index in range(8)}
    cache.check_budget(5 * PAGE, larger)
    with pytest.raises(UsageError, match="pieces too short"):
        cache.check_budget(5 * PAGE, {key: 5 * PAGE // 2 for key in larger})


class World:
    """Many calls, a reader that ends reads in any order, and a budget that moves."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        num_layers, self.num_experts = rng.randint(1, 4), rng.randint(3, 12)
        many_sizes = rng.random() < 0.5
        self.sizes = {
            (layer, i): PAGE * (1 + many_sizes * (layer % 3))
            for layer in range(num_layers)
            for i in range(self.num_experts)
        }
        self.least = 2 * max(self.sizes.values())
        total = sum(self.sizes.values())
        budget = min(total, self.least + PAGE * rng.choice((0, 0, 3, 20)))
        self.cache = make_cache(self.sizes, max(budget, self.least), rng.choice(list(POLICIES)))
        self.reading: list[Entry] = []
        self.calls: list[Call] = []
        self.num_finished = self.num_failed = 0

    def start_reads(self) -> None:
        self.reading += self.cache.next_loads()

    def step(self) -> None:
        match self.rng.randrange(12):
            case 0 | 1 | 2 if len(self.calls) < 8:
                self.calls.append(Call(self))
            case 3 | 4 | 5 | 6 if self.reading:
                self.end_read(self.rng.randrange(len(self.reading)))
            case 7 if self.rng.random() < 0.3 and self.calls:
                call = self.rng.choice(self.calls)
                call.close()
            case 8:
                layer = self.rng.choice(list(self.sizes))[0]
                guesses = self.rng.sample(range(self.num_experts), 2)
                self.reading += self.cache.prefetch(layer, guesses)
            case 9 if self.rng.random() < 0.2:
                capacity = self.cache.extents.capacity
                if capacity < sum(self.sizes.values()) and self.rng.random() < 0.3:
                    self.cache.extents.grow(self.rng.randint(1, 5) * PAGE)
                    capacity = self.cache.extents.capacity
                first = self.cache.extents.segments[0][1]
                if first >= self.least:
                    self.cache.set_budget(self.rng.randrange(self.least, capacity + PAGE, PAGE))
                self.start_reads()
            case 10 if self.rng.random() < 0.1:
                self.cache.pin(self.rng.sample(list(self.sizes), 3))
            case 11 if self.rng.random() < 0.1:  # calls that were let in before may still come
                kept = self.rng.sample(list(self.sizes), self.rng.randint(2, len(self.sizes)))
                self.cache.own({key: self.sizes[key] for key in kept})
                self.start_reads()
            case _ if self.calls:
                self.rng.choice(self.calls).go_on()
        self.check()

    def end_read(self, index: int) -> None:
        entry = self.reading.pop(index)
        if self.rng.random() < 0.1:
            self.cache.failed(entry, OSError("bad sector"))
        elif self.rng.random() < 0.1 and entry.waiters:
            self.cache.retry(entry)
        else:
            self.cache.loaded(entry)
        self.start_reads()

    def check(self) -> None:
        self.cache.check_integrity()
        keys = [entry.key for entry in self.reading if not entry.is_doomed]
        assert len(keys) == len(set(keys)), "an expert is read twice at a time"
        held = [entry for call in self.calls for entry in call.held]
        assert all(entry.is_ready and entry.refs > 0 for entry in held)
        places: dict[int, Entry] = {}
        for entry in (*held, *self.reading):
            for page in range(entry.address, entry.address + entry.num_bytes, PAGE):
                assert places.setdefault(page, entry) is entry, "a held expert was overwritten"

    def finish(self) -> None:
        """Nothing new comes: every call ends within a bounded number of steps."""
        for _ in range(10_000):
            if not self.calls:
                break
            if self.reading and self.rng.random() < 0.5:
                self.end_read(self.rng.randrange(len(self.reading)))
            else:
                self.rng.choice(self.calls).go_on()
            self.check()
        assert not self.calls, "calls wait for ever"


class Call:
    """Takes its experts wave by wave, as an acquisition does."""

    def __init__(self, world: World) -> None:
        self.world = world
        layer = world.rng.choice(list(world.sizes))[0]
        experts = world.rng.sample(
            range(world.num_experts), world.rng.randint(1, world.num_experts)
        )
        self.missing = len(experts)
        self.held: list[Entry] = []
        self.demand: Demand | None = None
        whole = world.cache.hold(layer, experts)
        if whole is not None:
            self.held = whole
            self.missing = 0
            return
        held, self.demand, _ = world.cache.want(layer, experts)
        self.held = [entry for _, entry in held]
        self.missing -= len(held)
        world.start_reads()

    def go_on(self) -> None:
        """Let go of the wave, take the next one if it is there; end after the last."""
        self.world.cache.release(self.held)
        self.held = []
        if self.demand is not None and self.demand.error is not None:
            self.world.num_failed += 1
            self.close()
        elif self.missing == 0:
            self.world.num_finished += 1
            self.close()
        else:
            assert self.demand is not None
            self.held = [entry for _, entry in self.world.cache.take(self.demand)]
            self.missing -= len(self.held)
            self.world.start_reads()

    def close(self) -> None:
        self.world.cache.release(self.held)
        if self.demand is not None:
            self.world.cache.withdraw(self.demand)
        self.world.calls.remove(self)
        self.world.start_reads()


@pytest.mark.parametrize("seed", range(60))
def test_every_call_ends_and_no_rule_is_broken_in_a_random_world(seed: int) -> None:
    world = World(seed)
    for _ in range(400):
        world.step()
    world.finish()
    assert world.num_finished > 3, "the world is degenerate"


@pytest.mark.parametrize("policy", POLICIES)
def test_eight_calls_with_a_cache_of_two_experts_all_end(policy: str) -> None:
    rng = random.Random(1)
    cache = make_cache(equal_sizes(2, 8), 2 * PAGE, policy)
    demands: list[Demand] = []
    missing: dict[Demand, int] = {}
    for number in range(8):
        held, demand, _ = cache.want(number % 2, rng.sample(range(8), 8))
        assert not held
        demands.append(demand)
        missing[demand] = 8
    reading = cache.next_loads()
    steps = 0
    while demands:
        steps += 1
        assert steps < 2000, "no call goes on"
        if reading and rng.random() < 0.7:
            cache.loaded(reading.pop(rng.randrange(len(reading))))
        demand = rng.choice(demands)
        wave = cache.take(demand)
        cache.release([entry for _, entry in wave])
        missing[demand] -= len(wave)
        if not missing[demand]:
            demands.remove(demand)
        reading += cache.next_loads()
        cache.check_integrity()
