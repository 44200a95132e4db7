"""The transport `fast`: Execute streams on plain sockets, in our own framing of gRPC's wire.

`fast_wires` moves frames, `fast_rows` is the short way of a single row's fan-out, `fast_layers` of
many. Describe goes
through gRPC, each time that a node is met.
"""

import asyncio
import concurrent.futures
import select
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.calls_in_flight import Fanout, Hint, OutgoingCall, closed
from coordinator.dispatch_events import Lane, NodeAbsent, NodeOpened, NodeRetired
from coordinator.fast_lane import FastLane
from coordinator.fast_layers import FastLayers
from coordinator.node_client import Patience, on_grpc_loop, retired
from coordinator.node_keeper import NodeKeeper, OpenedLanes, Terms
from coordinator.node_link import Greeting, NodeLink
from shoal import errors
from shoal.shard_map import Endpoint

CLOSE_TIMEOUT_S = 2.0


class FastClient(FastLayers):
    """Calls to nodes on our own framing; see ExpertClient. Arguments as NodeClient's."""

    def __init__(
        self, greeting: Greeting, patience: Patience, notify: Callable[[str], None]
    ) -> None:
        self._greeting = greeting
        self._keepalive = patience.keepalive
        super().__init__(NodeKeeper(self, patience.keepalive, notify), patience)
        self._running = asyncio.run_coroutine_threadsafe(self._keeper.run(), self._loop)
        self._thread = threading.Thread(target=self._serve, name="shoal-fast", daemon=True)
        self._thread.start()
        self._running.add_done_callback(lambda _: self._stop())

    def meet(self, endpoints: Sequence[Endpoint], terms: Terms) -> list[int]:
        """Meet nodes (see ExpertClient)."""
        return on_grpc_loop(self._keeper.meet(endpoints, terms))

    def retire(self, nodes: Sequence[int]) -> None:
        """Call these nodes no more (see ExpertClient)."""
        self._loop.call_soon_threadsafe(self._keeper.retire, nodes)
        with self._lock:
            self._catch_up()
            for node in nodes:
                self._in_flight.on(NodeRetired(node, retired(self._keeper.names[node])))
            self._flush_dirty()
            self._ticked_s = 0.0  # so that what is idle is let go of at once

    def submit(self, calls: Sequence[OutgoingCall], sums: NDArray[np.int64]) -> Fanout:
        """Send a fan-out's calls (see ExpertClient)."""
        fanout = Fanout(calls, sums)
        with self._lock:
            if not self._is_open:
                fanout.end(closed())
                return fanout
            self._adopt_row()
            self._in_flight.start(fanout, time.monotonic())
            self._flush_dirty()
            self._find_a_leader()
        return fanout

    def hint(self, hints: Sequence[Hint]) -> None:
        """Send hints (see ExpertClient)."""
        with self._lock:
            self._catch_up()
            self._in_flight.hint(hints, self._keeper.wants_hints, time.monotonic())
            self._flush_dirty()

    def abandon(self, fanout: Fanout) -> None:
        """Take a fan-out's calls back (see ExpertClient)."""
        with self._lock:
            self._catch_up()
            self._in_flight.abandon(fanout)
            self._flush_dirty()

    def close(self) -> None:
        """End all streams (see ExpertClient)."""
        self._stop()
        self._loop.call_soon_threadsafe(self._keeper.close)
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)
        with self._lock:
            for lane in self._lanes.values():
                self._close_lane(lane)
            self._lanes.clear()
            self._lane_of_fd.clear()
            if not self._is_led:
                self._waker.close()
                self._woken.close()
        concurrent.futures.wait([self._running], CLOSE_TIMEOUT_S)
        if self._running.done():
            self._running.result()

    def _stop(self) -> None:
        """Fail what is in flight; nothing new is sent. Also when the keeper ends of a bug."""
        with self._lock:
            self._is_open = False
            self._adopt_row()
            self._in_flight.end_all()
            self._wake_leader()
            self._led.notify_all()
            self._idle.notify_all()

    # On the gRPC loop, where nodes are met.

    async def open_lanes(self, node: int, link: NodeLink, first_epoch: int) -> OpenedLanes:
        """Open both lanes (see LaneOpener)."""
        await link.close()  # it was for Describe
        endpoint, keepalive = self._keeper.endpoints[node], self._keepalive
        lanes = {lane: FastLane(endpoint, lane, keepalive) for lane in Lane}
        credit_bytes, rtt_s, wants_hints = 0, 0.0, False
        try:
            for epoch, lane in enumerate(lanes.values(), first_epoch):
                opened = await asyncio.to_thread(lane.open, self._greeting, epoch)
                rtt_s = lane.open_s
                credit_bytes, wants_hints = opened.credit_bytes, opened.wants_hints
        except BaseException:
            for lane in lanes.values():
                lane.close()
            raise
        with self._lock:
            for name, lane in lanes.items():
                key = (node, name)
                self._lanes[key] = lane
                self._lane_of_fd[lane.fileno()] = key
                self._poll.register(lane.fileno(), select.POLLIN)
        return OpenedLanes(credit_bytes, rtt_s, wants_hints)

    def opened(self, event: NodeOpened) -> None:
        """Call a node from now on (see LaneOpener)."""
        with self._lock:
            self._catch_up()
            self._ends[event.node] = self._loop.create_future()
            self._in_flight.on(event)
            self._flush_dirty()
            self._wake_leader()  # whose poll does not know the new sockets yet

    async def serve(self, node: int, link: NodeLink) -> errors.NodeError | None:
        """Wait for a node's end: whoever leads carries its frames (see LaneOpener)."""
        return await self._ends[node]

    def absent(self, event: NodeAbsent) -> None:
        """Hear that a node cannot be met (see LaneOpener)."""
        with self._lock:
            self._catch_up()
            self._in_flight.on(event)
            self._flush_dirty()
            self._wake_leader()
