"""What the dispatch core keeps: fan-outs, calls, attempts, nodes and their streams (core).

Plain records; `coordinator.dispatch` alone changes them.
"""

from collections import deque
from collections.abc import Mapping

from coordinator.dispatch_events import Lane, NewCall
from coordinator.node_health import NodeHealth
from shoal.errors import ShoalError


class Fanout:
    """calls: those without an answer yet."""

    __slots__ = ("calls", "fanout_id", "is_over")

    def __init__(self, fanout_id: int) -> None:
        self.fanout_id = fanout_id
        self.calls: dict[int, Call] = {}
        self.is_over = False


class Call:
    """attempts: those whose reply would count, oldest first. failed: nodes that refused it.

    num_unexplained: nodes lost with it of which nobody knows yet whether they died.
    error: the last thing that went wrong.
    """

    __slots__ = (
        "attempts",
        "error",
        "failed",
        "fanout",
        "is_hedged",
        "new",
        "num_attempts",
        "num_deaths",
        "num_unexplained",
        "waits_since_s",
    )

    def __init__(self, new: NewCall, fanout: Fanout) -> None:
        self.new = new
        self.fanout = fanout
        self.attempts: list[Attempt] = []
        self.failed: set[int] = set()
        self.num_attempts = self.num_deaths = self.num_unexplained = 0
        self.is_hedged = False
        self.waits_since_s: float | None = None
        self.error: ShoalError | None = None

    @property
    def may_be_hedged(self) -> bool:
        """Whether a second attempt would be its first hedge, and there is a choice."""
        return len(self.attempts) == 1 < len(self.new.candidates) and not self.is_hedged

    def is_at(self, node: "Node") -> bool:
        """Whether that node has it."""
        return any(attempt.node is node for attempt in self.attempts)

    def is_hopeless(self, nodes: "Mapping[int, Node]") -> bool:
        """Whether the shard map names none of its candidates any more."""
        known = [nodes.get(node) for node in self.new.candidates]
        return all(node is None or node.is_retired for node in known)


class Attempt:
    """heard_s: when its node last spoke of it. is_late: another one was made in its place.

    wait_s: how long it will wait at its node behind what was sent there before.
    """

    __slots__ = (
        "attempt_id",
        "call",
        "has_missed",
        "heard_s",
        "is_late",
        "is_orphan",
        "is_sent",
        "node",
        "sent_s",
        "wait_s",
    )

    def __init__(self, attempt_id: int, call: Call, node: "Node", now_s: float) -> None:
        self.attempt_id = attempt_id
        self.call = call
        self.node = node
        self.sent_s = self.heard_s = now_s
        self.wait_s = 0.0
        self.is_sent = self.is_orphan = self.is_late = self.has_missed = False


class Stream:
    """One lane of an open node: what it has of our credit, and what waits for some.

    work: of the attempts that are sent, num_sent of them.
    """

    __slots__ = ("credit_bytes", "num_sent", "queue", "used_bytes", "work")

    def __init__(self, credit_bytes: int) -> None:
        self.credit_bytes = credit_bytes
        self.used_bytes = self.num_sent = 0
        self.work = 0.0
        self.queue: deque[Attempt] = deque()

    def has_credit(self, num_bytes: int) -> bool:
        # A lone call always goes: the node's own bound on messages judges it, not we.
        return self.used_bytes == 0 or self.used_bytes + num_bytes <= self.credit_bytes


