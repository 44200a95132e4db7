"""Nodes that do not always run, around the dispatch core: a busy machine's, and throttled ones.

Calls of one row go out one after the other, as decode makes them, to replicas of which each is
preferred in turn. A node computes when it may run: not while it is *stalled* (something else has
its CPU, now and then, for a while) and only in part of each period when it is throttled. One seed
decides everything; no clock.
"""

import heapq
import random

from coordinator.dispatch import Dispatcher
from coordinator.dispatch_events import (
    Cancel,
    Command,
    Failed,
    FanoutStarted,
    Finish,
    Lane,
    NewCall,
    NodeOpened,
    Progressed,
    Replied,
    Send,
    Ticked,
)
from shoal.errors import CallCancelled

HOP_S, TICK_S, PAUSE_S = 0.0001, 0.005, 0.0004
TINY_S = 1e-7


class BusyNode:
    """When one node computes what. stalls_per_s, stall_s: how often, and how long on average.

    duty: it runs only so long of each period: (seconds, period).
    """

    def __init__(self, chance: random.Random, stalls_per_s: float, stall_s: float) -> None:
        self._random, self._rate, self._stall_s = chance, stalls_per_s, stall_s
        self._stalled_until_s = 0.0
        self._next_stall_s = self._random.expovariate(stalls_per_s) if stalls_per_s else 1e9
        self.free_s = 0.0
        self.slowness = 1.0
        self.duty: tuple[float, float] | None = None
        self.num_calls = 0

    def runs_at(self, now_s: float) -> float:
        """Return the first time from now on at which it runs."""
        while True:
            while self._next_stall_s <= now_s:
                end_s = self._next_stall_s + self._random.expovariate(1 / self._stall_s)
                self._stalled_until_s = max(self._stalled_until_s, end_s)
                self._next_stall_s = end_s + self._random.expovariate(self._rate)
            if self._stalled_until_s > now_s:
                now_s = self._stalled_until_s
            elif self.duty is not None and now_s % self.duty[1] >= self.duty[0] - TINY_S:
                now_s += self.duty[1] - now_s % self.duty[1] + TINY_S
            else:
                return now_s

    def compute(self, now_s: float, work_s: float) -> tuple[float, float]:
        """Return when it starts and ends that much work which came just now."""
        at_s = start_s = self.runs_at(max(now_s, self.free_s))
        left_s = work_s * self.slowness
        while left_s > TINY_S:
            step_s = min(left_s, max(TINY_S, self._next_stall_s - at_s))
            if self.duty is not None:
                step_s = min(step_s, max(TINY_S, self.duty[0] - at_s % self.duty[1]))
            left_s -= step_s
            at_s = self.runs_at(at_s + step_s)
        self.free_s = at_s
        return start_s, at_s


class BusyWorld:
    """A dispatcher and its replicas. work_s: of one call."""

    def __init__(
        self,
        seed: int,
        *,
        num_nodes: int = 2,
        work_s: float = 0.0006,
        stalls_per_s: float = 0.0,
        stall_s: float = 0.005,
    ) -> None:
        self._random = random.Random(seed)
        self.core = Dispatcher(10.0, 30.0)
        self.nodes = [BusyNode(self._random, stalls_per_s, stall_s) for _ in range(num_nodes)]
        self._work_s = work_s
        self._now_s = 0.0
        self._coming: list[tuple[float, int, int, Replied]] = []
        self._cancelled: set[int] = set()
        self._num_calls = self._num_unfinished = self.num_hedges = 0
        for number in range(num_nodes):
            self.core.on(NodeOpened(number, 10**6, 2 * HOP_S, False, 0.0))

    def is_demoted(self, node: int) -> bool:
        """Whether others are preferred to it now."""
        health = self.core.health(node)
        assert health is not None
        return self._now_s < health.demoted_until_s

    def rests(self, node: int) -> bool:
        """Whether it is asked last for a while, for one long stall."""
        health = self.core.health(node)
        assert health is not None
        return self._now_s < health.rests_until_s

    def call(self, at_once: int = 1) -> None:
        """Make so many calls at the same time, each a fan-out of its own; wait for their ends."""
        count = len(self.nodes)
        self._num_unfinished = at_once
        for _ in range(at_once):
            self._num_calls += 1
            candidates = tuple((self._num_calls + i) % count for i in range(count))
            new = NewCall(self._num_calls, candidates, Lane.INTERACTIVE, 100, 1.0)
            self._do(self.core.on(FanoutStarted(new.call_id, (new,), self._now_s)))
        tick_s = self._now_s + TICK_S
        while self._num_unfinished:
            if self._coming and self._coming[0][0] <= tick_s:
                self._take_next()
            else:
                self._now_s, tick_s = tick_s, tick_s + TICK_S
                self._tick()
        self._now_s += PAUSE_S

    def _take_next(self) -> None:
        due_s, attempt_id, node, reply = heapq.heappop(self._coming)
        self._now_s = reply.now_s = max(self._now_s, due_s)
        if attempt_id in self._cancelled:
            self._do(self.core.on(Failed(attempt_id, node, CallCancelled(), False, self._now_s)))
        else:
            self._do(self.core.on(reply))

    def _tick(self) -> None:
        for number, node in enumerate(self.nodes):
            held = tuple(attempt for _, attempt, at, _ in self._coming if at == number)
            if held and node.runs_at(self._now_s) == self._now_s:
                self.core.on(Progressed(number, held, self._now_s))
        self._do(self.core.on(Ticked(self._now_s)))

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(attempt_id, call_id, number):
                    self.num_hedges += attempt_id != call_id
                    self._send(attempt_id, number)
                case Cancel(attempt_id):
                    self._cancelled.add(attempt_id)
                case Finish():
                    self._num_unfinished -= 1
                case _:
                    pass

    def _send(self, attempt_id: int, number: int) -> None:
        node = self.nodes[number]
        node.num_calls += 1
        got_s = node.runs_at(self._now_s + HOP_S)
        start_s, end_s = node.compute(got_s, self._work_s * self._random.uniform(0.8, 1.3))
        reply = Replied(attempt_id, number, 0.0, end_s - got_s, 0.0, start_s - got_s)
        heapq.heappush(self._coming, (end_s + HOP_S, attempt_id, number, reply))
