"""The transport `fast`: Execute streams on plain sockets, in our own framing of gRPC's wire.

No thread stands between the forward pass and the network. Whoever waits for a fan-out *leads*: it
polls all sockets and feeds what they bring to the calls in flight until its own fan-out has ended;
others who wait meanwhile sleep, and one of them leads next. A thread of our own leads where nobody
waits: every 50 ms for deadlines and signs of life, and while large messages are on their way, so
that they travel while the forward pass computes. Describe goes through gRPC, once, at the start.

All state belongs to `_lock`, which is free while the leader polls.
"""

import asyncio
import contextlib
import itertools
import select
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from coordinator.calls_in_flight import CallsInFlight, Fanout, OutgoingCall, closed
from coordinator.dispatch import Lane
from coordinator.fast_lane import RECEIVE_BYTES, FastLane
from coordinator.grpc_loop import grpc_loop
from coordinator.handshake import NodeFacts
from coordinator.meeting import Meeting
from coordinator.node_link import Greeting, NodeLink
from shoal import errors
from shoal.shard_map import Endpoint

TICK_S = 0.05  # how late a deadline may be noticed
CLOSE_TIMEOUT_S = 2.0
_T = TypeVar("_T")


class FastClient:
    """Calls to the nodes at `endpoints`; see ExpertClient. Arguments as NodeClient's."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        greeting: Greeting,
        call_timeout_s: float,
        notify: Callable[[str], None],
    ) -> None:
        self._links = [NodeLink(endpoint, call_timeout_s) for endpoint in endpoints]
        self._lanes = {
            (node, lane): FastLane(endpoint, lane, call_timeout_s)
            for node, endpoint in enumerate(endpoints)
            for lane in Lane
        }
        self._greeting = greeting
        self._call_timeout_s = call_timeout_s
        self._notify = notify
        self._in_flight = CallsInFlight([str(e) for e in endpoints], call_timeout_s, self._send)
        self._call_ids = itertools.count(1)
        self._lock = threading.Lock()
        self._led = threading.Condition(self._lock)  # the lead is free, or a fan-out has ended
        self._idle = threading.Condition(self._lock)  # the thread of our own sleeps here
        self._is_led = False
        self._is_led_idly = False  # by the thread of our own
        self._num_following = 0
        self._is_open = False
        self._poll = select.poll()
        self._lane_of_fd: dict[int, tuple[int, Lane]] = {}
        self._dirty: set[tuple[int, Lane]] = set()  # lanes with frames to write
        self._blocked: set[tuple[int, Lane]] = set()  # lanes whose socket is full
        self._ticked_s = 0.0
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="shoal-fast", daemon=True)

    def connect(
        self, check: Callable[[int, NodeFacts], None], ready_timeout_s: float
    ) -> list[NodeFacts]:
        """Meet every node and open its lanes (see ExpertClient)."""
        meeting = Meeting(check, self._notify, ready_timeout_s, self._open_lanes)
        try:
            facts = _on_grpc_loop(self._meet(meeting))
        except BaseException:
            self.close()
            raise
        with self._lock:
            for key, lane in self._lanes.items():
                self._lane_of_fd[lane.fileno()] = key
                self._poll.register(lane.fileno(), select.POLLIN)
            for end in (self._waker, self._woken):
                end.setblocking(False)
            self._poll.register(self._woken.fileno(), select.POLLIN)
            self._is_open = True
        self._thread.start()
        return facts

    def next_call_id(self) -> int:
        """Return an id that no other call of this client has."""
        return next(self._call_ids)

    def submit(self, calls: Sequence[OutgoingCall]) -> Fanout:
        """Send a fan-out's calls (see ExpertClient)."""
        fanout = Fanout(calls)
        with self._lock:
            if not self._is_open:
                fanout.end(closed())
                return fanout
            self._in_flight.start(fanout, time.monotonic() + self._call_timeout_s)
            self._flush_dirty()
            self._find_a_leader()
        return fanout

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

    def abandon(self, fanout: Fanout) -> None:
        """Take a fan-out's calls back (see ExpertClient)."""
        with self._lock:
            self._in_flight.abandon(fanout)
            self._flush_dirty()

    def close(self) -> None:
        """End all streams (see ExpertClient)."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
            self._in_flight.end_all()
            self._wake_leader()
            self._led.notify_all()
            self._idle.notify_all()
        if was_open:
            self._thread.join(CLOSE_TIMEOUT_S)
        with self._lock:
            for lane in self._lanes.values():
                lane.close()
            self._lane_of_fd.clear()
            if not self._is_led:
                self._waker.close()
                self._woken.close()

    async def _meet(self, meeting: Meeting) -> list[NodeFacts]:
        try:
            return await meeting.meet_all(self._links)
        finally:
            for link in self._links:
                await link.close()

    async def _open_lanes(self, node: int) -> None:
        for epoch, lane in enumerate(Lane):
            opened = await asyncio.to_thread(self._lanes[node, lane].open, self._greeting, epoch)
            with self._lock:
                self._in_flight.lane_opened(node, lane, opened.credit_bytes)

    # Everything below runs under the lock.

    def _send(self, node: int, lane: Lane, frame: bytes) -> None:
        self._lanes[node, lane].send(frame)
        self._dirty.add((node, lane))

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
        for fd, mask in ready:
            key = self._lane_of_fd.get(fd)
            if key is None:
                self._take_wakes(fd)
                continue
            if mask & select.POLLOUT:
                self._dirty.add(key)
            if mask & ~select.POLLOUT:
                self._read(*key)
        now_s = time.monotonic()
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

    def _read(self, node: int, lane: Lane) -> None:
        try:
            for frame, num_bytes in self._lanes[node, lane].receive(self._buffer):
                self._in_flight.on_frame(node, frame, num_bytes)
        except errors.NodeError as error:
            self._lose(node, error)
        else:
            self._note_output((node, lane))

    def _tick(self, now_s: float) -> None:
        self._ticked_s = now_s
        self._in_flight.tick(now_s)
        for node, lane in list(self._lane_of_fd.values()):
            try:
                self._lanes[node, lane].tick(now_s)
            except errors.NodeError as error:
                self._lose(node, error)
            else:
                self._note_output((node, lane))

    def _note_output(self, key: tuple[int, Lane]) -> None:
        if self._lanes[key].has_output:  # acknowledgements, windows, a ping
            self._dirty.add(key)

    def _flush_dirty(self) -> None:
        while self._dirty:  # a node that is lost frees credit, and so more frames
            key = self._dirty.pop()
            lane = self._lanes[key]
            if key not in self._lane_of_fd.values():
                continue  # lost meanwhile
            try:
                lane.flush()
            except errors.NodeError as error:
                self._lose(key[0], error)
                continue
            if lane.has_unwritten != (key in self._blocked):
                self._watch(key, lane)

    def _watch(self, key: tuple[int, Lane], lane: FastLane) -> None:
        if lane.has_unwritten:
            self._blocked.add(key)
            self._poll.modify(lane.fileno(), select.POLLIN | select.POLLOUT)
            self._wake_leader()
        else:
            self._blocked.discard(key)
            self._poll.modify(lane.fileno(), select.POLLIN)

    def _lose(self, node: int, error: errors.NodeError) -> None:
        for lane in Lane:
            key = (node, lane)
            fds = [fd for fd, other in self._lane_of_fd.items() if other == key]
            for fd in fds:
                del self._lane_of_fd[fd]
                self._poll.unregister(fd)
            self._blocked.discard(key)
            self._lanes[key].close()
        self._in_flight.lost(node, error)

    def _serve(self) -> None:
        """The thread of our own: leads where nobody waits."""
        with self._lock:
            try:
                while self._is_open:
                    self._idle.wait(TICK_S)
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


def _on_grpc_loop(work: Coroutine[Any, Any, _T]) -> _T:
    waiting = asyncio.run_coroutine_threadsafe(work, grpc_loop())
    try:
        return waiting.result()
    except KeyboardInterrupt:
        waiting.cancel()
        raise
