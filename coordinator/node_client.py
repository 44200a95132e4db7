"""The transport `grpcio`: frames travel on grpc.aio streams.

All gRPC and the calls in flight live on one event-loop thread (`grpc_loop`). The forward thread
hands a whole fan-out over with one `submit`, and sleeps on its `Fanout` until it is ended.
"""

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from coordinator.call_maker import CallMaker
from coordinator.calls_in_flight import (
    Asked,
    CallsInFlight,
    Fanout,
    Hint,
    OutgoingCall,
    closed,
)
from coordinator.dispatch_events import Lane, NodeAbsent, NodeLost, NodeOpened, NodeRetired
from coordinator.grpc_loop import grpc_loop
from coordinator.handshake import NodeFacts
from coordinator.known_nodes import KnownNodes
from coordinator.loop_rows import LoopRows
from coordinator.node_health import NodeHealth
from coordinator.node_keeper import NodeKeeper, OpenedLanes, Terms
from coordinator.node_link import KEEPALIVE, Greeting, Keepalive, LaneLink, NodeLink
from coordinator.route import Route
from coordinator.row_fanout import LayersEnd, RowFanout
from coordinator.tls import Trust
from shoal import errors, ops
from shoal.router import RoutingPlan
from shoal.shard_map import Endpoint

TICK_S = 0.005  # how late it may be noticed that a call is: a tenth of the shortest silence
CLOSE_TIMEOUT_S = 2.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Patience:
    """call_timeout_s: for one node to answer a call. shard_wait_s: for a node to be there.

    keepalive: for a sign of life of a node that nobody calls.
    """

    call_timeout_s: float
    shard_wait_s: float
    keepalive: Keepalive = KEEPALIVE


class ExpertClient(Protocol):
    """Calls to nodes, however they travel. A node is a number that stands for one endpoint."""

    def meet(self, endpoints: Sequence[Endpoint], terms: Terms) -> list[int]:
        """Describe, check and open the nodes that are new, all at once; return all numbers.

        Nodes are met again whenever they are lost, on the latest terms.

        Raises:
            NodeError: not enough nodes for every range. What was before still holds.
        """
        ...

    def retire(self, nodes: Sequence[int]) -> None:
        """Call these nodes no more, and let go of each once it has answered."""
        ...

    def facts(self, node: int) -> NodeFacts | None:
        """Return what a node says of itself; None: it is lost."""
        ...

    def health(self, node: int) -> NodeHealth | None:
        """Return what is known of a node's speed; None: it was never there."""
        ...

    def name(self, node: int) -> str:
        """Return a node's endpoint."""
        ...

    def next_call_id(self, count: int = 1) -> int:
        """Return the first of as many ids in a row that no other call of this client has."""
        ...

    def wants_hints(self, node: int) -> bool:
        """Return whether a node reads experts ahead."""
        ...

    def hint(self, hints: Sequence[Hint]) -> None:
        """Send each hint to the node that its call would go to. Any thread; nothing comes of it."""
        ...

    def submit(self, calls: Sequence[OutgoingCall], sums: NDArray[np.int64]) -> Fanout:
        """Send a fan-out's calls. Any thread; the Fanout ends, whatever nodes do.

        Args: sums: [T, D] of the layer, what replies are added to as they come.
        """
        ...

    def run_row(
        self, asked: Asked, plan: RoutingPlan, route: Route, maker: CallMaker
    ) -> RowFanout | None:
        """Do a fan-out of one row the short way, if there is one now; None: `submit` it.

        Returns once its sums are whole; raises whatever else ended it.
        """
        ...

    def run_layers(
        self, first: int, run: ops.LayerRun, route: Route, maker: CallMaker
    ) -> LayersEnd | None:
        """Run layers of a single row, from `first` on, the short way; None: there is none now."""
        ...

    def wait(self, fanout: Fanout) -> None:
        """Return once every reply is there; raises whatever else ended it."""
        ...

    def abandon(self, fanout: Fanout) -> None:
        """Nobody waits for this fan-out any more: take its calls back."""
        ...

    def close(self) -> None:
        """End all streams and connections. A Fanout in flight fails. Safe to call again."""
        ...


