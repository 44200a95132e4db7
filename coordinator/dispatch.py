"""Which expert calls are in flight, and how each fan-out ends (core).

A state machine without I/O, clock or randomness: feed it events, do the commands it returns.
Rule: everything that decides about a call in flight lives here; the shell only does as it is told.

A *fan-out* is one layer's calls to its owners; it ends in exactly one `Finish` or `Fail`, or is
abandoned by its caller. A *call* holds its stream's credit from `Send` to the node's terminal
frame, whatever became of its fan-out:

                 credit             reply
    QUEUED ------------------> SENT --------> (gone)  the last one of a fan-out: Finish
       |  fan-out over           | fan-out over: Cancel
       v                         v     any terminal frame
    (gone)                    ORPHANED ----------------> (gone)

Events about a call that is gone are late or duplicate news from the network: they change nothing.
A node that is lost or draining takes no new call: a fan-out that needs it fails at once.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

from shoal.errors import ShoalError


class Lane(IntEnum):
    """The connection that a call travels on; values as in shoal.v1.Lane."""

    INTERACTIVE = 1
    BULK = 2


@dataclass(frozen=True, slots=True)
class NewCall:
    """A call to make. `num_bytes`: of its request, what it costs of the stream's credit."""

    call_id: int
    node: int
    lane: Lane
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LaneOpened:
    node: int
    lane: Lane
    credit_bytes: int