class Node:
    """work: of the attempts that it has. victims: calls that it had when it was lost.

    error: why it takes no call. What was learned of its health outlives its connections.
    """

    __slots__ = (
        "error",
        "health",
        "heard_s",
        "is_leaving",
        "is_open",
        "is_retired",
        "node_id",
        "streams",
        "takes_calls",
        "victims",
        "work",
    )

    def __init__(self, node_id: int, rtt_s: float) -> None:
        self.node_id = node_id
        self.health = NodeHealth(rtt_s)
        self.streams: dict[Lane, Stream] = {}
        self.is_open = self.is_leaving = self.is_retired = self.takes_calls = False
        self.heard_s = 0.0
        self.work = 0.0
        self.victims: list[Call] = []
        self.error: ShoalError | None = None

    def open(self, credit_bytes: int, rtt_s: float, now_s: float) -> list[Call]:
        """Begin anew; return its victims, whom nobody mourns after this."""
        self.streams = {lane: Stream(credit_bytes) for lane in Lane}
        self.is_open, self.takes_calls, self.is_leaving = True, not self.is_retired, False
        self.error = None
        self.heard_s, self.work = now_s, 0.0
        self.health.is_suspect = False
        self.health.rtt_s = rtt_s
        victims, self.victims = self.victims, []
        return victims

    @property
    def num_bytes(self) -> int:
        """Of the calls that were sent there and have not ended."""
        return sum(stream.used_bytes for stream in self.streams.values())

    def work_ahead(self, lane: Lane) -> float:
        """Return what a call sent now on that lane waits for: bulk calls give way to others."""
        bulk = self.streams[Lane.BULK]
        if lane is Lane.BULK:
            return bulk.work + self.streams[Lane.INTERACTIVE].work
        running = bulk.work / bulk.num_sent if bulk.num_sent else 0.0
        return self.streams[Lane.INTERACTIVE].work + running

    def leave(self, error: ShoalError) -> list[Attempt]:
        """Take no new call; return the attempts that were queued, which it has no more."""
        self.is_leaving, self.takes_calls, self.error = True, False, error
        queued = [attempt for stream in self.streams.values() for attempt in stream.queue]
        for stream in self.streams.values():
            stream.queue.clear()
        for attempt in queued:
            attempt.call.attempts.remove(attempt)
            self.work -= attempt.call.new.work
        return queued

    def close(self, error: ShoalError) -> None:
        """Its streams are gone."""
        self.streams = {}
        self.is_open = self.takes_calls = False
        self.work = 0.0
        self.error = error


def check_integrity(
    calls: Mapping[int, Call],
    attempts: Mapping[int, Attempt],
    fanouts: Mapping[int, Fanout],
    nodes: Mapping[int, Node],
    waiting: Mapping[int, Call],
) -> None:
    """Assert what holds between events."""
    for attempt_id, attempt in attempts.items():
        assert attempt.attempt_id == attempt_id and attempt.node.is_open
        stream = attempt.node.streams[attempt.call.new.lane]
        assert attempt.is_sent != (attempt in stream.queue), f"{attempt_id}: sent and queued"
        if attempt.is_orphan:
            assert attempt.is_sent and attempt not in attempt.call.attempts
        else:
            assert calls[attempt.call.new.call_id] is attempt.call
            assert attempt in attempt.call.attempts
    for call_id, call in calls.items():
        assert call.fanout.calls[call_id] is call and not call.fanout.is_over
        assert bool(call.attempts) != (call_id in waiting), f"call {call_id} is forgotten"
        assert all(attempts[attempt.attempt_id] is attempt for attempt in call.attempts)
        where = [attempt.node for attempt in call.attempts]
        assert len(where) == len(set(where)), f"call {call_id} is at one node twice"
    assert waiting.keys() <= calls.keys()
    for fanout_id, fanout in fanouts.items():
        assert fanout.fanout_id == fanout_id and not fanout.is_over
        assert fanout.calls and fanout.calls.keys() <= calls.keys()
    for node in nodes.values():
        assert node.takes_calls == (node.is_open and not node.is_leaving and not node.is_retired)
        mine = [attempt for attempt in attempts.values() if attempt.node is node]
        work = sum(attempt.call.new.work for attempt in mine)
        assert abs(node.work - work) < 1e-6 * (1 + work), f"node {node.node_id}: work leaks"
        for lane, stream in node.streams.items():
            sent = [a.call.new for a in mine if a.is_sent and a.call.new.lane == lane]
            used_bytes = sum(new.num_bytes for new in sent)
            assert stream.num_sent == len(sent)
            assert abs(stream.work - sum(new.work for new in sent)) < 1e-6 * (1 + stream.work)
            assert stream.used_bytes == used_bytes, f"node {node.node_id}: credit leaks"
            assert used_bytes <= stream.credit_bytes or len(sent) == 1
            if stream.queue:
                head = stream.queue[0].call.new
                assert not stream.has_credit(head.num_bytes), f"node {node.node_id} sleeps"
