"""Fan-outs that need no looking after while they go well (core).

Almost every fan-out of a decode step does: each call is answered by the node that it was sent to,
soon. The shell runs such fan-outs on its own, one at a time, and tells of several at once
afterwards, which costs a fraction of what calls and attempts do. It asks first (`followers`), and
may go on until it has anything else to tell, or somebody else asks for anything; and each of its
fan-outs only for as long as it was told: then, or when anything but replies comes, that fan-out is
*adopted* and looked after like any other.

    followers --> all answered in time --> RanAhead, late
             `--> anything else ---------> RanAhead for what was answered, Adopted for the rest
"""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.calls_and_nodes import Attempt, Call, Fanout, Node
from coordinator.dispatch_attempts import Attempts
from coordinator.dispatch_events import Answered, Lane, NewCall, RanAhead
from coordinator.node_health import MIN_HEDGE_S, SILENT_S, SLOW_RESIDUAL
from coordinator.replica_choice import choose, judge_slow

_NO_FANOUT = Fanout(0)
MAX_UNTOLD = 16  # fan-outs: what is known of nodes is never older than that many


@dataclass(slots=True)
class Follower:
    """Where a slot's calls go that run ahead, and how long nobody looks after one of them.

    slow_s, slow_s_per_work: a call of its work takes longer than that if it is among the slow ones.
    is_alone: there is no other node to ask.
    """

    node: int
    is_alone: bool
    slow_s: float = 0.0
    slow_s_per_work: float = 0.0

    def patience_s(self, work: float) -> float:
        """Return for how long a call is left alone, from when it is sent."""
        if self.is_alone:
            return SILENT_S  # silence is never judged sooner
        return min(SILENT_S, max(MIN_HEDGE_S, self.slow_s + self.slow_s_per_work * work))


class RunsAhead(Attempts):
    """The part of the dispatch core that says what may run ahead, and learns of it."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, Call] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing can become late."""
        return not (self._attempts or self._waiting)

    def followers(
        self, slots: Sequence[tuple[int, ...] | None], work: float, now_s: float
    ) -> list[Follower | None] | None:
        """Say where the calls of each slot go that may be run without the core.

        Changes nothing. None for a slot: its calls may not. None for all: something is in flight.

        Args:
            slots: the candidates of each, see NewCall; None: not for nodes.
            work: of a call, about.
        """
        if not self.is_idle:
            return None  # else every node is idle, too
        return [None if nodes is None else self._follower(nodes, work, now_s) for nodes in slots]

    def _follower(self, candidates: tuple[int, ...], work: float, now_s: float) -> Follower | None:
        """Return a node of known speed in good standing, or without another to choose."""
        if len(candidates) == 1:
            node = self._nodes.get(candidates[0])
            if node is None or not node.takes_calls or node.health.is_suspect:
                return None
            return Follower(node.node_id, True) if node.health.model.is_known else None
        new = NewCall(0, candidates, Lane.INTERACTIVE, 0, work)
        node = choose(Call(new, _NO_FANOUT), self._nodes, now_s)
        if node is None or not node.health.model.is_known or node.health.rank(now_s):
            return None
        return Follower(node.node_id, False, *node.health.slow_line())

    def _on_ran_ahead(self, event: RanAhead) -> None:
        for answer in event.answered:
            reply = answer.reply
            node = self._nodes.get(reply.node)
            if node is None or not node.is_open:
                continue  # lost after it had answered
            node.heard_s, node.health.is_suspect = reply.now_s, False
            self._learn(answer, node)

    def _learn(self, answer: Answered, node: Node) -> None:
        new, reply, sent_s = answer.call, answer.reply, answer.sent_s
        latency_s = reply.now_s - sent_s
        residual = node.health.replied(new.work, latency_s, reply)
        if residual > SLOW_RESIDUAL:
            attempt = Attempt(new.call_id, Call(new, _NO_FANOUT), node, sent_s)
            judge_slow(attempt, residual, self._nodes, reply.now_s)
