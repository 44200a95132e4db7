"""Layers in a row whose fan-outs run ahead, on the transport `fast`: one native call for many.

As long as every fan-out goes well, nothing but native code runs between two layers. The first that
does not is seen through as any row that runs ahead, and ends the run.
"""

import time
from dataclasses import dataclass

import numpy as np

from coordinator.call_maker import CallMaker
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
        begun = self._begin(first, num_ids, run.hidden.shape[1], route, maker)
        if begun is None:
            return None
        standing, began_s = begun
        first_id = self.next_call_id(num_ids * len(layers))
        ahead = _Ahead(standing, route, maker, first, first_id, num_ids, began_s)
        self._runner = ahead
        reports: list[tuple[float, RowReport]] = []
        try:
            how = maker.run_of(standing.wires, first_id, num_ids, standing.patience_s, MAX_RUN_S)
            experts = [maker.experts(layer, route) for layer in layers]
            end = run.on_nodes(experts, how, reports)
            rows = [ahead.row(run, i, sent_after_s) for i, (sent_after_s, _) in enumerate(reports)]
            if end.left is not None:
                rows[-1].asked.rows, rows[-1].plan = end.left.rows, end.left.plan
                rows[-1].sums = end.ran.sums.values
        except BaseException:  # a signal: nobody waits for what is not over
            with self._lock:
                self._take_layers_back(ahead, run, reports)
            raise
        with self._lock:
            self._take_layers(rows, [report for _, report in reports], end.left is not None)
        if end.left is None:
            return LayersEnd(end.ran, rows)
        last = rows.pop()
        try:
            row = self._see_through(last, [reports[-1][1]])
        except errors.ShoalError as error:
            return LayersEnd(end.ran, rows, end.left, None, error)
        return LayersEnd(end.ran, rows, end.left, row)

    # Under the lock.

    def _take_layers(
        self, rows: list[RowFanout], reports: list[RowReport], is_last_open: bool
    ) -> None:
        """Take what went well; an open one is still lent its lanes, until it is seen through."""
        over = rows[:-1] if is_last_open else rows
        for row, report in zip(over, reports, strict=False):
            is_done = row.is_done_by(report)
            assert is_done, "a run goes on after what went well alone"
        self._untold += over
        if is_last_open:
            self._runner = rows[-1]
            return
        self._lent = None
        if self._unburied:
            self._bury()
        self._let_go()
        self._tell_in_time()

    def _take_layers_back(
        self, ahead: "_Ahead", run: ops.LayerRun, reports: list[tuple[float, RowReport]]
    ) -> None:
        if self._runner is not ahead:
            return
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
        self._let_go()
        self._catch_up()


@dataclass(slots=True)
class _Ahead:
    """A run of layers on its way. first, first_id: of its first layer."""

    standing: Standing
    route: Route
    maker: CallMaker
    first: int
    first_id: int
    num_ids: int
    began_s: float

    def row(self, run: ops.LayerRun, index: int, sent_after_s: float) -> RowFanout:
        """Return the fan-out of a layer, with a blank row."""
        blank = run.layers[index].blank_row(run.hidden.shape[1])
        asked = self.maker.asked(self.first + index, blank)
        first_id = self.first_id + index * self.num_ids
        sums = np.empty((0, 0), np.int64)
        sent_s = self.began_s + sent_after_s
        made = RowFanout(asked, None, self.route, self.maker, self.standing, first_id, sums, sent_s)
        made.began_s = sent_s
        return made