class NodeClient(KnownNodes):
    """Calls to nodes over grpc.aio; see ExpertClient.

    Args:
        greeting: who this coordinator is, as Open tells it.
        notify: told what is waited for, lost or back, in a sentence.
        trust: what nodes with TLS are met with; None: there are none.
    """

    def __init__(
        self,
        greeting: Greeting,
        patience: Patience,
        notify: Callable[[str], None],
        trust: Trust | None = None,
    ) -> None:
        self._greeting = greeting
        self._loop = grpc_loop()
        keeper = NodeKeeper(self, patience.keepalive, notify, trust)
        in_flight = CallsInFlight(
            keeper.names, patience.call_timeout_s, patience.shard_wait_s, self
        )
        super().__init__(keeper, in_flight)
        self._rows = LoopRows(in_flight, keeper.names, self)
        self._lanes: dict[int, dict[Lane, LaneLink]] = {}  # of open nodes
        self._released: dict[int, asyncio.Event] = {}
        self._is_ticking = False
        self._running = asyncio.run_coroutine_threadsafe(self._keeper.run(), self._loop)
        # Over: closed, or dead of a bug that `close` will raise.
        self._running.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._end_all))

    def meet(self, endpoints: Sequence[Endpoint], terms: Terms) -> list[int]:
        """Meet nodes (see ExpertClient)."""
        return on_grpc_loop(self._keeper.meet(endpoints, terms))

    def retire(self, nodes: Sequence[int]) -> None:
        """Call these nodes no more (see ExpertClient)."""
        self._loop.call_soon_threadsafe(self._retire, nodes)

    def run_row(self, asked: Asked, plan: RoutingPlan, route: Route, maker: CallMaker) -> None:
        """There is no other way than `submit`, which finds out itself what may run ahead."""

    def run_layers(self, first: int, run: ops.LayerRun, route: Route, maker: CallMaker) -> None:
        """There is no short way through grpc.aio."""

    def submit(self, calls: Sequence[OutgoingCall], sums: NDArray[np.int64]) -> Fanout:
        """Send a fan-out's calls (see ExpertClient)."""
        fanout = Fanout(calls, sums)
        self._loop.call_soon_threadsafe(self._start, fanout)
        return fanout

    def hint(self, hints: Sequence[Hint]) -> None:
        """Send hints (see ExpertClient)."""
        self._loop.call_soon_threadsafe(self._hint, hints)

    def wait(self, fanout: Fanout) -> None:
        """Wait for the end of a fan-out (see ExpertClient)."""
        fanout.wait()

    def abandon(self, fanout: Fanout) -> None:
        """Take a fan-out's calls back (see ExpertClient)."""
        self._loop.call_soon_threadsafe(self._abandon, fanout)

    def close(self) -> None:
        """End all streams (see ExpertClient)."""
        self._loop.call_soon_threadsafe(self._keeper.close)
        concurrent.futures.wait([self._running], CLOSE_TIMEOUT_S)
        if self._running.done():
            self._running.result()

    # Everything below runs on the loop's thread.

    async def open_lanes(self, node: int, link: NodeLink, first_epoch: int) -> OpenedLanes:
        """Open both lanes (see LaneOpener)."""
        credit_bytes, rtt_s, wants_hints = 0, 0.0, False
        for epoch, lane in enumerate(link.lanes.values(), first_epoch):
            begun_s = time.monotonic()
            opened = await lane.open(self._greeting, epoch)
            # The bulk channel connects first; the interactive one has, for Describe.
            rtt_s = rtt_s or time.monotonic() - begun_s
            credit_bytes, wants_hints = opened.credit_bytes, opened.wants_hints
        self._lanes[node] = link.lanes
        self._released[node] = asyncio.Event()
        return OpenedLanes(credit_bytes, rtt_s, wants_hints)

    def opened(self, event: NodeOpened) -> None:
        """Call a node from now on (see LaneOpener)."""
        self._in_flight.on(event)

    async def serve(self, node: int, link: NodeLink) -> errors.NodeError | None:
        """Carry a node's frames (see LaneOpener)."""
        why: errors.NodeError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                chores = [lane.write_loop() for lane in link.lanes.values()]
                chores += [self._read_loop(node, lane) for lane in link.lanes.values()]
                tasks = [group.create_task(chore) for chore in chores]
                await self._released[node].wait()
                for task in tasks:
                    task.cancel()
        except* errors.NodeError as group_of_errors:
            error = group_of_errors.exceptions[0]
            assert isinstance(error, errors.NodeError)
            why = error
        finally:
            self._lanes.pop(node, None)
        return why

    def absent(self, event: NodeAbsent) -> None:
        """Hear that a node cannot be met (see LaneOpener)."""
        self._in_flight.on(event)

    def send(self, node: int, lane: Lane, frame: bytes) -> None:
        """Queue a frame (see Wires)."""
        lanes = self._lanes.get(node)
        if lanes is not None:
            lanes[lane].send(frame)

    def close_node(self, node: int, silent_s: float) -> None:
        """Break off a node that is silent (see Wires)."""
        for lane in self._lanes.get(node, {}).values():
            lane.break_off(
                errors.NodeUnreachable(
                    f"node {lane.node} gave no sign of life for {silent_s:.1f} s"
                )
            )

    def release_node(self, node: int) -> None:
        """Let go of a node for good (see Wires)."""
        if node in self._released:
            self._released[node].set()

    async def _read_loop(self, node: int, lane: LaneLink) -> None:
        try:
            while True:
                frame, num_bytes = await lane.read()
                self._rows.on_frame(node, frame, num_bytes, time.monotonic())
        except errors.NodeError as error:
            broke_protocol = isinstance(error, errors.MalformedMessage)
            now_s = time.monotonic()
            self._rows.adopt(now_s)
            self._in_flight.on(NodeLost(node, error, broke_protocol, now_s))
            raise

    def _retire(self, nodes: Sequence[int]) -> None:
        self._keeper.retire(nodes)
        self._rows.adopt(time.monotonic())
        for node in nodes:
            self._in_flight.on(NodeRetired(node, retired(self._keeper.names[node])))
        self._tick_later()

    def _start(self, fanout: Fanout) -> None:
        if self._running.done():
            fanout.end(closed())
            return
        self._rows.start(fanout, time.monotonic())
        self._tick_later()

    def _abandon(self, fanout: Fanout) -> None:
        self._rows.adopt(time.monotonic())
        self._in_flight.abandon(fanout)

    def _end_all(self) -> None:
        self._rows.adopt(time.monotonic())
        self._in_flight.end_all()

    def _hint(self, hints: Sequence[Hint]) -> None:
        self._in_flight.hint(hints, self._keeper.wants_hints, time.monotonic())

    def _tick_later(self) -> None:
        if not self._is_ticking:
            self._is_ticking = True
            self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._is_ticking = False
        if not self._running.done():
            self._rows.tick(time.monotonic())
            if not self._rows.is_idle:
                self._tick_later()


def retired(name: str) -> errors.NodeUnreachable:
    """Return why a node that the shard map does not name any more takes no call."""
    return errors.NodeUnreachable(f"node {name} is not in the shard map any more")


def on_grpc_loop(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine on the gRPC loop and return what it does. Not from that loop's thread."""
    waiting = asyncio.run_coroutine_threadsafe(work, grpc_loop())
    try:
        return waiting.result()
    except KeyboardInterrupt:
        waiting.cancel()
        raise
