"""Fan-outs of a single row that run ahead of the dispatch core, on the transport `fast`.

Whoever starts one leads until it has its replies, or until it is *adopted*: made a fan-out like any
other, because its time is over, its node is lost, another fan-out starts, or a node says anything
but a reply.
"""

import socket
import time

import numpy as np
from numpy.typing import NDArray

from coordinator.call_split import RowSplit
from coordinator.calls_in_flight import Asked, NodeNews, OutgoingCall, closed
from coordinator.dispatch_events import Lane
from coordinator.fast_lane import FastLane
from coordinator.fast_wires import IDLE_TICK_S, FastWires
from coordinator.node_client import Patience
from coordinator.node_health import NodeHealth
from coordinator.node_keeper import NodeKeeper
from coordinator.row_fanout import News, RowFanout
from shoal import errors, wire
from shoal.ops.fanout import Stop
from shoal.ops.frames import ReplyView

SPARE_ROOM_BYTES = 1024  # of a lane's buffer, for what a node sends before a reply


class FastRows(FastWires):
    """See the module."""

    def __init__(self, keeper: NodeKeeper, patience: Patience) -> None:
        super().__init__(keeper, patience)
        self._row: RowFanout | None = None  # that runs ahead
        self._collecting: RowFanout | None = None  # whose replies are read without the lock
        self._is_adoption_due = False  # by whoever collects
        self._unburied: list[socket.socket] = []  # closed while they were read from
        self._row_buffer = np.empty(0, np.uint8)
        self._late: tuple[RowFanout, News] | None = None  # nobody was told of yet

    def start_row(
        self, asked: Asked, calls: list[OutgoingCall], split: RowSplit
    ) -> RowFanout | None:
        """Send a fan-out of one row, if it may run ahead; else do nothing and return None.

        Args: calls: one for each group of the split. To be waited for, or abandoned.
        """
        with self._lock:
            if not wire.IS_WIRE_ORDER or not self._is_open or self._is_led or self._row is not None:
                return None
            now_s = time.monotonic()
            lead = self._in_flight.run_ahead(calls, now_s)
            if lead is None:
                return None
            lanes = [self._lanes[node, Lane.INTERACTIVE] for node in lead.nodes]
            if not all(lane.may_bypass(calls[0].num_bytes) for lane in lanes):
                return None  # the first call is the largest
            row = RowFanout(
                asked,
                calls,
                lead,
                lanes,
                np.zeros((1, asked.rows.dim), np.int64),
                self._buffer_for(len(lanes), asked.rows.dim),
                now_s,
            )
            self._row, self._is_led = row, True
            try:
                self._send_row(row, split)
                self._catch_up()  # while nodes compute
            except BaseException:  # nobody will wait for it
                self._take_back(row)
                raise
        return row

    def wait_row(self, row: RowFanout) -> None:
        """Return once its sums are whole. Raises what `wait` does."""
        news: list[News] = []
        while row.unanswered and row.adopted is None:
            try:
                with self._lock:
                    if self._row is not row:
                        break  # adopted meanwhile
                    others = self._others(row)
                    self._collecting = row
                row.collect(others, news)
            finally:  # a signal may have raised, after replies were added
                with self._lock:
                    if self._collecting is row:  # else it was adopted before, and another may be
                        self._collecting = None
                        self._take_news(row, news)
        if row.adopted is not None:
            self.wait(row.adopted)
        elif row.fault is not None:
            raise row.fault

    def health(self, node: int) -> NodeHealth | None:
        """Return what is known of a node's speed, all its replies included."""
        with self._lock:
            self._catch_up()
            return super().health(node)

    def abandon_row(self, row: RowFanout) -> None:
        """Take its calls back (see `abandon`)."""
        with self._lock:
            self._take_back(row)

    # Under the lock.

    def _take_back(self, row: RowFanout) -> None:
        if self._row is row:
            self._adopt_row()
        if row.adopted is not None:
            self._in_flight.abandon(row.adopted)
            self._flush_dirty()

    def _buffer_for(self, num_lanes: int, dim: int) -> NDArray[np.uint8]:
        room = wire.ENVELOPE_BYTES + wire.reply_row_bytes(dim) + SPARE_ROOM_BYTES
        if self._row_buffer.size < num_lanes * room:
            self._row_buffer = np.empty(num_lanes * room, np.uint8)
        return self._row_buffer

    def _send_row(self, row: RowFanout, split: RowSplit) -> None:
        lane, error = row.send(split)
        for node, sent_on in zip(row.lead.nodes, row.lanes, strict=True):
            if sent_on.has_unwritten:
                self._dirty.add((node, Lane.INTERACTIVE))
        if lane >= 0:
            self._lose(row.lead.nodes[lane], row.lanes[lane].ended(error))
        elif self._dirty:
            self._adopt_row()
            self._flush_dirty()

    def _others(self, row: RowFanout) -> list[int]:
        mine = {lane.fileno() for lane in row.lanes}
        return [fd for fd in self._lane_of_fd if fd not in mine] + [self._woken.fileno()]

    def _take_news(self, row: RowFanout, news: list[News]) -> None:
        self._bury()
        if news and row.is_done_by(news[0]) and self._row is row:
            # All as hoped: who waits gets the sums, the core is told when it does not matter.
            self._late = row, news.pop()
            self._let_go()
            return
        num_ended = self._in_flight.num_ended
        while news:
            why, lane, error, replies, unread = news.pop()
            for reply in replies:
                row.take(reply)
            now_s = time.monotonic()
            for index, begin, end in unread:
                self._take_unread(row, index, row.buffer[begin:end], now_s)
            if why == Stop.BROKEN and row.lanes[lane] is self._lanes.get(
                (row.lead.nodes[lane], Lane.INTERACTIVE)
            ):
                self._lose(row.lead.nodes[lane], row.lanes[lane].ended(error))
            is_over = now_s >= row.lead.until_s or self._is_adoption_due
            if row.unanswered and (is_over or why == Stop.OTHERS):
                self._adopt_row()  # whoever leads then reads the others, too
            for node in row.lead.nodes:
                self._note_output((node, Lane.INTERACTIVE))
            self._flush_dirty()
        if self._row is row and not row.unanswered:
            self._finish_row(row)
        if self._num_following and num_ended != self._in_flight.num_ended:
            self._led.notify_all()

    def _take_unread(
        self, row: RowFanout, index: int, data: NDArray[np.uint8], now_s: float
    ) -> None:
        node, lane = row.lead.nodes[index], row.lanes[index]
        if lane is self._lanes.get((node, Lane.INTERACTIVE)):
            self._feed(node, Lane.INTERACTIVE, lane.take(data.data, now_s), now_s)

    def _finish_row(self, row: RowFanout) -> None:
        self._in_flight.ran_ahead(row.answered, row.sent_s)
        self._let_go()

    def _catch_up(self) -> None:
        """Tell the core, and the lanes, of what they have not been told yet."""
        if self._late is None:
            return
        (row, (_, _, _, replies, _)), self._late = self._late, None
        for reply in replies:
            row.take(reply)
        self._in_flight.ran_ahead(row.answered, row.sent_s)
        for node in row.lead.nodes:
            self._note_output((node, Lane.INTERACTIVE))
        self._flush_dirty()
        now_s = row.answered[-1].reply.now_s
        if now_s - self._kept_alive_s >= IDLE_TICK_S:
            self._tick(now_s)

    def _adopt_row(self) -> None:
        """Make the row that runs ahead, if there is one, a fan-out like any other."""
        self._catch_up()
        row = self._row
        if row is None:
            return
        if not row.unanswered:
            self._finish_row(row)
            return
        if self._collecting is not None:
            self._is_adoption_due = True  # what it has collected is not known yet
            self._wake_leader()
            return
        self._in_flight.ran_ahead(row.answered, row.sent_s)
        fanout, nodes = row.rest()
        if self._is_open:
            self._in_flight.adopt(fanout, nodes, row.sent_s, time.monotonic())
        else:
            fanout.end(closed())
        self._let_go()

    def _let_go(self) -> None:
        """Run nothing ahead any more, and leave the lead to others."""
        self._row, self._is_adoption_due, self._is_led = None, False, False
        if self._num_following:
            self._led.notify_all()
        self._find_a_leader()

    def _take_frame(self, node: int, frame: NodeNews, num_bytes: int, now_s: float) -> None:
        row = self._row
        if row is not None:
            if not isinstance(frame, ReplyView):
                self._adopt_row()
            elif row.takes(node, frame, num_bytes, now_s):
                return
        super()._take_frame(node, frame, num_bytes, now_s)

    def _close_lanes(self, node: int, why: errors.NodeError | None) -> None:
        if self._row is not None and node in self._row.lead.nodes:
            self._adopt_row()
        super()._close_lanes(node, why)

    def _close_lane(self, lane: FastLane) -> None:
        is_read = self._collecting is not None and lane in self._collecting.lanes
        closing = lane.close(is_read=is_read)
        if closing is not None:
            self._unburied.append(closing)

    def _bury(self) -> None:
        while self._unburied:
            self._unburied.pop().close()
