"""Hit rates of eviction policies on recorded routing, beside Belady's optimum.

Replays every call of bench/traces through the cache that a node has (`shoal.experts.cache`): what a
call finds in memory is a hit. Sizes are a part of all experts; all experts are of one size.
"""

import argparse
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench.measure import ROOT, Row, save, show
from shoal.experts.cache import DEFAULT_POLICY, POLICIES, CachePolicy, ExpertCache, Key
from shoal.experts.cache.frequency import FadingLfu
from shoal.experts.routing_trace import RoutingTrace, decode_trace

TRACE = ROOT / "bench" / "traces" / "fables.trace"
SHARES = (10, 25, 50)  # percent of all experts
EXPERT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's experts for one pass of one stream."""

    kind: str
    layer: int
    experts: tuple[int, ...]


class Belady:
    """Evicts what is used again last, or never: it knows the future.

    Source: Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        uses: dict[Key, list[int]] = defaultdict(list)
        self._order = [[(call.layer, expert) for expert in call.experts] for call in calls]
        for position, keys in enumerate(self._order):
            for key in keys:
                uses[key].append(position)
        self._uses = {key: iter(positions) for key, positions in uses.items()}
        self._never = len(calls)
        self._next: dict[Key, int] = {}
        self._resident: set[Key] = set()
        self._position = -1

    def next_call(self) -> None:
        """The replay goes on: its experts' next use lies behind this call."""
        self._position += 1
        for key in self._order[self._position]:
            self._next[key] = next(
                (use for use in self._uses[key] if use > self._position), self._never
            )

    def touch(self, key: Key) -> None:
        """See CachePolicy."""

    def insert(self, key: Key, is_prefetch: bool) -> None:
        """See CachePolicy."""
        self._resident.add(key)

    def victim(self, newcomer: Key, may_evict: Callable[[Key], bool]) -> Key | None:
        """See CachePolicy."""
        return max(filter(may_evict, self._resident), key=self._next.__getitem__, default=None)

    def remove(self, key: Key) -> None:
        """See CachePolicy."""
        self._resident.remove(key)

    def resize(self, num_experts: int) -> None:
        """See CachePolicy."""


def one_by_one(trace: RoutingTrace) -> Iterator[Call]:
    """Yield the calls of one stream that decodes text after text."""
    for segment in trace.segments:
        for token in segment.experts.tolist():
            for layer, experts in zip(trace.moe_layers, token, strict=True):
                yield Call(segment.kind, layer, tuple(experts))


def in_turns(trace: RoutingTrace, num_streams: int) -> Iterator[Call]:
    """Yield the calls of streams that decode in turns, a text each, a token a turn."""
    waiting = list(reversed(trace.segments))
    streams: list[Iterator[tuple[str, list[list[int]]]]] = [iter(())] * num_streams
    is_over = False
    while not is_over:
        is_over = True
        for index in range(num_streams):
            token = next(streams[index], None)
            if token is None and waiting:
                segment = waiting.pop()
                streams[index] = iter([(segment.kind, rows) for rows in segment.experts.tolist()])
                token = next(streams[index], None)
            if token is not None:
                is_over = False
                kind, rows = token
                for layer, experts in zip(trace.moe_layers, rows, strict=True):
                    yield Call(kind, layer, tuple(experts))


def prompts(trace: RoutingTrace, num_tokens: int = 32) -> Iterator[Call]:
    """Yield the calls of texts whose first tokens are one pass (a prompt), the others one each."""
    for segment in trace.segments:
        prompt = segment.experts[:num_tokens]
        for column, layer in enumerate(trace.moe_layers):
            yield Call(segment.kind, layer, tuple(sorted(set(prompt[:, column].ravel().tolist()))))
        for token in segment.experts[num_tokens:].tolist():
            for layer, experts in zip(trace.moe_layers, token, strict=True):
                yield Call(segment.kind, layer, tuple(experts))


def replay(calls: Sequence[Call], sizes: dict[Key, int], share: int, policy: CachePolicy) -> Row:
    """Return the hit rate, and the time that the cache took for a call."""
    cache, budget = make_cache(sizes, share, policy)
    hits: dict[str, int] = defaultdict(int)
    wanted: dict[str, int] = defaultdict(int)
    began_s = time.perf_counter()
    for call in calls:
        if isinstance(policy, Belady):
            policy.next_call()
        found = compute(cache, call)
        hits[call.kind] += found
        wanted[call.kind] += len(call.experts)
    elapsed_s = time.perf_counter() - began_s
    return {
        "share": share,
        "places": budget // EXPERT_BYTES,
        "hit_rate": sum(hits.values()) / sum(wanted.values()),
        "by_kind": {kind: hits[kind] / count for kind, count in sorted(wanted.items())},
        "us_per_call": elapsed_s / len(calls) * 1e6,
    }


