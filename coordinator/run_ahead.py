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

from coordinator.calls_and_nodes import Attempt, Call, Fanout, Node, Stream
from coordinator.dispatch_attempts import Attempts
from coordinator.dispatch_events import Answered, NewCall, RanAhead
from coordinator.node_health import SILENT_S, SLOW_RESIDUAL
from coordinator.replica_choice import choose, judge_slow

_NO_FANOUT = Fanout(0)


@dataclass(slots=True)
class Lead:
    """nodes: where each call goes. waits_s: how long each will wait there behind the others.

    until_s: how long nobody needs to look after them.
    """

    nodes: list[int]
    waits_s: list[float]
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
            return None
        lead = Lead([], [], now_s + SILENT_S)
        given: list[tuple[Node, float, Stream]] = []
        for new in calls:
            node = choose(Call(new, _NO_FANOUT), self._nodes, now_s)
            if node is None or not node.health.model.is_known:
                break
            stream = node.streams[new.lane]
            if not stream.has_credit(new.num_bytes):
                break  # several calls to one node: what a lone one may, these may not
            health, work, is_choice = node.health, new.work, len(new.candidates) > 1
            if health.is_suspect or (is_choice and health.rank(now_s)):
                break
            wait_s = health.wait_s(node.work) if node.work > 0.0 else 0.0
            patience_s = health.silent_after_s(work)
            if is_choice:
                patience_s = min(patience_s, health.hedge_after_s(work))
            lead.until_s = min(lead.until_s, now_s + patience_s + wait_s)
            lead.nodes.append(node.node_id)
            lead.waits_s.append(wait_s)
            given.append((node, node.work, stream))
            node.work += work  # the next call of this fan-out goes behind it, or elsewhere
            stream.used_bytes += new.num_bytes
        for (node, work, stream), new in zip(
            reversed(given), reversed(calls[: len(given)]), strict=True
        ):
            node.work = work
            stream.used_bytes -= new.num_bytes
        return lead if len(given) == len(calls) else None

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
        residual = node.health.replied(new.work, latency_s, reply, answer.wait_s)
        if residual > SLOW_RESIDUAL:
            attempt = Attempt(new.call_id, Call(new, _NO_FANOUT), node, sent_s)
            judge_slow(attempt, residual, self._nodes, reply.now_s)
