"""A single row's fan-out that runs ahead of the dispatch core: what is known of it meanwhile.

`coordinator/run_ahead.py` says when that is allowed. One native call sends it and collects it, so
that a decode step pays for that, and not for frames, events and commands.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.call_maker import CallMaker
from coordinator.call_split import FIRST_ROW
from coordinator.calls_in_flight import Asked, Fanout, replied
from coordinator.dispatch_events import Answered, NewCall, Replied
from coordinator.fast_lane import FastLane
from coordinator.route import Route
from coordinator.run_ahead import Follower
from shoal import errors, ops, wire
from shoal.ops.fanout import Reply, RowReport, RowWires, SentCall, Stop
from shoal.ops.frames import ReplyView
from shoal.router import RoutingPlan
from shoal.transport import Wire


@dataclass(slots=True)
class Standing:
    """What rows may be sent to without asking the core again, until anything else happens.

    followers: of each lane.
    patience_s: how long a fan-out is left alone at least, whatever its calls.
    """

    route: Route
    followers: list[Follower]
    lanes: list[FastLane]
    wires: RowWires
    patience_s: float


@dataclass(slots=True)
class Exchanged:
    """What went over a lane of a node beside its connection. now_s: of the last reply."""

    node: int
    num_messages: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    now_s: float = 0.0


@dataclass(slots=True)
class RowFanout:
    """See the module.

    asked, plan: of one that is over, only their sizes: no plan, and rows of other values.
    standing: lanes below are indices into its own.
    first_id: of its calls, the next have those after it.
    sums: [1, D] int64, what replies are added to.
    sent: the calls, in the order of their ids.
    began_s: when collecting last began.
    unanswered: ids of calls. answered: what the core is to be told of the others.
    untold: replies of a fan-out that is done, which are not among the answered yet.
    is_counted: whether the lanes know of what was sent.
    adopted: the rest of it, once it is looked after like any other fan-out.
    fault: a reply that could not be added.
    """

    asked: Asked
    plan: RoutingPlan | None
    route: Route
    maker: CallMaker
    standing: Standing
    first_id: int
    sums: NDArray[np.int64]
    sent_s: float
    sent: list[SentCall] = field(default_factory=list)
    began_s: float = 0.0
    unanswered: list[int] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    untold: list[Reply] = field(default_factory=list)
    is_counted: bool = False
    compute_us: dict[int, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    adopted: Fanout | None = None
    fault: errors.MalformedMessage | None = None

    @property
    def calls(self) -> list[NewCall]:
        """The calls that were sent, as the core sees them."""
        candidates = self.route.candidates
        made = []
        for call_id, (_, slot, num_pairs, *_) in enumerate(self.sent, self.first_id):
            nodes = candidates[slot]
            assert nodes is not None, "a call of a slot that is local"
            made.append(self.maker.row_call(self.asked, nodes, num_pairs, call_id))
        return made

    def figures(self) -> tuple[float, int, int]:
        """Return seconds of the slowest node's compute, bytes up, bytes down."""
        done = self if self.adopted is None else self.adopted
        return max(done.compute_us.values()) * 1e-6, done.bytes_up, done.bytes_down

    def left_s(self, now_s: float) -> float:
        """Return for how long nobody has to look after it; 0 or less: somebody has."""
        waited_s, followers = now_s - self.sent_s, self.standing.followers
        if waited_s < self.standing.patience_s:
            return self.standing.patience_s - waited_s
        return -waited_s + min(
            followers[lane].patience_s(call.work)
            for call, (lane, *_) in zip(self.calls, self.sent, strict=True)
        )

    def run(self, reports: list[RowReport]) -> None:
        """Send the calls, and collect their replies.

        Until every call is answered, the patience is over, or something else comes. Blocks,
        without the GIL. `take` and the lanes go on from the report.
        """
        asked, plan, standing = self.asked, self.plan, self.standing
        assert plan is not None, "over before it began"
        rows = asked.rows
        self.began_s = self.sent_s
        standing.wires.run(
            self.first_id,
            asked.layer,
            asked.deadline_ms,
            rows.scheme + 1,
            rows.dim,
            wire.reply_format(asked.replies),
            rows.values,
            rows.scales,
            plan.experts,
            plan.weights,
            self.route.owners(asked.layer),
            asked.grid,
            asked.replies is Wire.BF16,
            self.sums,
            standing.patience_s,
            reports,
        )

    def collect(self, now_s: float, reports: list[RowReport]) -> None:
        """Go on as `run` does."""
        self.began_s = now_s
        asked, patience_s = self.asked, max(0.0, self.left_s(now_s))
        is_bf16 = asked.replies is Wire.BF16
        self.standing.wires.collect(
            self.unanswered, asked.grid, is_bf16, self.sums, patience_s, reports
        )

    def is_done_by(self, news: RowReport) -> bool:
        """Whether that is all: every call answered at once, and nothing else came.

        Then it is done, and the core and the lanes are still to be told (`settle`).
        """
        sent, why, _, _, replies, unread = news
        if why != Stop.DONE or unread or not sent:
            return False
        followers = self.standing.followers
        for _, lane, _, _, compute_us, _, num_bytes in replies:
            self.compute_us[followers[lane].node] = compute_us
            self.bytes_down += num_bytes
        for call in sent:
            self.bytes_up += call[3]
        self.sent, self.untold = sent, replies
        return True

    def was_sent(self, sent: list[SentCall]) -> None:
        """Take what was sent, if it is not over already."""
        self.sent = sent
        self.bytes_up = sum(call[3] for call in sent)
        self.unanswered = list(range(self.first_id, self.first_id + len(sent)))

    def count_sent(self) -> None:
        """Count on the lanes what was sent, once."""
        if self.is_counted:
            return
        self.is_counted = True
        for lane, _, _, num_bytes, _, unsent in self.sent:
            self.standing.lanes[lane].sent_beside(num_bytes, unsent)

    def settle(self, exchanged: dict[FastLane, Exchanged]) -> list[Answered]:
        """Return what the core is to be told of a row that went well.

        Args: exchanged: of each lane, added to: what it is still to be told.
        """
        calls, standing = self.calls, self.standing
        self.is_counted = True
        answered = []
        for call_id, index, after_s, queue_us, compute_us, load_us, num_bytes in self.untold:
            now_s = self.began_s + after_s
            lane, node = standing.lanes[index], standing.followers[index].node
            sums = exchanged.get(lane)
            if sums is None:
                sums = exchanged[lane] = Exchanged(node)
            at = call_id - self.first_id
            sums.num_messages += 1
            sums.received_bytes += num_bytes
            sums.sent_bytes += self.sent[at][3]
            sums.now_s = now_s
            busy_s = (queue_us + compute_us) * 1e-6
            reply = Replied(call_id, node, now_s, busy_s, load_us * 1e-6, queue_us * 1e-6)
            answered.append(Answered(calls[at], reply, self.sent_s))
        return answered

    def take(self, reply: Reply) -> None:
        """Note a reply that was added."""
        call_id, lane, after_s, queue_us, compute_us, load_us, num_bytes = reply
        now_s = self.began_s + after_s
        self.standing.lanes[lane].received_beside(num_bytes, now_s)
        busy_s = (queue_us + compute_us) * 1e-6
        node = self.standing.followers[lane].node
        event = Replied(call_id, node, now_s, busy_s, load_us * 1e-6, queue_us * 1e-6)
        if call_id in self.unanswered:
            self._count(event, compute_us, num_bytes)
        call = self.calls[call_id - self.first_id]
        self.answered.append(Answered(call, event, self.sent_s))

    def takes(self, node: int, reply: ReplyView, num_bytes: int, now_s: float) -> bool:
        """Add a reply that came the long way; False: it is to none of these calls."""
        if reply.call_id not in self.unanswered:
            return False
        index = reply.call_id - self.first_id
        lane = self.sent[index][0]
        if self.standing.followers[lane].node != node:
            return False
        asked = self.asked
        try:
            wire.add_reply(reply, FIRST_ROW, asked.grid, self.sums, asked.replies)
        except errors.MalformedMessage as error:
            name = self.standing.lanes[lane].node
            self.fault = errors.MalformedMessage(f"node {name}: {error}")
        event = replied(reply, node, now_s)
        self._count(event, reply.compute_us, num_bytes)
        self.answered.append(Answered(self.calls[index], event, self.sent_s))
        return True

    def _count(self, event: Replied, compute_us: int, num_bytes: int) -> None:
        self.unanswered.remove(event.attempt_id)
        self.compute_us[event.node] = compute_us
        self.bytes_down += num_bytes

    def rest(self) -> tuple[Fanout, tuple[int, ...]]:
        """Return the calls without an answer as a fan-out of their own, and their nodes."""
        followers = self.standing.followers
        assert self.plan is not None, "nothing of it is left"
        calls = self.maker.calls_of_row(self.asked, self.plan, self.route, self.first_id)
        left = [
            (call, followers[lane].node)
            for call, (lane, *_) in zip(calls, self.sent, strict=True)
            if call.call_id in self.unanswered
        ]
        made = Fanout([call for call, _ in left], self.sums)
        made.bytes_up, made.bytes_down = self.bytes_up, self.bytes_down
        made.compute_us, made.fault = self.compute_us, self.fault
        self.adopted = made
        return made, tuple(node for _, node in left)


@dataclass(slots=True)
class LayersEnd:
    """What came of a run of layers.

    ran: of those that went well. rows: the fan-out of each.
    left: what the next layer asks, if its fan-out did not go well.
    row: that fan-out, if it ended well after all; else error says why not, or it was never sent.
    """

    ran: ops.RanLayers
    rows: list[RowFanout]
    left: ops.OpenLayer | None = None
    row: RowFanout | None = None
    error: errors.ShoalError | None = None