def replay_tiers(calls: Sequence[Call], sizes: dict[Key, int], share: int) -> Row:
    """Return the hit rate of half the memory as the store's cache, half as page cache behind it.

    The page cache is an LRU of what the store read, as the kernel's is of what was read buffered.
    A hit there still costs a copy, so it is not as good as one in the store.
    """
    cache, budget = make_cache(sizes, share / 2, POLICIES[DEFAULT_POLICY](1))
    pages: OrderedDict[Key, None] = OrderedDict()
    found = warm = wanted = 0
    for call in calls:
        wanted += len(call.experts)
        missed = [(call.layer, index) for index in cache.absent(call.layer, call.experts)]
        found += compute(cache, call)
        for key in missed:
            warm += key in pages
            pages[key] = None
            pages.move_to_end(key)
            if len(pages) > budget // EXPERT_BYTES:
                pages.popitem(last=False)
    rate = (found + warm) / wanted
    return {"share": share, "hit_rate": rate, "warm_rate": warm / wanted, "us_per_call": 0.0}


def make_cache(
    sizes: dict[Key, int], percent: float, policy: CachePolicy
) -> tuple[ExpertCache, int]:
    """Return a cache of that part of all experts, and its bytes."""
    cache = ExpertCache(sizes, policy)
    budget = max(2, int(len(sizes) * percent / 100)) * EXPERT_BYTES
    cache.extents.grow(budget)
    cache.set_budget(budget)
    return cache, budget


def compute(cache: ExpertCache, call: Call) -> int:
    """Do what a store does for a call, with reads that end at once; return its hits."""
    whole = cache.hold(call.layer, call.experts)
    if whole is not None:
        cache.release(whole)
        return len(whole)
    held, demand, _ = cache.want(call.layer, call.experts)
    found = [entry for _, entry in held]
    num_hits = len(found)
    while found or demand.waiting or demand.granted:
        cache.release(found)
        for entry in cache.next_loads():
            cache.loaded(entry)
        found = [entry for _, entry in cache.take(demand)]
    return num_hits


def policies(
    calls: Sequence[Call], half_lives: Sequence[float]
) -> dict[str, Callable[[int], CachePolicy]]:
    """Return name -> policy for a number of places: the store's own, variations, and Belady."""
    made = dict(POLICIES)
    for half_life in half_lives:
        made[f"fading-lfu {half_life:g}"] = partial(FadingLfu, half_life=half_life)
    made["belady"] = lambda _: Belady(calls)
    return made


def print_table(load: str, rows: Sequence[Row], trace: RoutingTrace) -> None:
    """Show one load: a line a policy, a column a size."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["load"] == load:
            line = table.setdefault(row["policy"], {"policy": row["policy"]})
            line[str(row["share"])] = f"{row['hit_rate'] * 100:.2f}"
            line["us"] = f"{row['us_per_call']:.0f}"
    show(
        f"Hit rate in percent, {load}: {trace.num_experts} experts in each of "
        f"{len(trace.moe_layers)} layers, {trace.top_k} a token",
        list(table.values()),
        {
            "policy": itemgetter("policy"),
            **{f"{share} %": itemgetter(str(share)) for share in SHARES},
            "us a call": itemgetter("us"),
        },
    )


def main() -> None:
    """Replay every policy at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--half-lives", default="", help="of fading-lfu, to choose one: 2,8,32")
    parser.add_argument("--policies", default="", help="only these")
    chosen = parser.parse_args()
    trace = decode_trace(chosen.trace.read_bytes(), str(chosen.trace))
    keys = [(layer, expert) for layer in trace.moe_layers for expert in range(trace.num_experts)]
    sizes = dict.fromkeys(keys, EXPERT_BYTES)
    half_lives = [float(text) for text in chosen.half_lives.split(",") if text]
    rows: list[Row] = []
    loads = {
        "one stream": list(one_by_one(trace)),
        "four streams": list(in_turns(trace, 4)),
        "prompts of 32": list(prompts(trace)),
    }
    for load, calls in loads.items():
        for name, make in policies(calls, half_lives).items():
            if chosen.policies and name not in chosen.policies.split(","):
                continue
            for share in SHARES:
                result = replay(calls, sizes, share, make(max(2, len(sizes) * share // 100)))
                rows.append({"load": load, "policy": name, **result})
        for share in SHARES:
            tiers = replay_tiers(calls, sizes, share)
            rows.append({"load": load, "policy": "half cache, half page cache", **tiers})
        print_table(load, rows, trace)
    if not chosen.policies and not half_lives:
        save(
            "cache",
            rows,
            trace=chosen.trace.name,
            identity=trace.identity,
            tokens=sum(len(segment.experts) for segment in trace.segments),
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            moe_layers=len(trace.moe_layers),
        )


if __name__ == "__main__":
    main()
