"""The calls in flight and who waits for them: what the dispatch core says is done here.

Shared by both transports, which differ in how frames travel and on which thread this runs: all of
it on one thread at a time.
"""

import itertools
import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator.call_split import Part
from coordinator.dispatch import Dispatcher
from coordinator.dispatch_events import (
    Accept,
    Adopted,
    Answered,
    Cancel,
    CloseNode,
    Command,
    Event,
    Fail,
    Failed,
    FanoutAbandoned,
    FanoutStarted,
    Finish,
    GiveUpWaiting,
    Lane,
    NewCall,
    NodeAbsent,
    NodeDraining,
    NodeLost,
    NodeOpened,
    NodeRetired,
    Progressed,
    RanAhead,
    ReleaseNode,
    Replied,
    Send,
    Ticked,
    TimeOut,
)
from coordinator.node_health import NodeHealth
from coordinator.run_ahead import Follower
from shoal import errors, wire
from shoal.ops.frames import ReplyView
from shoal.rows import Rows
from shoal.transport import Wire
from shoal.v1 import expert_pb2 as pb

NodeNews = pb.NodeFrame | ReplyView  # a reply is read in place, everything else by protobuf
_fanout_ids = itertools.count(1)


@dataclass(slots=True)
class Asked:
    """What the calls of a fan-out have in common.

    rows: [T] of the layer, quantised. grid: of its sums. replies: the form that they travel in.
    """

    layer: int
    rows: Rows
    grid: int
    deadline_ms: int
    replies: Wire


@dataclass(slots=True)
class OutgoingCall(NewCall):
    """A call to make, as the dispatch core sees it and as a node does.

    shard: the range of its experts, in words.
    """

    asked: Asked
    part: Part
    shard: str

    def frame(self, attempt_id: int) -> bytes:
        """Return the frame of an attempt."""
        asked = self.asked
        call = self.part.call(asked.layer, asked.rows)
        return wire.call_frame(attempt_id, asked.deadline_ms, call, asked.replies)


@dataclass(frozen=True, slots=True)
class Hint:
    """An encoded hint. candidates, work: of the call that it is about, see NewCall."""

    candidates: tuple[int, ...]
    frame: bytes
    work: float


@dataclass(slots=True)
class Fanout:
    """One layer's calls on their way. Ended once, by whoever moves the frames.

    sums: [T, D] int64, what replies are added to as they come. retries: ids of further attempts.
    compute_us: of each node that answered, what it spent on this fan-out: it computes one call
        after the other.
    fault: a reply that could not be added, and the node that sent it.
    """

    calls: Sequence[OutgoingCall]
    sums: NDArray[np.int64]
    fanout_id: int = field(default_factory=lambda: next(_fanout_ids))
    compute_us: dict[int, int] = field(default_factory=dict)
    retries: list[int] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    error: errors.ShoalError | None = None
    fault: errors.MalformedMessage | None = None
    is_ended: bool = False
    # Released when it ends: a bare lock wakes its waiter faster than an Event does.
    _ended: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._ended.acquire()

    def end(self, error: errors.ShoalError | None) -> None:
        """Let the waiter go. Called exactly once."""
        self.error = error or self.fault
        self.is_ended = True
        self._ended.release()

    def wait(self) -> None:
        """Return once every reply is there; raises whatever else ended it."""
        self._ended.acquire()
        if self.error is not None:
            raise self.error


