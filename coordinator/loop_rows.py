"""Fan-outs of a single row that run ahead of the dispatch core, on the transport `grpcio`.

A decode step's calls are sent, and their replies added, without the core, which learns of several
at once afterwards. Whatever else happens the fan-out is *adopted* first: looked after like any
other. See `coordinator/run_ahead.py`. All of this runs on the event loop's thread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.calls_in_flight import (
    CallsInFlight,
    Fanout,
    NodeNews,
    OutgoingCall,
    Wires,
    replied,
)
from coordinator.dispatch_events import Answered
from shoal import errors, wire
from shoal.ops.frames import ReplyView


@dataclass(slots=True)
class Ahead:
    """A fan-out that runs ahead. until_s: nobody has to look after it until then.

    unanswered: of each call without an answer, by its id, the call and its node.
    """

    fanout: Fanout
    sent_s: float
    until_s: float
    unanswered: dict[int, tuple[OutgoingCall, int]] = field(default_factory=dict)


class LoopRows:
    """Stands before the calls in flight: see the module.

    Args: names: of nodes, for messages. wires: what moves the frames.
    """

    def __init__(self, in_flight: CallsInFlight, names: Sequence[str], wires: Wires) -> None:
        self._in_flight = in_flight
        self._names = names
        self._wires = wires
        self._ahead: Ahead | None = None
        self._untold: list[Answered] = []

    @property
    def is_idle(self) -> bool:
        """Whether no tick is needed."""
        return self._in_flight.is_idle and self._ahead is None and not self._untold

    def start(self, fanout: Fanout, now_s: float) -> None:
        """Send a fan-out's calls, ahead of the core if they may."""
        if self._ahead is None and self._begin(fanout, now_s):
            return
        self.adopt(now_s)
        self._in_flight.start(fanout, now_s)

    def on_frame(self, node: int, frame: NodeNews, num_bytes: int, now_s: float) -> None:
        """Take a frame of a node. Raises MalformedMessage: it makes no sense there."""
        if isinstance(frame, ReplyView):
            if self._takes(node, frame, num_bytes, now_s):
                return
        else:
            self.adopt(now_s)
        self._in_flight.on_frame(node, frame, num_bytes, now_s)

    def adopt(self, now_s: float) -> None:
        """Tell the core all there is to tell: it then looks after every fan-out in flight."""
        answered, self._untold = self._untold, []
        self._in_flight.ran_ahead(answered)
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            left = tuple(ahead.unanswered.values())
            ahead.fanout.calls = [call for call, _ in left]
            nodes = tuple(node for _, node in left)
            self._in_flight.adopt(ahead.fanout, nodes, ahead.sent_s, now_s)

    def tick(self, now_s: float) -> None:
        """Look for what is late, and tell the core what is over."""
        if self._ahead is None or now_s >= self._ahead.until_s:
            self.adopt(now_s)
        self._in_flight.tick(now_s)

    def _begin(self, fanout: Fanout, now_s: float) -> bool:
        first = fanout.calls[0]  # which asks for the most
        if first.asked.rows.num_rows != 1:
            return False
        slots = [call.candidates for call in fanout.calls]
        ahead = Ahead(fanout, now_s, math.inf)
        asked_of: set[int] = set()
        for call, follower in zip(
            fanout.calls, self._in_flight.followers(slots, first.work, now_s) or (), strict=False
        ):
            if follower is None or follower.node in asked_of:
                return False  # of two calls to one node one waits for the other
            asked_of.add(follower.node)
            ahead.unanswered[call.call_id] = call, follower.node
            ahead.until_s = min(ahead.until_s, now_s + follower.patience_s(call.work))
        if not asked_of:
            return False
        self._ahead = ahead
        for call, node in ahead.unanswered.values():
            frame = call.frame(call.call_id)
            fanout.bytes_up += len(frame)
            self._wires.send(node, call.lane, frame)
        return True

    def _takes(self, node: int, reply: ReplyView, num_bytes: int, now_s: float) -> bool:
        ahead = self._ahead
        if ahead is None:
            return False
        call, asked_of = ahead.unanswered.get(reply.call_id, (None, -1))
        if call is None or asked_of != node:
            return False
        fanout, asked = ahead.fanout, call.asked
        try:
            wire.add_reply(reply, call.part.rows, asked.grid, fanout.sums, asked.replies)
        except errors.MalformedMessage as error:
            fanout.fault = errors.MalformedMessage(f"node {self._names[node]}: {error}")
        fanout.bytes_down += num_bytes
        fanout.compute_us[node] = reply.compute_us
        del ahead.unanswered[reply.call_id]
        self._untold.append(Answered(call, replied(reply, node, now_s), ahead.sent_s))
        if not ahead.unanswered:
            self._ahead = None
            fanout.end(None)
        return True
