"""The dispatch core in simulated worlds: whatever nodes and network do, every call ends once.

tests/support/dispatch_simulator.py says what a world checks. Cores that are broken on purpose show
that it would notice.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from coordinator import dispatch, dispatch_attempts
from coordinator.attempt_watch import Verdict, judge
from coordinator.calls_and_nodes import Attempt, Call, Fanout, Node, Stream
from coordinator.dispatch import Dispatcher
from coordinator.dispatch_events import Command
from coordinator.replica_choice import choose
from support.dispatch_simulator import CALL_TIMEOUT_S, SHARD_WAIT_S, play

CHUNK = 100


@pytest.mark.parametrize("first", range(0, 1000, CHUNK))
def test_every_call_ends_once_in_a_thousand_worlds(first: int) -> None:
    """Every other world is gentle: one fault at a time, all ranges replicated. There none fails."""
    for seed in range(first, first + CHUNK):
        play(seed, gentle=seed % 2 == 1)


def test_a_seed_replays_the_same_world() -> None:
    worlds = [play(7) for _ in range(2)]
    assert worlds[0].ended == worlds[1].ended and worlds[0].attempts == worlds[1].attempts
    assert worlds[0].num_events == worlds[1].num_events != play(8).num_events


def test_the_worlds_are_not_idle() -> None:
    """Faults happen, calls are sent again, some fan-outs fail and most do not."""
    worlds = [play(seed) for seed in range(40)]
    ended = [how for world in worlds for how in world.ended.values()]
    assert sum(how.startswith("failed") for how in ended) > 5
    assert sum(how == "finished" for how in ended) > 0.6 * len(ended)
    assert sum(len(world.attempts) > len(world.calls) for world in worlds) > 10


class LeaksCredit(Dispatcher):
    def _settle(self, attempt_id: int, node_id: int, now_s: float) -> Attempt | None:
        attempt = super()._settle(attempt_id, node_id, now_s)
        if attempt is not None:
            attempt.node.streams[attempt.call.new.lane].used_bytes += 1
        return attempt


class BelievesAnybody(Dispatcher):
    def _settle(self, attempt_id: int, node_id: int, now_s: float) -> Attempt | None:
        attempt = self._attempts.get(attempt_id)
        return super()._settle(attempt_id, attempt.node.node_id if attempt else node_id, now_s)


class IgnoresCredit(Dispatcher):
    def _send_queued(self, stream: Stream, out: list[Command]) -> None:
        stream.credit_bytes = 10**9
        super()._send_queued(stream, out)


class TakesTwoAnswers(Dispatcher):
    def _take_back(self, call: Call, out: list[Command]) -> list[Stream]:
        attempts = [attempt for attempt in call.attempts if attempt.is_sent]
        unblocked = super()._take_back(call, out)
        for attempt in attempts:
            attempt.is_orphan = False
        return unblocked


class ForgetsTheLost(Dispatcher):
    def _help(self, call: Call, now_s: float, out: list[Command]) -> None:
        return


class WaitsForEver(Dispatcher):
    def _wait_no_longer(self, call: Call, now_s: float, out: list[Command]) -> None:
        return


class NeverCancels(Dispatcher):
    def _take_back(self, call: Call, out: list[Command]) -> list[Stream]:
        call.attempts.clear()
        return []


class SendsIdsTwice(Dispatcher):
    def _attempt(self, call: Call, node: Node, now_s: float, out: list[Command]) -> None:
        call.num_attempts, before = 0, call.num_attempts
        super()._attempt(call, node, now_s, out)
        call.num_attempts = before + 1


class EndsTwice(Dispatcher):
    def _end(self, fanout: Fanout, out: list[Command]) -> None:
        kept = dict(self._waiting)
        super()._end(fanout, out)
        self._waiting.update(kept)


class CountsNoDeaths(Dispatcher):
    def _bury(self, call: Call, out: list[Command]) -> bool:
        return False


class SendsToAnybody(Dispatcher):
    def _place(self, call: Call, now_s: float, out: list[Command]) -> bool:
        for node in self._nodes.values():
            if node.takes_calls and not call.is_at(node):
                self._waiting.pop(call.new.call_id, None)
                self._attempt(call, node, now_s, out)
                return True
        return super()._place(call, now_s, out)


class AsksAll(Dispatcher):
    """Floods the replicas when one has failed."""

    def _help(self, call: Call, now_s: float, out: list[Command]) -> None:
        super()._help(call, now_s, out)
        while call.attempts and (node := choose(call, self._nodes, now_s)) is not None:
            self._attempt(call, node, now_s, out)


class HedgesForNothing(Dispatcher):
    def _hedge(self, attempt: Attempt, now_s: float, out: list[Command]) -> None:
        self._hedge_tokens = 1.0
        super()._hedge(attempt, now_s, out)


MUTANTS = [
    AsksAll,
    LeaksCredit,
    BelievesAnybody,
    IgnoresCredit,
    TakesTwoAnswers,
    ForgetsTheLost,
    WaitsForEver,
    NeverCancels,
    SendsIdsTwice,
    EndsTwice,
    CountsNoDeaths,
    SendsToAnybody,
]


def is_caught(core: Callable[[float, float], Dispatcher], num_seeds: int = 150) -> bool:
    """Whether a world notices, by an assertion of its own or of the core."""
    for seed in range(num_seeds):
        try:
            play(seed, lambda: core(CALL_TIMEOUT_S, SHARD_WAIT_S), gentle=seed % 2 == 1)
        except (AssertionError, KeyError, ValueError):
            return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_core_is_caught(mutant: type[Dispatcher]) -> None:
    assert is_caught(mutant)


def test_hedges_beyond_their_tokens_are_noticed_whatever_the_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bucket is small, or a world would be over before it is empty."""
    monkeypatch.setattr(dispatch, "HEDGE_BURST", 2.0)
    assert is_caught(HedgesForNothing, 300)
    for seed in range(100):
        play(seed)


def blind_to(*verdicts: Verdict) -> Callable[..., Verdict]:
    def judge_less(attempt: Attempt, now_s: float, call_timeout_s: float) -> Verdict:
        verdict = judge(attempt, now_s, call_timeout_s)
        return Verdict.FINE if verdict in verdicts else verdict

    return judge_less


def choose_the_lost(call: Call, nodes: dict[int, Node], _now_s: float) -> Node | None:
    known = [nodes[node] for node in call.new.candidates if node in nodes]
    return next((node for node in known if not call.is_at(node)), None)


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (dispatch, "judge", blind_to(Verdict.DEAD, Verdict.SILENT)),
        (dispatch, "judge", blind_to(Verdict.DEAD, Verdict.TIMED_OUT)),
        (dispatch, "choose", choose_the_lost),
        (dispatch_attempts, "FIRST_RETRY_ID", 2),
    ],
)
def test_a_broken_part_is_caught(
    module: ModuleType, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken)
    assert is_caught(Dispatcher)