@dataclass(frozen=True, slots=True)
class FanoutStarted:
    fanout_id: int
    calls: tuple[NewCall, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class FanoutAbandoned:
    fanout_id: int


@dataclass(frozen=True, slots=True)
class Replied:
    call_id: int
    node: int


@dataclass(frozen=True, slots=True)
class Failed:
    call_id: int
    node: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class NodeLost:
    node: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class NodeDraining:
    node: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class Ticked:
    now_s: float


Event = (
    LaneOpened
    | FanoutStarted
    | FanoutAbandoned
    | Replied
    | Failed
    | NodeLost
    | NodeDraining
    | Ticked
)


@dataclass(frozen=True, slots=True)
class Send:
    call_id: int
    node: int
    lane: Lane


@dataclass(frozen=True, slots=True)
class Cancel:
    call_id: int
    node: int
    lane: Lane


@dataclass(frozen=True, slots=True)
class Accept:
    """The reply just reported counts: keep its sums."""

    call_id: int


@dataclass(frozen=True, slots=True)
class Finish:
    fanout_id: int


@dataclass(frozen=True, slots=True)
class Fail:
    fanout_id: int
    node: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class TimeOut:
    """Fail for want of an answer from this node before the fan-out's deadline."""

    fanout_id: int
    node: int


Command = Send | Cancel | Accept | Finish | Fail | TimeOut


@dataclass(slots=True)
class _Call:
    new: NewCall
    fanout_id: int
    is_sent: bool = False
    is_orphan: bool = False


@dataclass(slots=True)
class _Fanout:
    waits_for: set[int]
    deadline_s: float


@dataclass(slots=True)
class _Stream:
    credit_bytes: int
    used_bytes: int = 0
    queue: deque[int] = field(default_factory=deque)

    def has_credit(self, num_bytes: int) -> bool:
        # A lone call always goes: the node's own bound on messages judges it, not we.
        return self.used_bytes == 0 or self.used_bytes + num_bytes <= self.credit_bytes


class Dispatcher:
    """Owns every expert call in flight. `on` is the only way to change it."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}
        self._fanouts: dict[int, _Fanout] = {}
        self._streams: dict[tuple[int, Lane], _Stream] = {}
        self._closed: dict[int, ShoalError] = {}  # nodes that take no new call, and why

    @property
    def num_fanouts(self) -> int:
        return len(self._fanouts)

    def on(self, event: Event) -> list[Command]:
        """Take one event; return the commands to carry out, in order."""
        match event:
            case Replied(call_id, node):
                return self._on_replied(call_id, node)
            case FanoutStarted():
                return self._on_started(event)
            case Ticked(now_s):
                return self._on_ticked(now_s)
            case Failed(call_id, node, error):
                return self._on_failed(call_id, node, error)
            case FanoutAbandoned(fanout_id):
                return self._end(fanout_id) if fanout_id in self._fanouts else []
            case NodeLost(node, error):
                return self._on_lost(node, error)
            case NodeDraining(node, error):
                self._closed.setdefault(node, error)
                return []
            case LaneOpened(node, lane, credit_bytes):
                assert (node, lane) not in self._streams, f"node {node} opened {lane} twice"
                self._streams[node, lane] = _Stream(credit_bytes)
                return []

    def _on_started(self, event: FanoutStarted) -> list[Command]:
        assert event.fanout_id not in self._fanouts, f"fan-out {event.fanout_id} started twice"
        assert event.calls, f"fan-out {event.fanout_id} calls nobody"
        for call in event.calls:
            assert call.call_id not in self._calls, f"call {call.call_id} made twice"
            if call.node in self._closed:
                return [Fail(event.fanout_id, call.node, self._closed[call.node])]
        ids = {call.call_id for call in event.calls}
        assert len(ids) == len(event.calls), f"fan-out {event.fanout_id} repeats a call"
        self._fanouts[event.fanout_id] = _Fanout(ids, event.deadline_s)
        commands: list[Command] = []
        for call in event.calls:
            self._calls[call.call_id] = _Call(call, event.fanout_id)
            self._streams[call.node, call.lane].queue.append(call.call_id)
            commands += self._send_queued(call.node, call.lane)
        return commands

    def _on_replied(self, call_id: int, node: int) -> list[Command]:
        call = self._settle(call_id, node)
        if call is None:
            return []
        released = self._send_queued(node, call.new.lane)
        if call.is_orphan:
            return released
        fanout = self._fanouts[call.fanout_id]
        fanout.waits_for.remove(call_id)
        if fanout.waits_for:
            return [Accept(call_id), *released]
        del self._fanouts[call.fanout_id]
        return [Accept(call_id), Finish(call.fanout_id), *released]

    def _on_failed(self, call_id: int, node: int, error: ShoalError) -> list[Command]:
        call = self._settle(call_id, node)
        if call is None:
            return []
        if call.is_orphan:
            return self._send_queued(node, call.new.lane)
        return [
            Fail(call.fanout_id, node, error),
            *self._end(call.fanout_id),
            *self._send_queued(node, call.new.lane),
        ]

    def _on_lost(self, node: int, error: ShoalError) -> list[Command]:
        if not any((node, lane) in self._streams for lane in Lane):
            return []  # told again, by its other lane
        self._closed[node] = error
        victims: dict[int, None] = {}  # an ordered set of fan-outs
        for call_id, call in list(self._calls.items()):
            if call.new.node == node:
                del self._calls[call_id]
                if not call.is_orphan:
                    self._fanouts[call.fanout_id].waits_for.remove(call_id)
                    victims[call.fanout_id] = None
        for lane in Lane:
            self._streams.pop((node, lane), None)
        commands: list[Command] = []
        for fanout_id in victims:
            commands += [Fail(fanout_id, node, error), *self._end(fanout_id)]
        return commands

    def _on_ticked(self, now_s: float) -> list[Command]:
        commands: list[Command] = []
        for fanout_id, fanout in list(self._fanouts.items()):
            if fanout.deadline_s <= now_s:
                slowest = self._calls[min(fanout.waits_for)].new.node
                commands += [TimeOut(fanout_id, slowest), *self._end(fanout_id)]
        return commands

    def _settle(self, call_id: int, node: int) -> _Call | None:
        """Forget a call that its node has ended, and give its credit back."""
        call = self._calls.get(call_id)
        if call is None or call.new.node != node or not call.is_sent:
            return None
        del self._calls[call_id]
        self._streams[node, call.new.lane].used_bytes -= call.new.num_bytes
        return call

    def _end(self, fanout_id: int) -> list[Command]:
        """Forget a fan-out: its queued calls are dropped, those sent become orphans."""
        commands: list[Command] = []
        unblocked: dict[tuple[int, Lane], None] = {}
        for call_id in sorted(self._fanouts.pop(fanout_id).waits_for):
            call = self._calls.get(call_id)
            if call is None:
                continue  # the one that failed
            if call.is_sent:
                call.is_orphan = True
                commands.append(Cancel(call_id, call.new.node, call.new.lane))
            else:
                del self._calls[call_id]
                self._streams[call.new.node, call.new.lane].queue.remove(call_id)
                unblocked[call.new.node, call.new.lane] = None
        for node, lane in unblocked:
            commands += self._send_queued(node, lane)
        return commands

    def _send_queued(self, node: int, lane: Lane) -> list[Command]:
        stream = self._streams.get((node, lane))
        commands: list[Command] = []
        while stream and stream.queue:
            call = self._calls[stream.queue[0]]
            if not stream.has_credit(call.new.num_bytes):
                break
            stream.queue.popleft()
            stream.used_bytes += call.new.num_bytes
            call.is_sent = True
            commands.append(Send(call.new.call_id, node, lane))
        return commands

    def check_integrity(self) -> None:
        """Assert what holds between events."""
        for call_id, call in self._calls.items():
            stream = self._streams[call.new.node, call.new.lane]
            assert call.is_sent != (call_id in stream.queue), f"call {call_id}: sent and queued"
            if call.is_orphan:
                assert call.is_sent, f"call {call_id} waits for nothing"
            else:
                assert call_id in self._fanouts[call.fanout_id].waits_for
        for fanout_id, fanout in self._fanouts.items():
            assert fanout.waits_for, f"fan-out {fanout_id} waits for nobody"
            assert fanout.waits_for <= self._calls.keys(), f"fan-out {fanout_id} lost a call"
        for (node, lane), stream in self._streams.items():
            sent = [
                call.new.num_bytes
                for call in self._calls.values()
                if call.is_sent and (call.new.node, call.new.lane) == (node, lane)
            ]
            assert stream.used_bytes == sum(sent), f"node {node} {lane}: credit leaks"
            assert stream.used_bytes <= stream.credit_bytes or len(sent) == 1
            if stream.queue:
                head = self._calls[stream.queue[0]].new
                assert not stream.has_credit(head.num_bytes), f"node {node} {lane} sleeps"
