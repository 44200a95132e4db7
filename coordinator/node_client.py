"""The shell of dispatch: commands of the core become frames to nodes, their frames its events.

All gRPC and the core live on one event-loop thread (`grpc_loop`). The forward thread encodes its
calls, hands a whole fan-out over with one `submit`, and sleeps on its `Fanout` until the core ends
it; it decodes the replies itself. So the loop's thread does little more than move bytes.
"""

import asyncio
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from coordinator.dispatch import (
    Accept,
    Cancel,
    Command,
    Dispatcher,
    Event,
    Fail,
    Failed,
    FanoutAbandoned,
    FanoutStarted,
    Finish,
    Lane,
    LaneOpened,
    NewCall,
    NodeDraining,
    NodeLost,
    Replied,
    Send,
    Ticked,
    TimeOut,
)
from coordinator.grpc_loop import grpc_loop
from coordinator.handshake import NodeFacts
from coordinator.node_link import Greeting, LaneLink, NodeLink
from shoal import errors, wire
from shoal.shard_map import Endpoint
from shoal.v1 import expert_pb2 as pb

TICK_S = 0.05  # how late a deadline may be noticed
READY_POLL_S = 0.2
CLOSE_TIMEOUT_S = 2.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class OutgoingCall:
    """An encoded call. rows: [T'] int32, which rows of the layer it carries."""

    call_id: int
    node: int
    lane: Lane
    frame: bytes
    rows: NDArray[np.int32]


@dataclass(slots=True)
class Fanout:
    """One layer's calls on their way. The loop's thread ends it, once; the forward thread waits."""

    fanout_id: int
    calls: Sequence[OutgoingCall]
    replies: dict[int, pb.Reply] = field(default_factory=dict)
    bytes_down: int = 0
    error: errors.ShoalError | None = None
    # Released when it ends: a bare lock wakes its waiter faster than an Event does.
    _ended: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._ended.acquire()

    def end(self, error: errors.ShoalError | None) -> None:
        """Let the waiter go. Called exactly once."""
        self.error = error
        self._ended.release()

    def wait(self) -> None:
        """Return once every reply is there; raises whatever else ended it."""
        self._ended.acquire()
        if self.error is not None:
            raise self.error


