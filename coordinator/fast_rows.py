"""Fan-outs of a single row that run ahead of the dispatch core, on the transport `fast`.

Whoever starts one leads until it has its replies, or until it is *adopted*: made a fan-out like any
other, because its time is over, its node is lost, another fan-out starts, or a node says anything
but a reply. The core and the lanes are told of those that went well several at a time, before
anything else happens.
"""

import socket
import time

import numpy as np

from coordinator.call_maker import CallMaker
from coordinator.calls_in_flight import Asked, NodeNews, closed
from coordinator.dispatch_events import Answered, Lane
from coordinator.fast_lane import FastLane
from coordinator.fast_wires import IDLE_TICK_S, FastWires
from coordinator.node_client import Patience
from coordinator.node_health import NodeHealth
from coordinator.node_keeper import NodeKeeper
from coordinator.route import Route
from coordinator.row_fanout import Exchanged, RowFanout, Standing
from coordinator.run_ahead import MAX_UNTOLD, Follower
from shoal import errors, wire
from shoal.ops.fanout import RowReport, RowWires, Stop
from shoal.ops.frames import ReplyView
from shoal.router import RoutingPlan

SPARE_ROOM_BYTES = 1024  # of a lane's buffer, for what a node sends before a reply
MAX_UNTOLD_S = 0.02  # less than any silence that means something


