"""Layers in a row whose fan-outs run ahead, on the transport `fast`: one native call for many.

As long as every fan-out goes well, nothing but native code runs between two layers. The first that
does not is seen through as any row that runs ahead, and ends the run.
"""

import time
from dataclasses import dataclass

import numpy as np

from coordinator.call_maker import CallMaker
from coordinator.dispatch_events import Lane
from coordinator.fast_rows import FastRows
from coordinator.route import Route
from coordinator.row_fanout import LayersEnd, RowFanout, Standing
from coordinator.run_ahead import MAX_UNTOLD
from shoal import errors, ops
from shoal.ops.fanout import RowReport

# No layer begins later, so that a cancellation is seen: as many fan-outs as may be untold take less
# where nodes are near.
MAX_RUN_S = 0.06


class FastLayers(FastRows):
    """See the module."""

    def run_layers(
        self, first: int, run: ops.LayerRun, route: Route, maker: CallMaker
    ) -> LayersEnd | None:
        """Run layers of a single row, from `first` on, as far as all goes well and one beyond.

        None: nothing may run ahead now, and nothing was done.
        """
        layers = range(first, first + min(len(run.layers), MAX_UNTOLD))
        num_ids = max(run.layers[i].experts_per_row for i in range(len(layers)))
        dim = run.hidden.shape[1]
        ahead, last = _Ahead(route, maker, first, num_ids), None
        reports: list[tuple[float, RowReport]] = []
        last_reports: list[RowReport] = []
        try:
            begun = self._begin(ahead, first, num_ids, dim, route, maker)
            if begun is None:
                return None
            standing, ahead.began_s = begun
            ahead.standing = standing
            ahead.first_id = self.next_call_id(num_ids * len(layers))
            patience_s = standing.patience_s
            how = maker.run_of(standing.wires, ahead.first_id, num_ids, patience_s, MAX_RUN_S)
            experts = [maker.experts(layer, route) for layer in layers]
            end = run.on_nodes(experts, how, reports)
            rows = [ahead.row(run, i, sent_after_s) for i, (sent_after_s, _) in enumerate(reports)]
            if end.left is not None:
                last = rows.pop()
                last.asked.rows, last.plan = end.left.rows, end.left.plan
                last.sums = end.ran.sums.values
                last_reports.append(reports[-1][1])
            with self._lock:
                self._take_layers(rows, [report for _, report in reports], last)
            if last is None or end.left is None:
                return LayersEnd(end.ran, rows)
            try:
                row = self._see_through(last, last_reports)
            except errors.ShoalError as error:
                return LayersEnd(end.ran, rows, end.left, None, error)
            return LayersEnd(end.ran, rows, end.left, row)
        except BaseException:  # a signal, anywhere: nobody waits for what is not over
            with self._lock:
                if self._runner is ahead:
                    self._take_layers_back(ahead, run, reports)
                elif last is not None:
                    self._take_back(last, last_reports)
            raise

    # Under the lock.

    def _take_layers(
        self, over: list[RowFanout], reports: list[RowReport], last: RowFanout | None
    ) -> None:
        """Take what went well; to an open last one the lanes stay lent, until it is seen through.

        A signal finds all of the former or all of the latter state: no call is made between.
        """
        for row, report in zip(over, reports, strict=False):
            is_done = row.is_done_by(report)
            assert is_done, "a run goes on after what went well alone"
        if last is not None:
            self._untold += over
            self._runner = last
            return
        if self._unburied:
            self._bury()
        self._untold += over
        self._runner = self._lent = self._row = None
        self._is_adoption_due = self._is_led = False
        self._let_others_lead()
        if over:
            self._tell_in_time()

    def _take_layers_back(
        self, ahead: "_Ahead", run: ops.LayerRun, reports: list[tuple[float, RowReport]]
    ) -> None:
        self._lent = None
        self._bury()
        self._catch_up()
        for i, (sent_after_s, report) in enumerate(reports):
            row = ahead.row(run, i, sent_after_s)
            if row.is_done_by(report):
                self._untold.append(row)
            else:  # late answers are dropped: the core never heard of it
                row.was_sent(report[0])
                row.count_sent()
                for reply in report[4]:
                    row.take(reply)
                now_s = time.monotonic()
                for index, data in report[5]:
                    self._take_unread(row, index, data, now_s)
                self._in_flight.ran_ahead(row.answered)
                for lane, *_ in row.sent:
                    node = row.standing.followers[lane].node
                    if row.standing.lanes[lane].has_unwritten:
                        self._dirty.add((node, Lane.INTERACTIVE))
        self._let_go()
        self._catch_up()


@dataclass(slots=True)
class _Ahead:
    """A run of layers on its way. first, first_id: of its first layer; num_ids: of each."""

    route: Route
    maker: CallMaker
    first: int
    num_ids: int
    first_id: int = 0
    began_s: float = 0.0
    standing: Standing | None = None

    def row(self, run: ops.LayerRun, index: int, sent_after_s: float) -> RowFanout:
        """Return the fan-out of a layer, with a blank row."""
        assert self.standing is not None
        blank = run.layers[index].blank_row(run.hidden.shape[1])
        asked = self.maker.asked(self.first + index, blank)
        first_id = self.first_id + index * self.num_ids
        sums = np.empty((0, 0), np.int64)
        sent_s = self.began_s + sent_after_s
        made = RowFanout(asked, None, self.route, self.maker, self.standing, first_id, sums, sent_s)
        made.began_s = sent_s
        return made