class NodeClient:
    """Streams to the nodes at `endpoints`; a node is its index there.

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
        self._dispatcher = Dispatcher()
        self._fanouts: dict[int, Fanout] = {}
        self._calls: dict[int, tuple[Fanout, OutgoingCall]] = {}
        self._fanout_ids = itertools.count(1)
        self._call_ids = itertools.count(1)
        self._closing = asyncio.Event()
        self._pump: concurrent.futures.Future[None] | None = None

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
        facts = self._on_loop(self._connect_all(check, ready_timeout_s))
        self._pump = asyncio.run_coroutine_threadsafe(self._run(), self._loop)
        self._pump.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._end_all))
        return facts

    def next_call_id(self) -> int:
        return next(self._call_ids)

    def submit(self, calls: Sequence[OutgoingCall]) -> Fanout:
        """Send a fan-out's calls. Any thread; the Fanout ends within call_timeout_s."""
        fanout = Fanout(next(self._fanout_ids), calls)
        deadline_s = time.monotonic() + self._call_timeout_s
        self._loop.call_soon_threadsafe(self._start, fanout, deadline_s)
        return fanout

    def abandon(self, fanout: Fanout) -> None:
        """Nobody waits for this fan-out any more: take its calls back."""
        self._loop.call_soon_threadsafe(self._abandon, fanout)

    def close(self) -> None:
        """End all streams and channels. A Fanout in flight fails. Safe to call again."""
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
        connecting = [
            self._connect_one(node, check, ready_timeout_s) for node in range(len(self._links))
        ]
        outcomes = await asyncio.gather(*connecting, return_exceptions=True)
        facts = [outcome for outcome in outcomes if isinstance(outcome, NodeFacts)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not failures:
            return facts
        await self._close_links()
        for failure in failures:
            if not isinstance(failure, errors.ShoalError):
                raise failure
        if len(failures) == 1:
            raise failures[0]
        raise type(failures[0])("\n".join(map(str, failures))) from failures[0]

    async def _connect_one(
        self, node: int, check: Callable[[int, NodeFacts], None], ready_timeout_s: float
    ) -> NodeFacts:
        link = self._links[node]
        facts = await link.describe()
        check(node, facts)
        give_up_s = time.monotonic() + ready_timeout_s
        if not facts.is_ready:
            self._notify(f"node {link.node} is warming up: waiting up to {ready_timeout_s:g} s")
        while not facts.is_ready:
            if time.monotonic() > give_up_s:
                raise errors.NodeBusy(
                    f"node {link.node} is still warming up after {ready_timeout_s:g} s: try again "
                    "later, or start it without --warmup"
                )
            await asyncio.sleep(READY_POLL_S)
            facts = await link.describe()
        for epoch, (lane, lane_link) in enumerate(link.lanes.items()):
            opened = await lane_link.open(self._greeting, epoch)
            self._dispatcher.on(LaneOpened(node, lane, opened.credit_bytes))
        return facts

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._tick())]
            for node, link in enumerate(self._links):
                for lane_link in link.lanes.values():
                    tasks.append(group.create_task(lane_link.write_loop()))
                    tasks.append(group.create_task(self._read_loop(node, lane_link)))
            await self._closing.wait()
            for task in tasks:
                task.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._on(Ticked(time.monotonic()))

    async def _read_loop(self, node: int, lane: LaneLink) -> None:
        try:
            while True:
                frame, num_bytes = await lane.read()
                self._on_frame(node, lane.node, frame, num_bytes)
        except errors.NodeError as error:
            self._on(NodeLost(node, error))
            await self._links[node].close()

    def _on_frame(self, node: int, name: str, frame: pb.NodeFrame, num_bytes: int) -> None:
        match frame.WhichOneof("frame"):
            case "reply":
                reply = frame.reply
                for command in self._dispatcher.on(Replied(reply.call_id, node)):
                    if isinstance(command, Accept):
                        self._accept(reply, num_bytes)
                    else:
                        self._do(command)
            case "failure":
                failure = frame.failure
                error = self._error_of(failure, name)
                self._on(Failed(failure.call_id, node, error))
            case "progress":
                pass  # its call is held and alive; deadlines are absolute
            case "draining":
                reason = frame.draining.reason
                error = errors.NodeDraining(f"node {name} is draining ({reason}): use another node")
                self._on(NodeDraining(node, error))
            case _:
                raise errors.MalformedMessage(f"node {name} sent a frame that nobody asked for")

    def _error_of(self, failure: pb.Failure, name: str) -> errors.ShoalError:
        error = wire.error_of(failure, name)
        if not isinstance(error, errors.NumericError) or failure.call_id not in self._calls:
            return error
        # The node speaks of its call's rows; the caller knows the layer's.
        _, call = self._calls[failure.call_id]
        rows = tuple(int(call.rows[row]) for row in error.rows if row < call.rows.size)
        return errors.NumericError(str(error), rows)

    def _on(self, event: Event) -> None:
        for command in self._dispatcher.on(event):
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case Send(call_id, node, lane):
                self._links[node].lanes[lane].send(self._calls[call_id][1].frame)
            case Cancel(call_id, node, lane):
                frame = pb.ClientFrame(cancel=pb.Cancel(call_id=call_id))
                self._links[node].lanes[lane].send(frame.SerializeToString())
            case Finish(fanout_id):
                self._end(fanout_id, None)
            case Fail(fanout_id, _, error):
                self._end(fanout_id, error)
            case TimeOut(fanout_id, node):
                self._end(fanout_id, self._timeout_of(node))
            case Accept():
                raise AssertionError("only a reply is accepted")

    def _timeout_of(self, node: int) -> errors.CallTimeout:
        return errors.CallTimeout(
            f"node {self._links[node].node} gave no answer within {self._call_timeout_s:g} s: it "
            "hangs or is overloaded; restart it, or allow more time with --call-timeout"
        )

    def _start(self, fanout: Fanout, deadline_s: float) -> None:
        if self._closing.is_set() or self._pump is None or self._pump.done():
            fanout.end(errors.NodeUnreachable("the connections to the nodes are closed"))
            return
        self._fanouts[fanout.fanout_id] = fanout
        for call in fanout.calls:
            self._calls[call.call_id] = fanout, call
        new_calls = tuple(
            NewCall(call.call_id, call.node, call.lane, len(call.frame)) for call in fanout.calls
        )
        self._on(FanoutStarted(fanout.fanout_id, new_calls, deadline_s))

    def _accept(self, reply: pb.Reply, num_bytes: int) -> None:
        fanout, _ = self._calls[reply.call_id]
        fanout.replies[reply.call_id] = reply
        fanout.bytes_down += num_bytes

    def _abandon(self, fanout: Fanout) -> None:
        if fanout.fanout_id in self._fanouts:
            self._on(FanoutAbandoned(fanout.fanout_id))
            self._forget(fanout.fanout_id)

    def _end(self, fanout_id: int, error: errors.ShoalError | None) -> None:
        self._forget(fanout_id).end(error)

    def _forget(self, fanout_id: int) -> Fanout:
        fanout = self._fanouts.pop(fanout_id)
        for call in fanout.calls:
            del self._calls[call.call_id]
        return fanout

    def _end_all(self) -> None:
        # The pump is over: closed, or dead of a bug that `close` will raise.
        for fanout_id in list(self._fanouts):
            self._end(fanout_id, errors.NodeUnreachable("the connections to the nodes are closed"))

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
