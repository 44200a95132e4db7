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

from coordinator.dispatch import Dispatcher
from coordinator.dispatch_events import (
    Accept,
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
    ReleaseNode,
    Replied,
    Send,
    Ticked,
    TimeOut,
)
from coordinator.node_health import NodeHealth
from shoal import errors, wire
from shoal.v1 import expert_pb2 as pb

_fanout_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class OutgoingCall:
    """An encoded call.

    candidates: nodes that own its experts, the preferred one first. shard: their range, in words.
    rows: [T'] int32, which rows of the layer it carries. work: see NewCall.
    """

    call_id: int
    candidates: tuple[int, ...]
    lane: Lane
    frame: bytes
    rows: NDArray[np.int32]
    work: float
    shard: str


@dataclass(frozen=True, slots=True)
class Hint:
    """An encoded hint. candidates, work: of the call that it is about, see NewCall."""

    candidates: tuple[int, ...]
    frame: bytes
    work: float


@dataclass(slots=True)
class Fanout:
    """One layer's calls on their way. Ended once, by whoever moves the frames.

    replies, answered_by: of each call, by its id. retries: ids of further attempts.
    """

    calls: Sequence[OutgoingCall]
    fanout_id: int = field(default_factory=lambda: next(_fanout_ids))
    replies: dict[int, pb.Reply] = field(default_factory=dict)
    answered_by: dict[int, int] = field(default_factory=dict)
    retries: list[int] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    error: errors.ShoalError | None = None
    is_ended: bool = False
    # Released when it ends: a bare lock wakes its waiter faster than an Event does.
    _ended: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._ended.acquire()

    def end(self, error: errors.ShoalError | None) -> None:
        """Let the waiter go. Called exactly once."""
        self.error = error
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
        self._fanouts[fanout.fanout_id] = fanout
        new_calls = []
        for call in fanout.calls:
            self._calls[call.call_id] = fanout, call
            num_bytes = len(call.frame)
            fanout.bytes_up += num_bytes
            new_calls.append(
                NewCall(call.call_id, call.candidates, call.lane, num_bytes, call.work)
            )
        self._on(FanoutStarted(fanout.fanout_id, tuple(new_calls), now_s))

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

    def on_frame(self, node: int, frame: pb.NodeFrame, num_bytes: int, now_s: float) -> None:
        """Take a frame of a node. Raises MalformedMessage: it makes no sense there."""
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

    def _on_reply(self, node: int, reply: pb.Reply, num_bytes: int, now_s: float) -> None:
        queue_s = reply.queue_us * 1e-6
        busy_s = queue_s + reply.compute_us * 1e-6
        event = Replied(reply.call_id, node, now_s, busy_s, reply.load_us * 1e-6, queue_s)
        for command in self._dispatcher.on(event):
            if isinstance(command, Accept):
                fanout, _ = self._calls[command.call_id]
                fanout.replies[command.call_id] = reply
                fanout.answered_by[command.call_id] = node
                fanout.bytes_down += num_bytes
            else:
                self._do(command)

    def _error_of(self, failure: pb.Failure, name: str) -> errors.ShoalError:
        error = wire.error_of(failure, name)
        call_id = self._call_of_retry.get(failure.call_id, failure.call_id)
        if not isinstance(error, errors.NumericError) or call_id not in self._calls:
            return error
        # The node speaks of its call's rows; the caller knows the layer's.
        _, call = self._calls[call_id]
        rows = tuple(int(call.rows[row]) for row in error.rows if row < call.rows.size)
        return errors.NumericError(str(error), rows)

    def _on(self, event: Event) -> None:
        for command in self._dispatcher.on(event):
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case Send(attempt_id, call_id, node, lane):
                frame = self._calls[call_id][1].frame
                if attempt_id != call_id:
                    frame = self._again(attempt_id, call_id, frame)
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

    def _again(self, attempt_id: int, call_id: int, frame: bytes) -> bytes:
        fanout, _ = self._calls[call_id]
        self._call_of_retry[attempt_id] = call_id
        fanout.retries.append(attempt_id)
        fanout.bytes_up += len(frame)
        message = pb.ClientFrame.FromString(frame)
        message.call.call_id = attempt_id
        return message.SerializeToString()

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


def closed() -> errors.NodeUnreachable:
    """Return what a fan-out is told that can no longer travel."""
    return errors.NodeUnreachable("the connections to the nodes are closed")
