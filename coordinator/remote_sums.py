"""Sums of a layer that nodes were asked for: what the forward pass waits on (see PendingSums)."""

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coordinator.call_split import Part
from coordinator.calls_in_flight import Fanout
from shoal import errors
from shoal.router import RoutingPlan
from shoal.rows import Rows

if TYPE_CHECKING:
    from coordinator.remote_dispatch import RemoteDispatch
    from coordinator.route import Route


class RemoteSums:
    """Of rows whose fan-out the dispatch core looks after, and perhaps of experts here."""

    def __init__(
        self,
        dispatch: "RemoteDispatch",
        route: "Route",
        asked: tuple[int, Rows, RoutingPlan],
        local: Part | None,
        fanout: Fanout | None,
        started_s: float,
    ) -> None:
        self._dispatch, self._route, self._asked = dispatch, route, asked
        self._local, self._fanout, self._started_s = local, fanout, started_s

    def wait(self) -> NDArray[np.int64]:
        dispatch, fanout = self._dispatch, self._fanout
        layer, rows, _ = self._asked
        compute_s = 0.0
        try:
            sums: NDArray[np.int64] | None = None
            if self._local is not None:
                began_s = time.perf_counter()
                sums = dispatch.compute_local(layer, rows, self._local)
                compute_s = time.perf_counter() - began_s
            if fanout is not None:
                remote = dispatch.finish(fanout)
                if sums is None:
                    sums = remote
                else:
                    sums += remote  # integers: exact in any order
            assert sums is not None, "nobody was asked"
        except BaseException as error:
            if fanout is not None:
                dispatch.abandon(fanout)
            if isinstance(error, errors.NodeError) and dispatch.route is not self._route:
                # By a map that holds no more: the layer is asked for again, by the new one.
                return dispatch.start(*self._asked).wait()
            raise
        bytes_up = bytes_down = 0
        if fanout is not None:
            bytes_up, bytes_down = fanout.bytes_up, fanout.bytes_down
            compute_s = max(compute_s, max(fanout.compute_us.values()) * 1e-6)
        elapsed_s = time.perf_counter() - self._started_s
        dispatch.stats.record(elapsed_s, compute_s, bytes_up, bytes_down)
        return sums

    def abandon(self) -> None:
        if self._fanout is not None:
            self._dispatch.abandon(self._fanout)