class CallsInFlight:
    """Carries out the dispatch core's commands.

    Args:
        names: the nodes' endpoints, for messages; it may grow.
        call_timeout_s, shard_wait_s: see Dispatcher.
        wires: what moves the frames.
    """

    def __init__(
        self, names: Sequence[str], call_timeout_s: float, shard_wait_s: float, wires: "Wires"
    ) -> None:
        self._names = names
        self._call_timeout_s = call_timeout_s
        self._shard_wait_s = shard_wait_s
        self._wires = wires
        self._dispatcher = Dispatcher(call_timeout_s, shard_wait_s, names.__getitem__)
        self.num_ended = 0  # fan-outs, so far
        self._fanouts: dict[int, Fanout] = {}
        self._calls: dict[int, tuple[Fanout, OutgoingCall]] = {}
        self._call_of_retry: dict[int, int] = {}

    @property
    def has_bulk(self) -> bool:
        """Whether a fan-out in flight has a call on the bulk lane."""
        return any(call.lane is Lane.BULK for _, call in self._calls.values())

    @property
    def is_idle(self) -> bool:
        """Whether no tick is needed."""
        return self._dispatcher.is_idle

    def health(self, node: int) -> NodeHealth | None:
        """Return what is known of a node, for figures."""
        return self._dispatcher.health(node)

    def on(self, event: NodeOpened | NodeAbsent | NodeLost | NodeRetired) -> None:
        """Take what became of a node."""
        self._on(event)

    def tick(self, now_s: float) -> None:
        """Look for what is late."""
        self._on(Ticked(now_s))

    def start(self, fanout: Fanout, now_s: float) -> None:
        """Send a fan-out's calls, or queue them for credit or a node."""
        self._keep(fanout)
        self._on(FanoutStarted(fanout.fanout_id, tuple(fanout.calls), now_s))

    def followers(
        self, slots: Sequence[tuple[int, ...] | None], work: float, now_s: float
    ) -> list[Follower | None] | None:
        """Say where calls may be sent without `start`: see `RunsAhead`."""
        return self._dispatcher.followers(slots, work, now_s)

    def ran_ahead(self, answered: list[Answered]) -> None:
        """Learn from calls that were sent so and answered."""
        if answered:
            self._on(RanAhead(answered))

    def adopt(self, fanout: Fanout, nodes: tuple[int, ...], sent_s: float, now_s: float) -> None:
        """Look after calls that were sent so, to these nodes, and have no answer yet."""
        self._keep(fanout)
        self._on(Adopted(fanout.fanout_id, tuple(fanout.calls), nodes, sent_s, now_s))

    def _keep(self, fanout: Fanout) -> None:
        self._fanouts[fanout.fanout_id] = fanout
        for call in fanout.calls:
            self._calls[call.call_id] = fanout, call

    def hint(self, hints: Sequence[Hint], wanted_by: Container[int], now_s: float) -> None:
        """Send each hint to the node that its call would go to, if that one wants any."""
        for hint in hints:
            node = self._dispatcher.preferred(hint.candidates, hint.work, now_s)
            if node is not None and node in wanted_by:
                self._wires.send(node, Lane.INTERACTIVE, hint.frame)

    def abandon(self, fanout: Fanout) -> None:
        """Take a fan-out's calls back, if it is still in flight."""
        if fanout.fanout_id in self._fanouts:
            self._on(FanoutAbandoned(fanout.fanout_id))
            self._forget(fanout.fanout_id)

    def end_all(self) -> None:
        """Fail every fan-out: the connections are closed."""
        for fanout_id in list(self._fanouts):
            self._end(fanout_id, closed())

    def on_frame(self, node: int, frame: NodeNews, num_bytes: int, now_s: float) -> None:
        """Take a frame of a node. Raises MalformedMessage: it makes no sense there."""
        if isinstance(frame, ReplyView):
            self._on_reply(node, frame, num_bytes, now_s)
            return
        match frame.WhichOneof("frame"):
            case "reply":
                self._on_reply(node, frame.reply, num_bytes, now_s)
            case "failure":
                failure = frame.failure
                error = self._error_of(failure, self._names[node])
                is_final = isinstance(error, errors.NumericError | errors.MalformedMessage)
                self._on(Failed(failure.call_id, node, error, is_final, now_s))
            case "progress":
                self._on(Progressed(node, tuple(frame.progress.call_ids), now_s))
            case "draining":
                reason, name = frame.draining.reason, self._names[node]
                error = errors.NodeDraining(f"node {name} is draining ({reason}): use another node")
                self._on(NodeDraining(node, error, now_s))
            case _:
                raise errors.MalformedMessage(
                    f"node {self._names[node]} sent a frame that nobody asked for"
                )

    def _on_reply(
        self, node: int, reply: ReplyView | pb.Reply, num_bytes: int, now_s: float
    ) -> None:
        for command in self._dispatcher.on(replied(reply, node, now_s)):
            if isinstance(command, Accept):
                fanout, call = self._calls[command.call_id]
                fanout.bytes_down += num_bytes
                spent_us = fanout.compute_us.get(node, 0) + reply.compute_us
                fanout.compute_us[node] = spent_us
                self._add(reply, fanout, call, node)
            else:
                self._do(command)

    def _add(
        self, reply: ReplyView | pb.Reply, fanout: Fanout, call: OutgoingCall, node: int
    ) -> None:
        asked = call.asked
        try:
            wire.add_reply(reply, call.part.rows, asked.grid, fanout.sums, asked.replies)
        except errors.MalformedMessage as error:
            fanout.fault = errors.MalformedMessage(f"node {self._names[node]}: {error}")

    def _error_of(self, failure: pb.Failure, name: str) -> errors.ShoalError:
        error = wire.error_of(failure, name)
        call_id = self._call_of_retry.get(failure.call_id, failure.call_id)
        if not isinstance(error, errors.NumericError) or call_id not in self._calls:
            return error
        # The node speaks of its call's rows; the caller knows the layer's.
        _, call = self._calls[call_id]
        mine = call.part.rows
        rows = tuple(int(mine[row]) for row in error.rows if row < mine.size)
        return errors.NumericError(str(error), rows)

    def _on(self, event: Event) -> None:
        for command in self._dispatcher.on(event):
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case Send(attempt_id, call_id, node, lane):
                fanout, call = self._calls[call_id]
                if attempt_id != call_id:
                    self._call_of_retry[attempt_id] = call_id
                    fanout.retries.append(attempt_id)
                frame = call.frame(attempt_id)
                fanout.bytes_up += len(frame)
                self._wires.send(node, lane, frame)
            case Finish(fanout_id):
                self._end(fanout_id, None)
            case Cancel(attempt_id, node, lane):
                cancel = pb.ClientFrame(cancel=pb.Cancel(call_id=attempt_id))
                self._wires.send(node, lane, cancel.SerializeToString())
            case Fail(fanout_id, _, error):
                self._end(fanout_id, error)
            case TimeOut(fanout_id, _, node):
                self._end(fanout_id, self._timeout_of(node))
            case GiveUpWaiting(fanout_id, call_id, causes):
                self._end(fanout_id, self._nobody_for(call_id, causes))
            case CloseNode(node, silent_s):
                self._wires.close_node(node, silent_s)
            case ReleaseNode(node):
                self._wires.release_node(node)
            case Accept():
                raise AssertionError("only a reply is accepted")

    def _timeout_of(self, node: int) -> errors.CallTimeout:
        return errors.CallTimeout(
            f"node {self._names[node]} gave no answer within {self._call_timeout_s:g} s: it "
            "hangs or is overloaded; restart it, or allow more time with --call-timeout"
        )

    def _nobody_for(
        self, call_id: int, causes: tuple[errors.ShoalError, ...]
    ) -> errors.ShardUnavailable:
        why = "; ".join(map(str, causes)) or "its nodes were lost"
        waited = f" (waited {self._shard_wait_s:g} s: --shard-wait)" if self._shard_wait_s else ""
        shard = self._calls[call_id][1].shard
        return errors.ShardUnavailable(f"no node is left for {shard}{waited}: {why}")

    def _end(self, fanout_id: int, error: errors.ShoalError | None) -> None:
        self.num_ended += 1
        self._forget(fanout_id).end(error)

    def _forget(self, fanout_id: int) -> Fanout:
        fanout = self._fanouts.pop(fanout_id)
        for call in fanout.calls:
            del self._calls[call.call_id]
        for attempt_id in fanout.retries:
            del self._call_of_retry[attempt_id]
        return fanout


class Wires(Protocol):
    """What moves frames: a transport. Called on the thread that feeds CallsInFlight."""

    def send(self, node: int, lane: Lane, frame: bytes) -> None:
        """Take a serialised ClientFrame for an open node."""
        ...

    def close_node(self, node: int, silent_s: float) -> None:
        """Break off the connections of a node that is silent, and meet it anew."""
        ...

    def release_node(self, node: int) -> None:
        """Close the connections of a node that the map names no more."""
        ...


def replied(reply: ReplyView | pb.Reply, node: int, now_s: float) -> Replied:
    """Return what a reply is to the dispatch core."""
    queue_s = reply.queue_us * 1e-6
    busy_s = queue_s + reply.compute_us * 1e-6
    return Replied(reply.call_id, node, now_s, busy_s, reply.load_us * 1e-6, queue_s)


def closed() -> errors.NodeUnreachable:
    """Return what a fan-out is told that can no longer travel."""
    return errors.NodeUnreachable("the connections to the nodes are closed")
