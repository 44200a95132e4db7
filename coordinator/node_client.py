"""The transport `grpcio`: frames travel on grpc.aio streams.

All gRPC and the calls in flight live on one event-loop thread (`grpc_loop`). The forward thread
encodes its calls, hands a whole fan-out over with one `submit`, and sleeps on its `Fanout` until it
is ended; it decodes the replies itself. So the loop's thread does little more than move bytes.
"""

import asyncio
import concurrent.futures
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from coordinator.calls_in_flight import CallsInFlight, Fanout, OutgoingCall, closed
from coordinator.grpc_loop import grpc_loop
from coordinator.handshake import NodeFacts
from coordinator.meeting import Meeting
from coordinator.node_link import Greeting, LaneLink, NodeLink
from shoal import errors
from shoal.shard_map import Endpoint

TICK_S = 0.05  # how late a deadline may be noticed
CLOSE_TIMEOUT_S = 2.0
_T = TypeVar("_T")


class ExpertClient(Protocol):
    """Calls to nodes, however they travel. A node is its index in what it was made with."""

    def connect(
        self, check: Callable[[int, NodeFacts], None], ready_timeout_s: float
    ) -> list[NodeFacts]:
        """Describe, check and open every node, all at once; return what they said of themselves.

        Args:
            check: raises what is wrong with a node.
            ready_timeout_s: how long a node may go on warming up.

        Raises:
            NodeError: of the first node at fault; its message has a line for every such node.
        """
        ...

    def next_call_id(self) -> int: ...
    def submit(self, calls: Sequence[OutgoingCall]) -> Fanout:
        """Send a fan-out's calls. Any thread; the Fanout ends within call_timeout_s."""
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


class NodeClient:
    """Calls to the nodes at `endpoints`; see ExpertClient.

    Args:
        greeting: who this coordinator is, as Open tells it.
        call_timeout_s: how long a fan-out may take.
        notify: told what is waited for, in a sentence.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        greeting: Greeting,
        call_timeout_s: float,
        notify: Callable[[str], None],
    ) -> None:
        self._links = [NodeLink(endpoint, call_timeout_s) for endpoint in endpoints]
        self._greeting = greeting
        self._call_timeout_s = call_timeout_s
        self._notify = notify
        self._loop = grpc_loop()
        self._in_flight = CallsInFlight(
            [link.node for link in self._links],
            call_timeout_s,
            lambda node, lane, frame: self._links[node].lanes[lane].send(frame),
        )
        self._call_ids = itertools.count(1)
        self._closing = asyncio.Event()
        self._pump: concurrent.futures.Future[None] | None = None

    def connect(
        self, check: Callable[[int, NodeFacts], None], ready_timeout_s: float
    ) -> list[NodeFacts]:
        facts = self._on_loop(self._connect_all(check, ready_timeout_s))
        self._pump = asyncio.run_coroutine_threadsafe(self._run(), self._loop)
        # Over: closed, or dead of a bug that `close` will raise.
        self._pump.add_done_callback(
            lambda _: self._loop.call_soon_threadsafe(self._in_flight.end_all)
        )
        return facts

    def next_call_id(self) -> int:
        return next(self._call_ids)

    def submit(self, calls: Sequence[OutgoingCall]) -> Fanout:
        fanout = Fanout(calls)
        deadline_s = time.monotonic() + self._call_timeout_s
        self._loop.call_soon_threadsafe(self._start, fanout, deadline_s)
        return fanout

    def wait(self, fanout: Fanout) -> None:
        fanout.wait()

    def abandon(self, fanout: Fanout) -> None:
        self._loop.call_soon_threadsafe(self._in_flight.abandon, fanout)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        if self._pump is not None:
            concurrent.futures.wait([self._pump], CLOSE_TIMEOUT_S)
        self._on_loop(self._close_links())
        if self._pump is not None and self._pump.done():
            self._pump.result()

    # Everything below runs on the loop's thread.

    async def _connect_all(
        self, check: Callable[[int, NodeFacts], None], ready_timeout_s: float
    ) -> list[NodeFacts]:
        meeting = Meeting(check, self._notify, ready_timeout_s, self._open_lanes)
        try:
            return await meeting.meet_all(self._links)
        except BaseException:
            await self._close_links()
            raise

    async def _open_lanes(self, node: int) -> None:
        for epoch, (lane, link) in enumerate(self._links[node].lanes.items()):
            opened = await link.open(self._greeting, epoch)
            self._in_flight.lane_opened(node, lane, opened.credit_bytes)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._tick())]
            for node, link in enumerate(self._links):
                for lane in link.lanes.values():
                    tasks.append(group.create_task(lane.write_loop()))
                    tasks.append(group.create_task(self._read_loop(node, lane)))
            await self._closing.wait()
            for task in tasks:
                task.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._in_flight.tick(time.monotonic())

    async def _read_loop(self, node: int, lane: LaneLink) -> None:
        try:
            while True:
                frame, num_bytes = await lane.read()
                self._in_flight.on_frame(node, frame, num_bytes)
        except errors.NodeError as error:
            self._in_flight.lost(node, error)
            await self._links[node].close()

    def _start(self, fanout: Fanout, deadline_s: float) -> None:
        if self._closing.is_set() or self._pump is None or self._pump.done():
            fanout.end(closed())
        else:
            self._in_flight.start(fanout, deadline_s)

    async def _close_links(self) -> None:
        for link in self._links:
            await link.close()

    def _on_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        waiting = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return waiting.result()
        except KeyboardInterrupt:
            waiting.cancel()
            raise