class FastRows(FastWires):
    """See the module."""

    def __init__(self, keeper: NodeKeeper, patience: Patience) -> None:
        super().__init__(keeper, patience)
        self._lent: Standing | None = None  # whose lanes native code uses, without the lock
        self._runner: object | None = None  # what runs ahead there
        self._row: RowFanout | None = None  # whose thread has come back with news
        self._is_adoption_due = False
        self._unburied: list[socket.socket] = []  # closed while they were read from
        self._standing: Standing | None = None  # what may be sent to without asking again
        self._untold: list[RowFanout] = []  # done, and nobody was told of them yet

    def run_row(
        self, asked: Asked, plan: RoutingPlan, route: Route, maker: CallMaker
    ) -> RowFanout | None:
        """Do a fan-out of one row, if it may run ahead; else do nothing and return None.

        Raises what `wait` does.
        """
        num_ids = plan.experts.shape[1]  # at most a call for each expert
        ticket, row = object(), None
        reports: list[RowReport] = []
        try:
            begun = self._begin(ticket, asked.layer, num_ids, asked.rows.dim, route, maker)
            if begun is None:
                return None
            standing, now_s = begun
            first_id = self.next_call_id(num_ids)
            sums = np.zeros((1, asked.rows.dim), np.int64)
            row = RowFanout(asked, plan, route, maker, standing, first_id, sums, now_s)
            self._runner = row
            row.run(reports)
            return self._see_through(row, reports)
        except BaseException:  # a signal, perhaps: anywhere
            with self._lock:
                if self._runner is ticket:
                    self._let_go()
                elif row is not None:
                    self._take_back(row, reports)
            raise

    def _see_through(self, row: RowFanout, reports: list[RowReport]) -> RowFanout | None:
        """Go on with a row that native code came back from, until it has ended.

        None: it was not sent. Raises what `wait` does; then it is to be taken back.
        """
        while self._took(row, reports):
            row.collect(time.monotonic(), reports)
        if row.adopted is not None:
            self.wait(row.adopted)
        if row.fault is not None:
            raise row.fault
        return row if row.sent else None

    def health(self, node: int) -> NodeHealth | None:
        """Return what is known of a node's speed, all its replies included."""
        with self._lock:
            self._tell()
            return super().health(node)

    def _begin(
        self,
        runner: object,
        layer: int,
        num_experts: int,
        dim: int,
        route: Route,
        maker: CallMaker,
    ) -> tuple[Standing, float] | None:
        """Lead from now on, with what may be sent to, if rows may run ahead. Returns the time."""
        with self._lock:
            if self._is_led or not self._is_open:
                return None
            now_s = time.monotonic()
            standing = self._standing
            if standing is None or standing.route is not route:
                standing = self._stand(layer, num_experts, dim, route, maker, now_s)
                if standing is None:
                    return None
            self._lent, self._runner, self._is_led = standing, runner, True
        return standing, now_s

    def _took(self, row: RowFanout, reports: list[RowReport]) -> bool:
        with self._lock:
            return self._take_report(row, reports)

    # Under the lock.

    def _take_back(self, row: RowFanout, reports: list[RowReport]) -> None:
        """Nobody waits for it any more. Also of a row that has ended."""
        self._take_report(row, reports)
        if self._runner is row:
            self._catch_up()
            self._lent, self._row = None, row
            self._adopt(row)
        if row.adopted is not None:
            self._in_flight.abandon(row.adopted)
            self._flush_dirty()

    def _stand(
        self, layer: int, num_experts: int, dim: int, route: Route, maker: CallMaker, now_s: float
    ) -> Standing | None:
        """Ask the core, and the lanes, where rows may be sent; None: nowhere now."""
        if not (wire.IS_WIRE_ORDER and maker.sends_rows_interactively):
            return None
        work = maker.work(layer, num_experts, maker.max_row_bytes)
        found = self._in_flight.followers(route.candidates, work, now_s)
        followers: dict[int, Follower] = {}
        lane_of_slot: list[int] = []
        for follower in found or ():
            if follower is None or not self._may_bypass(follower.node, maker.max_row_bytes):
                lane_of_slot.append(-1)
                continue
            known = followers.setdefault(follower.node, follower)
            if known.is_alone:  # of two that share a node the one with a choice is impatient
                followers[follower.node] = follower
            lane_of_slot.append(list(followers).index(follower.node))
        if not followers:
            return None
        lanes = [self._lanes[node, Lane.INTERACTIVE] for node in followers]
        mine = {lane.fileno() for lane in lanes}
        wires = RowWires(
            [(lane.fileno(), lane.stream_id) for lane in lanes],
            lane_of_slot,
            [fd for fd in self._lane_of_fd if fd not in mine] + [self._woken.fileno()],
            wire.ENVELOPE_BYTES + wire.reply_row_bytes(dim) + SPARE_ROOM_BYTES,
        )
        patience_s = min(follower.patience_s(0.0) for follower in followers.values())
        self._standing = Standing(route, list(followers.values()), lanes, wires, patience_s)
        return self._standing

    def _may_bypass(self, node: int, num_bytes: int) -> bool:
        lane = self._lanes.get((node, Lane.INTERACTIVE))
        # A run of layers may begin while as many fan-outs as that are untold, all but one.
        return lane is not None and lane.may_bypass(num_bytes, 2 * MAX_UNTOLD)

    def _take_report(self, row: RowFanout, reports: list[RowReport]) -> bool:
        """Go on from what came of the row that runs ahead; True: collect on, it still does."""
        if self._runner is not row:
            return False
        self._lent = None
        if self._unburied:
            self._bury()
        if reports and not row.sent and row.is_done_by(reports[0]):
            # All as hoped: who waits gets the sums, the core is told when it does not matter.
            reports.clear()
            self._untold.append(row)
            self._let_go()
            self._tell_in_time()
            return False
        self._catch_up()
        num_ended = self._in_flight.num_ended
        self._row = row
        try:
            while reports:
                self._take_news(row, reports.pop(0))
            if self._runner is row and not row.unanswered:
                self._adopt(row)
        finally:
            self._row = None
        if self._num_following and num_ended != self._in_flight.num_ended:
            self._led.notify_all()
        if self._runner is not row:
            return False
        self._lent = row.standing
        return True

    def _tell_in_time(self) -> None:
        untold = self._untold
        is_due = len(untold) >= MAX_UNTOLD or untold[-1].sent_s - untold[0].sent_s > MAX_UNTOLD_S
        if is_due:
            self._catch_up()

    def _take_news(self, row: RowFanout, report: RowReport) -> None:
        sent, why, lane, error, replies, unread = report
        standing = row.standing
        if sent:
            row.was_sent(sent)
            row.count_sent()
        for reply in replies:
            row.take(reply)
        now_s = time.monotonic()
        for index, data in unread:
            self._take_unread(row, index, data, now_s)
        if why == Stop.BROKEN:
            self._lose_lane(standing, lane, error)
        for lane, _, _, _, error, _ in sent:
            if error:
                self._lose_lane(standing, lane, error)
            elif standing.lanes[lane].has_unwritten:
                self._dirty.add((standing.followers[lane].node, Lane.INTERACTIVE))
        if row.unanswered and (
            self._is_adoption_due or why not in (Stop.TIME, Stop.UNREAD) or row.left_s(now_s) <= 0.0
        ):
            self._adopt_row()  # whoever leads then reads the others, too
        for follower in standing.followers:
            self._note_output((follower.node, Lane.INTERACTIVE))
        self._flush_dirty()

    def _lose_lane(self, standing: Standing, index: int, error: int) -> None:
        node, lane = standing.followers[index].node, standing.lanes[index]
        if lane is self._lanes.get((node, Lane.INTERACTIVE)):
            self._lose(node, lane.ended(error))

    def _take_unread(self, row: RowFanout, index: int, data: bytes, now_s: float) -> None:
        node, lane = row.standing.followers[index].node, row.standing.lanes[index]
        if lane is self._lanes.get((node, Lane.INTERACTIVE)):
            self._feed(node, Lane.INTERACTIVE, lane.take(memoryview(data), now_s), now_s)

    def _catch_up(self) -> None:
        """Tell the core, and the lanes, of what they have not been told yet.

        Anything may happen then, and rows ask again.
        """
        self._standing = None
        self._tell()

    def _tell(self) -> None:
        if not self._untold:
            return
        exchanged: dict[FastLane, Exchanged] = {}
        answered: list[Answered] = []
        told, self._untold = self._untold, []
        for row in told:
            answered += row.settle(exchanged)
        for lane, sums in exchanged.items():
            counts = sums.num_messages, sums.received_bytes, sums.sent_bytes
            lane.exchanged_beside(*counts, sums.now_s)
            if self._lanes.get((sums.node, Lane.INTERACTIVE)) is lane:
                self._note_output((sums.node, Lane.INTERACTIVE))
        self._in_flight.ran_ahead(answered)
        self._flush_dirty()
        now_s = answered[-1].reply.now_s
        if now_s - self._kept_alive_s >= IDLE_TICK_S:
            self._tick(now_s)

    def _adopt_row(self) -> None:
        """Make the row that runs ahead, if there is one, a fan-out like any other.

        At once if its own thread asks; else soon: what it has collected is not known yet.
        """
        self._catch_up()
        if self._row is not None:
            self._adopt(self._row)
        elif self._lent is not None:
            self._is_adoption_due = True
            self._wake_leader()

    def _adopt(self, row: RowFanout) -> None:
        """Tell the core all of a row; what has no answer yet is the core's from now on."""
        row.count_sent()
        self._in_flight.ran_ahead(row.answered)
        if row.unanswered:
            fanout, nodes = row.rest()
            if self._is_open:
                self._in_flight.adopt(fanout, nodes, row.sent_s, time.monotonic())
            else:
                fanout.end(closed())
        self._let_go()

    def _may_write(self, key: tuple[int, Lane]) -> bool:
        """Whether nobody else writes to a lane, as native code does for a row."""
        return self._lent is None or self._lanes.get(key) not in self._lent.lanes

    def _let_go(self) -> None:
        """Run nothing ahead any more, and leave the lead to others."""
        self._runner = self._lent = self._row = None
        self._is_adoption_due = self._is_led = False
        self._let_others_lead()

    def _let_others_lead(self) -> None:
        if self._num_following:
            self._led.notify_all()
        if self._dirty:  # what had to wait for the row
            self._flush_dirty()
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
        standing = self._lent if self._row is None else self._row.standing
        if standing is not None and any(f.node == node for f in standing.followers):
            self._adopt_row()
        super()._close_lanes(node, why)

    def _close_lane(self, lane: FastLane) -> None:
        is_read = self._lent is not None and lane in self._lent.lanes
        closing = lane.close(is_read=is_read)
        if closing is not None:
            self._unburied.append(closing)

    def _bury(self) -> None:
        while self._unburied:
            self._unburied.pop().close()
