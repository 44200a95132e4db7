"""A single row's fan-out that runs ahead of the dispatch core: what is known of it meanwhile.

`coordinator/run_ahead.py` says when that is allowed. One native call sends it and another collects
it, so that a decode step pays for two calls a layer, and not for frames, events and commands.
"""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.call_split import RowSplit
from coordinator.calls_in_flight import Asked, Fanout, OutgoingCall, replied
from coordinator.dispatch_events import Answered, Replied
from coordinator.fast_lane import FastLane
from coordinator.run_ahead import Lead
from shoal import errors, wire
from shoal.ops import fanout
from shoal.ops.fanout import Stop
from shoal.ops.frames import ReplyView
from shoal.transport import Wire

# As `collect_row` reports: why it stopped, lane, errno, replies, what lies unread in the buffer.
Reply = tuple[int, int, float, int, int, int, int]
News = tuple[int, int, int, list[Reply], list[tuple[int, int, int]]]


@dataclass(slots=True)
class RowFanout:
    """See the module.

    calls: calls[i] goes to lead.nodes[i], on lanes[i].
    sums: [1, D] int64, what replies are added to.
    began_s: when collecting last began.
    unanswered: ids of calls. answered: what the core is to be told of the others.
    adopted: the rest of it, once it is looked after like any other fan-out.
    fault: a reply that could not be added.
    """

    asked: Asked
    calls: list[OutgoingCall]
    lead: Lead
    lanes: list[FastLane]
    sums: NDArray[np.int64]
    buffer: NDArray[np.uint8]
    sent_s: float
    began_s: float = 0.0
    unanswered: list[int] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    compute_us: dict[int, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    adopted: Fanout | None = None
    fault: errors.MalformedMessage | None = None

    def send(self, split: RowSplit) -> tuple[int, int]:
        """Send the calls. Returns (lane, errno) of one that cannot be sent to, else (-1, 0)."""
        asked = self.asked
        lanes, rows = self.lanes, asked.rows
        targets = [
            (lane.fileno(), lane.stream_id, call.call_id, begin, end)
            for call, lane, (_, begin, end) in zip(self.calls, lanes, split.groups, strict=True)
        ]
        self.unanswered = [call.call_id for call in self.calls]
        sent = fanout.send_row(
            targets,
            asked.layer,
            asked.deadline_ms,
            rows.scheme + 1,
            rows.dim,
            wire.reply_format(asked.replies),
            rows.values,
            rows.scales,
            split.experts,
            split.weights,
        )
        broken = (-1, 0)
        for index, (num_bytes, error, unsent) in enumerate(sent):
            self.bytes_up += num_bytes
            lanes[index].sent_beside(num_bytes, unsent)
            if error:
                broken = index, error
        return broken

    def collect(self, others: list[int], news: list[News]) -> None:
        """Wait until every call is answered, the lead is over, or something else comes.

        Blocks, without the GIL. `take` and the lanes go on from the news.
        """
        self.began_s = time.monotonic()
        asked = self.asked
        fanout.collect_row(
            [(lane.fileno(), lane.stream_id) for lane in self.lanes],
            others,
            [
                (call.call_id, lane)
                for lane, call in enumerate(self.calls)
                if call.call_id in self.unanswered
            ],
            asked.grid,
            asked.replies is Wire.BF16,
            self.sums,
            self.buffer,
            max(0.0, self.lead.until_s - self.began_s),
            news,
        )

    def is_done_by(self, news: News) -> bool:
        """Whether that is all: every call answered at once, and nothing else came.

        Then it is done, and the replies are still to be noted (`take`).
        """
        why, _, _, replies, unread = news
        if why != Stop.DONE or unread or self.answered or self.fault:
            return False
        for _, lane, _, _, compute_us, _, num_bytes in replies:
            self.compute_us[self.lead.nodes[lane]] = compute_us
            self.bytes_down += num_bytes
        self.unanswered.clear()
        return True

    def take(self, reply: Reply) -> None:
        """Note a reply that was added."""
        call_id, lane, after_s, queue_us, compute_us, load_us, num_bytes = reply
        now_s = self.began_s + after_s
        self.lanes[lane].received_beside(num_bytes, now_s)
        busy_s = (queue_us + compute_us) * 1e-6
        node = self.lead.nodes[lane]
        event = Replied(call_id, node, now_s, busy_s, load_us * 1e-6, queue_us * 1e-6)
        if call_id in self.unanswered:
            self._count(event, compute_us, num_bytes)
        self.answered.append(Answered(self.calls[lane], event))

    def takes(self, node: int, reply: ReplyView, num_bytes: int, now_s: float) -> bool:
        """Add a reply that came the long way; False: it is to none of these calls."""
        if reply.call_id not in self.unanswered or node not in self.lead.nodes:
            return False
        lane = self.lead.nodes.index(node)
        call, asked = self.calls[lane], self.asked
        if call.call_id != reply.call_id:
            return False
        try:
            wire.add_reply(reply, call.part.rows, asked.grid, self.sums, asked.replies)
        except errors.MalformedMessage as error:
            self.fault = errors.MalformedMessage(f"node {self.lanes[lane].node}: {error}")
        event = replied(reply, node, now_s)
        self._count(event, reply.compute_us, num_bytes)
        self.answered.append(Answered(call, event))
        return True

    def _count(self, event: Replied, compute_us: int, num_bytes: int) -> None:
        self.unanswered.remove(event.attempt_id)
        self.compute_us[event.node] = compute_us
        self.bytes_down += num_bytes

    def rest(self) -> tuple[Fanout, tuple[int, ...]]:
        """Return the calls without an answer as a fan-out of their own, and their nodes."""
        left = [
            (call, node)
            for call, node in zip(self.calls, self.lead.nodes, strict=True)
            if call.call_id in self.unanswered
        ]
        made = Fanout([call for call, _ in left], self.sums)
        made.bytes_up, made.bytes_down = self.bytes_up, self.bytes_down
        made.compute_us, made.fault = self.compute_us, self.fault
        self.adopted = made
        return made, tuple(node for _, node in left)
