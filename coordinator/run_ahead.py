"""Fan-outs that need no looking after while they go well (core).

Almost every fan-out of a decode step does: each call is answered by the node that it was sent to,
soon. The shell runs such a one on its own, in two native calls, and tells of it afterwards, which
costs a fraction of what calls and attempts do. It asks first (`run_ahead`), and may go on only
until the time it is told: then, or when anything else comes, the fan-out is *adopted* and looked
after like any other.

    run_ahead --> all answered in time --> RanAhead
             `--> anything else ---------> RanAhead for what was answered, Adopted for the rest
"""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.calls_and_nodes import Attempt, Call, Fanout, Node
from coordinator.dispatch_attempts import Attempts
from coordinator.dispatch_events import Answered, NewCall, RanAhead
from coordinator.node_health import SILENT_S, SLOW_RESIDUAL
from coordinator.replica_choice import choose, judge_slow

_NO_FANOUT = Fanout(0)


@dataclass(slots=True)
class Lead:
    """nodes: where each call goes, each to another. until_s: until then nobody looks after them."""

    nodes: list[int]
    until_s: float


class RunsAhead(Attempts):
    """The part of the dispatch core that says what may run ahead, and learns of it."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, Call] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing can become late."""
        return not (self._attempts or self._waiting)

    def run_ahead(self, calls: Sequence[NewCall], now_s: float) -> Lead | None:
        """Say where the calls of a fan-out go that may be run without the core.

        Only while nothing else is in flight, and only to nodes of known speed in good standing, or
        without another to choose: so nothing is to be decided before the time it says. Changes
        nothing.
        """
        if self._attempts or self._waiting:
            return None  # so every node is idle, too
        lead = Lead([], now_s + SILENT_S)  # silence is never judged sooner
        for new in calls:
            node = self._follower(new, lead, now_s)
            if node is None or node.node_id in lead.nodes:
                return None  # of two calls to one node one waits for the other
            lead.nodes.append(node.node_id)
        return lead

    def _follower(self, new: NewCall, lead: Lead, now_s: float) -> Node | None:
        """Return the node of a call, if nothing speaks against it; a choice shortens the lead."""
        if len(new.candidates) == 1:
            node = self._nodes.get(new.candidates[0])
            if node is None or not node.takes_calls or node.health.is_suspect:
                return None
            return node if node.health.model.is_known else None
        node = choose(Call(new, _NO_FANOUT), self._nodes, now_s)
        if node is None or not node.health.model.is_known or node.health.rank(now_s):
            return None
        lead.until_s = min(lead.until_s, now_s + node.health.hedge_after_s(new.work))
        return node

    def _on_ran_ahead(self, event: RanAhead) -> None:
        for answer in event.answered:
            reply = answer.reply
            node = self._nodes.get(reply.node)
            if node is None or not node.is_open:
                continue  # lost after it had answered
            node.heard_s, node.health.is_suspect = reply.now_s, False
            self._learn(answer, node, event.sent_s)

    def _learn(self, answer: Answered, node: Node, sent_s: float) -> None:
        new, reply = answer.call, answer.reply
        latency_s = reply.now_s - sent_s
        residual = node.health.replied(new.work, latency_s, reply)
        if residual > SLOW_RESIDUAL:
            attempt = Attempt(new.call_id, Call(new, _NO_FANOUT), node, sent_s)
            judge_slow(attempt, residual, self._nodes, reply.now_s)
