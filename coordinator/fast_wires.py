"""The sockets of the transport `fast`, and who moves their frames.

No thread stands between the forward pass and the network. Whoever waits for a fan-out *leads*: it
polls all sockets and feeds what they bring to the calls in flight until its own fan-out has ended;
others who wait meanwhile sleep, and one of them leads next. A thread of our own leads where nobody
waits: every 50 ms for deadlines and signs of life, and while large messages are on their way, so
that they travel while the forward pass computes.

All state belongs to `_lock`, which is free while the leader polls.
"""

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

from coordinator.calls_in_flight import CallsInFlight, Fanout, NodeNews
from coordinator.dispatch_events import Lane, NodeLost
from coordinator.fast_lane import RECEIVE_BYTES, FastLane
from coordinator.grpc_loop import grpc_loop
from coordinator.known_nodes import KnownNodes
from coordinator.node_client import Patience
from coordinator.node_keeper import NodeKeeper
from shoal import errors

TICK_S = 0.005  # how late it may be noticed that a call is: a tenth of the shortest silence
IDLE_TICK_S = 0.05  # for signs of life while nobody calls


class FastWires(KnownNodes):
    """Sockets and their leader. See the module."""

    def __init__(self, keeper: NodeKeeper, patience: Patience) -> None:
        in_flight = CallsInFlight(
            keeper.names, patience.call_timeout_s, patience.shard_wait_s, self
        )
        super().__init__(keeper, in_flight)
        self._loop = grpc_loop()
        self._lanes: dict[tuple[int, Lane], FastLane] = {}  # of open nodes
        self._ends: dict[int, asyncio.Future[errors.NodeError | None]] = {}
        self._lock = threading.Lock()
        self._led = threading.Condition(self._lock)  # the lead is free, or a fan-out has ended
        self._idle = threading.Condition(self._lock)  # the thread of our own sleeps here
        self._is_led = False
        self._is_led_idly = False  # by the thread of our own
        self._num_following = 0
        self._is_open = True
        self._poll = select.poll()
        self._lane_of_fd: dict[int, tuple[int, Lane]] = {}
        self._dirty: set[tuple[int, Lane]] = set()  # lanes with frames to write
        self._blocked: set[tuple[int, Lane]] = set()  # lanes whose socket is full
        self._ticked_s = 0.0
        self._kept_alive_s = 0.0
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._waker, self._woken = socket.socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        self._poll.register(self._woken.fileno(), select.POLLIN)

    def wait(self, fanout: Fanout) -> None:
        """Lead, or follow, until the fan-out has ended; raises what else ended it."""
        with self._lock:
            while not fanout.is_ended:
                if self._is_led:
                    self._follow()
                else:
                    self._lead(lambda: not fanout.is_ended)
        if fanout.error is not None:
            raise fanout.error

    # Everything below runs under the lock.

    def send(self, node: int, lane: Lane, frame: bytes) -> None:
        """Queue a frame (see Wires)."""
        key = (node, lane)
        if key in self._lanes:
            self._lanes[key].send(frame)
            self._dirty.add(key)

    def close_node(self, node: int, silent_s: float) -> None:
        """Break off a node that is silent (see Wires)."""
        name = self._keeper.names[node]
        why = f"node {name} gave no sign of life for {silent_s:.1f} s"
        self._close_lanes(node, errors.NodeUnreachable(why))

    def release_node(self, node: int) -> None:
        """Let go of a node for good (see Wires)."""
        self._close_lanes(node, None)

    def _lead(self, is_wanted: Callable[[], bool]) -> None:
        """Move frames until that is over. Nobody else leads meanwhile."""
        self._is_led = True
        try:
            while is_wanted() and self._is_open:
                num_ended = self._in_flight.num_ended
                self._turn(TICK_S)
                if self._num_following and num_ended != self._in_flight.num_ended:
                    self._led.notify_all()
        finally:
            self._is_led = False
            if self._num_following:
                self._led.notify_all()
            self._find_a_leader()

    def _follow(self) -> None:
        self._num_following += 1
        if self._is_led_idly:
            self._wake_leader()  # it leaves the lead to us
        try:
            self._led.wait()
        finally:
            self._num_following -= 1

    def _find_a_leader(self) -> None:
        if self._has_large_work() and not self._is_led:
            self._idle.notify()

    def _has_large_work(self) -> bool:
        return bool(self._blocked) or self._in_flight.has_bulk

    def _turn(self, timeout_s: float) -> None:
        """Wait for news, at most so long, and act on all of it."""
        self._lock.release()
        try:
            ready = self._poll.poll(timeout_s * 1000)
        finally:
            self._lock.acquire()
        self._catch_up()
        now_s = time.monotonic()
        for fd, mask in ready:
            key = self._lane_of_fd.get(fd)
            if key is None:
                self._take_wakes(fd)
                continue
            if mask & select.POLLOUT:
                self._dirty.add(key)
            if mask & ~select.POLLOUT:
                self._read(*key, now_s)
        # After reading: what has come is no silence, however long we were kept from the CPU.
        if now_s - self._ticked_s >= TICK_S:
            self._tick(now_s)
        if self._dirty:
            self._flush_dirty()

    def _take_wakes(self, fd: int) -> None:
        if fd == self._woken.fileno():
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(512)

    def _wake_leader(self) -> None:
        if self._is_led:
            with contextlib.suppress(OSError):
                self._waker.send(b"\0")

    def _read(self, node: int, lane: Lane, now_s: float) -> None:
        self._feed(node, lane, self._lanes[node, lane].receive(self._buffer), now_s)

    def _feed(
        self, node: int, lane: Lane, frames: Iterator[tuple[NodeNews, int]], now_s: float
    ) -> None:
        """Take what a lane brought."""
        try:
            for frame, num_bytes in frames:
                self._take_frame(node, frame, num_bytes, now_s)
        except errors.NodeError as error:
            self._lose(node, error)
        else:
            self._note_output((node, lane))

    def _catch_up(self) -> None:
        """Tell the core what it has not been told yet: before anything else happens."""

    def _take_frame(self, node: int, frame: NodeNews, num_bytes: int, now_s: float) -> None:
        self._in_flight.on_frame(node, frame, num_bytes, now_s)

    def _tick(self, now_s: float) -> None:
        self._ticked_s = now_s
        if not self._in_flight.is_idle or now_s - self._kept_alive_s >= IDLE_TICK_S:
            self._in_flight.tick(now_s)
        if now_s - self._kept_alive_s < IDLE_TICK_S:
            return
        self._kept_alive_s = now_s
        for node, lane in list(self._lane_of_fd.values()):
            if (node, lane) not in self._lanes:
                continue  # lost just now, with its other lane
            try:
                self._lanes[node, lane].tick(now_s)
            except errors.NodeError as error:
                self._lose(node, error)
            else:
                self._note_output((node, lane))

    def _note_output(self, key: tuple[int, Lane]) -> None:
        if key in self._lanes and self._lanes[key].has_output:  # acknowledgements, windows, a ping
            self._dirty.add(key)

    def _may_write(self, key: tuple[int, Lane]) -> bool:
        """Whether a lane may be written to now; else it stays dirty."""
        return True

    def _flush_dirty(self) -> None:
        kept: set[tuple[int, Lane]] = set()
        while self._dirty:  # a node that is lost frees credit, and so more frames
            key = self._dirty.pop()
            lane = self._lanes.get(key)
            if lane is None:
                continue  # lost meanwhile
            if not self._may_write(key):
                kept.add(key)
                continue
            try:
                lane.flush()
            except errors.NodeError as error:
                self._lose(key[0], error)
                continue
            if lane.has_unwritten != (key in self._blocked):
                self._watch(key, lane)
        self._dirty |= kept

    def _watch(self, key: tuple[int, Lane], lane: FastLane) -> None:
        if lane.has_unwritten:
            self._blocked.add(key)
            self._poll.modify(lane.fileno(), select.POLLIN | select.POLLOUT)
            self._wake_leader()
        else:
            self._blocked.discard(key)
            self._poll.modify(lane.fileno(), select.POLLIN)

    def _lose(self, node: int, error: errors.NodeError) -> None:
        self._close_lanes(node, error)
        broke_protocol = isinstance(error, errors.MalformedMessage)
        self._in_flight.on(NodeLost(node, error, broke_protocol, time.monotonic()))

    def _close_lanes(self, node: int, why: errors.NodeError | None) -> None:
        for lane in Lane:
            key = (node, lane)
            if key not in self._lanes:
                continue
            fds = [fd for fd, other in self._lane_of_fd.items() if other == key]
            for fd in fds:
                del self._lane_of_fd[fd]
                self._poll.unregister(fd)
            self._blocked.discard(key)
            self._close_lane(self._lanes.pop(key))
        end = self._ends.pop(node, None)
        if end is not None:
            self._loop.call_soon_threadsafe(_set_result, end, why)

    def _close_lane(self, lane: FastLane) -> None:
        lane.close()

    def _serve(self) -> None:
        """The thread of our own: leads where nobody waits."""
        with self._lock:
            try:
                while self._is_open:
                    self._idle.wait(IDLE_TICK_S)
                    if not self._is_led and self._is_open:
                        self._take_a_turn()
            finally:  # closed, or a bug, which must leave nobody waiting
                self._is_open = False
                self._in_flight.end_all()
                self._led.notify_all()

    def _take_a_turn(self) -> None:
        self._is_led = True
        try:
            self._turn(0)
        finally:
            self._is_led = False
        if self._num_following:
            self._led.notify_all()
        elif self._has_large_work():
            self._is_led_idly = True
            try:
                self._lead(lambda: self._has_large_work() and not self._num_following)
            finally:
                self._is_led_idly = False


def _set_result(
    end: "asyncio.Future[errors.NodeError | None]", why: errors.NodeError | None
) -> None:
    if not end.done():
        end.set_result(why)
