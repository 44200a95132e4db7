"""The calls in flight and who waits for them: what the dispatch core says is done here.

Shared by both transports, which differ in how frames travel and on which thread this runs: all of
it on one thread at a time.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.dispatch import (
    Accept,
    Cancel,
    Command,
    Dispatcher,
    Event,
    Fail,
    Failed,
    FanoutAbandoned,
    FanoutStarted,
    Finish,
    Lane,
    LaneOpened,
    NewCall,
    NodeDraining,
    NodeLost,
    Replied,
    Send,
    Ticked,
    TimeOut,
)
from shoal import errors, wire
from shoal.v1 import expert_pb2 as pb

_fanout_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class OutgoingCall:
    """An encoded call. rows: [T'] int32, which rows of the layer it carries."""

    call_id: int
    node: int
    lane: Lane
    frame: bytes
    rows: NDArray[np.int32]


@dataclass(slots=True)
class Fanout:
    """One layer's calls on their way. Ended once, by whoever moves the frames."""

    calls: Sequence[OutgoingCall]
    fanout_id: int = field(default_factory=lambda: next(_fanout_ids))
    replies: dict[int, pb.Reply] = field(default_factory=dict)
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
        names: the nodes' endpoints, for messages.
        call_timeout_s: how long a fan-out may take, for messages.
        send: takes a serialised ClientFrame for a node's lane.
    """

    def __init__(
        self,
        names: Sequence[str],
        call_timeout_s: float,
        send: Callable[[int, Lane, bytes], None],
    ) -> None:
        self._names = names
        self._call_timeout_s = call_timeout_s
        self._send = send
        self._dispatcher = Dispatcher()
        self.num_ended = 0  # fan-outs, so far
        self._fanouts: dict[int, Fanout] = {}
        self._calls: dict[int, tuple[Fanout, OutgoingCall]] = {}

    @property
    def has_bulk(self) -> bool:
        """Whether a fan-out in flight has a call on the bulk lane."""
        return any(call.lane is Lane.BULK for _, call in self._calls.values())

    def lane_opened(self, node: int, lane: Lane, credit_bytes: int) -> None:
        self._on(LaneOpened(node, lane, credit_bytes))

    def lost(self, node: int, error: errors.NodeError) -> None:
        """A node's connection is gone."""
        self._on(NodeLost(node, error))

    def tick(self, now_s: float) -> None:
        """Look at the deadlines."""
        self._on(Ticked(now_s))

    def start(self, fanout: Fanout, deadline_s: float) -> None:
        """Send a fan-out's calls, or queue them for credit."""
        self._fanouts[fanout.fanout_id] = fanout
        for call in fanout.calls:
            self._calls[call.call_id] = fanout, call
        new_calls = tuple(
            NewCall(call.call_id, call.node, call.lane, len(call.frame)) for call in fanout.calls
        )
        self._on(FanoutStarted(fanout.fanout_id, new_calls, deadline_s))

    def abandon(self, fanout: Fanout) -> None:
        """Take a fan-out's calls back, if it is still in flight."""
        if fanout.fanout_id in self._fanouts:
            self._on(FanoutAbandoned(fanout.fanout_id))
            self._forget(fanout.fanout_id)

    def end_all(self) -> None:
        """Fail every fan-out: the connections are closed."""
        for fanout_id in list(self._fanouts):
            self._end(fanout_id, closed())

    def on_frame(self, node: int, frame: pb.NodeFrame, num_bytes: int) -> None:
        """Take a frame of a node. Raises MalformedMessage: it makes no sense there."""
        match frame.WhichOneof("frame"):
            case "reply":
                reply = frame.reply
                for command in self._dispatcher.on(Replied(reply.call_id, node)):
                    if isinstance(command, Accept):
                        self._accept(reply, num_bytes)
                    else:
                        self._do(command)
            case "failure":
                failure = frame.failure
                error = self._error_of(failure, self._names[node])
                self._on(Failed(failure.call_id, node, error))
            case "progress":
                pass  # its call is held and alive; deadlines are absolute
            case "draining":
                reason, name = frame.draining.reason, self._names[node]
                error = errors.NodeDraining(f"node {name} is draining ({reason}): use another node")
                self._on(NodeDraining(node, error))
            case _:
                raise errors.MalformedMessage(
                    f"node {self._names[node]} sent a frame that nobody asked for"
                )

    def _error_of(self, failure: pb.Failure, name: str) -> errors.ShoalError:
        error = wire.error_of(failure, name)
        if not isinstance(error, errors.NumericError) or failure.call_id not in self._calls:
            return error
        # The node speaks of its call's rows; the caller knows the layer's.
        _, call = self._calls[failure.call_id]
        rows = tuple(int(call.rows[row]) for row in error.rows if row < call.rows.size)
        return errors.NumericError(str(error), rows)

    def _on(self, event: Event) -> None:
        for command in self._dispatcher.on(event):
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case Send(call_id, node, lane):
                self._send(node, lane, self._calls[call_id][1].frame)
            case Cancel(call_id, node, lane):
                frame = pb.ClientFrame(cancel=pb.Cancel(call_id=call_id))
                self._send(node, lane, frame.SerializeToString())
            case Finish(fanout_id):
                self._end(fanout_id, None)
            case Fail(fanout_id, _, error):
                self._end(fanout_id, error)
            case TimeOut(fanout_id, node):
                self._end(fanout_id, self._timeout_of(node))
            case Accept():
                raise AssertionError("only a reply is accepted")

    def _timeout_of(self, node: int) -> errors.CallTimeout:
        return errors.CallTimeout(
            f"node {self._names[node]} gave no answer within {self._call_timeout_s:g} s: it "
            "hangs or is overloaded; restart it, or allow more time with --call-timeout"
        )

    def _accept(self, reply: pb.Reply, num_bytes: int) -> None:
        fanout, _ = self._calls[reply.call_id]
        fanout.replies[reply.call_id] = reply
        fanout.bytes_down += num_bytes

    def _end(self, fanout_id: int, error: errors.ShoalError | None) -> None:
        self.num_ended += 1
        self._forget(fanout_id).end(error)

    def _forget(self, fanout_id: int) -> Fanout:
        fanout = self._fanouts.pop(fanout_id)
        for call in fanout.calls:
            del self._calls[call.call_id]
        return fanout


def closed() -> errors.NodeUnreachable:
    """Return what a fan-out is told that can no longer travel."""
    return errors.NodeUnreachable("the connections to the nodes are closed")
