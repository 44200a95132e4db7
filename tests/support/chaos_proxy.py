"""A TCP wire with bad weather, between a coordinator and a node: it stands in for a WAN.

    with ChaosProxy(node.endpoint, forecast) as proxy:
        ... proxy.endpoint ...          # what the shard map names
        proxy.forecast = steady(Weather(stalls=True))

A *forecast* says what the weather is for a connection, a direction and a time; `Wire` decides from
it, without a clock, when each segment of bytes leaves. Everything random comes from one seed.
Needs neither root nor netem: an event loop in a thread of its own carries the bytes.
"""

import asyncio
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Self

SEGMENT_BYTES = 65_536
FIRST_WINDOW_BYTES = 14_600  # RFC 6928: ten segments after a pause
MAX_HELD_BYTES = 4 * 1024 * 1024  # of one direction: beyond it the proxy stops reading
POLL_S = 0.005  # how late a change of weather is noticed, unless somebody can wait longer


class Direction(IntEnum):
    UP = 0  # coordinator to node
    DOWN = 1


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to bytes of one direction of one connection.

    delay_s, jitter_s: each segment takes delay_s and up to jitter_s more.
    bytes_per_s: None: as fast as it goes. Of the connection, or of the `Link` that it shares.
    slow_start_rtt_s: after so long without a byte the window is small again, and doubles each RTT.
    late_share, late_s: this share of segments takes so much longer, and holds up what follows.
    slice_bytes: bytes arrive in pieces of at most so many.
    stalls: nothing arrives until the weather changes: a partition of this direction.
    resets: the connection is broken off (RST).
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float | None = None
    slow_start_rtt_s: float | None = None
    late_share: float = 0.0
    late_s: float = 0.0
    slice_bytes: int | None = None
    stalls: bool = False
    resets: bool = False


FAIR = Weather()
# Connection number, direction, seconds since the proxy started -> weather.
Forecast = Callable[[int, Direction, float], Weather]


def steady(up: Weather, down: Weather | None = None) -> Forecast:
    """Return the forecast that is the same for ever. down: None: as up."""
    both = (up, up if down is None else down)
    return lambda _connection, direction, _s: both[direction]


class Link:
    """What segments wait for in turn. Connections and proxies may share one: a bottleneck."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_s = 0.0  # when it has sent what it was given

    def send(self, now_s: float, takes_s: float) -> float:
        """Return when a segment that is given now, and takes so long, has been sent."""
        with self._lock:
            self._free_s = max(now_s, self._free_s) + takes_s
            return self._free_s


@dataclass(slots=True)
class Wire:
    """When each segment of one direction of one connection arrives (no clock, no I/O).

    link: what the weather's bandwidth is of; others may send over it, too.
    """

    random: random.Random
    link: Link = field(default_factory=Link)
    _arrives_s: float = 0.0  # of the segment before: order is kept
    _free_s: float = 0.0  # when all of this wire's has been sent
    _window: float = FIRST_WINDOW_BYTES

    def pieces(self, weather: Weather, now_s: float, num_bytes: int) -> list[tuple[float, int]]:
        """Return when each piece of a segment given now arrives: (time, bytes), in order."""
        size = weather.slice_bytes or num_bytes
        pieces = []
        for begin in range(0, num_bytes, size):
            piece = min(size, num_bytes - begin)
            sent_s = self._send(weather, now_s, piece)
            delay_s = weather.delay_s + self.random.uniform(0.0, weather.jitter_s)
            if self.random.random() < weather.late_share:
                delay_s += weather.late_s
            self._arrives_s = max(self._arrives_s, sent_s + delay_s)
            pieces.append((self._arrives_s, piece))
        return pieces

    def _send(self, weather: Weather, now_s: float, num_bytes: int) -> float:
        rtt_s = weather.slow_start_rtt_s
        if rtt_s is not None and now_s - self._free_s > rtt_s:
            self._window = FIRST_WINDOW_BYTES
        start_s = max(now_s, self._free_s)
        takes_s = num_bytes / weather.bytes_per_s if weather.bytes_per_s else 0.0
        sent_s = self.link.send(now_s, takes_s)
        if rtt_s is not None:
            left: float = num_bytes
            rounds = 0
            while left > self._window:  # a window a round trip, each twice the one before
                left -= self._window
                self._window *= 2
                rounds += 1
            takes_s = max(takes_s, rounds * rtt_s)
        self._free_s = max(sent_s, start_s + takes_s)
        return self._free_s


@dataclass(slots=True)
class _Half:
    """One direction of a connection: bytes read and not yet written."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    wire: Wire
    held: list[tuple[float, bytes]] = field(default_factory=list)
    is_over: bool = False  # the source has ended
    has_room: asyncio.Event = field(default_factory=asyncio.Event)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)  # something held, or the end

    def num_held(self) -> int:
        return sum(len(data) for _, data in self.held)


class ChaosProxy:
    """Listens on a port of its own and carries to `target` (grpc://host:port) what comes.

    `forecast` may be replaced at any time, by any thread.
    """

    def __init__(
        self,
        target: str,
        forecast: Forecast | None = None,
        seed: int = 0,
        poll_s: float = POLL_S,
        links: Mapping[Direction, Link] | None = None,
    ) -> None:
        """Args:
        poll_s: how late a change of weather may be noticed.
        links: that all connections share, with other proxies perhaps; None: each has its own.
        """
        host, _, port = target.removeprefix("grpc://").rpartition(":")
        self._target = (host, int(port))
        self.forecast = forecast or steady(FAIR)
        self._seed = seed
        self._poll_s = poll_s
        self._links = links
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"grpc://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_connections = 0
        self._num_carried = dict.fromkeys(Direction, 0)
        self._carried = threading.Condition()
        self._started_s = time.monotonic()
        self._closing = asyncio.Event()
        # epoll waits in whole milliseconds, select in microseconds: a delay is what it says.
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        self._thread = threading.Thread(target=self._run, name="chaos-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def num_carried(self, direction: Direction) -> int:
        """Return the bytes that have arrived at the other end so far."""
        return self._num_carried[direction]

    def wait_carried(self, direction: Direction, num_bytes: int, timeout_s: float) -> None:
        """Return once so many bytes in all have arrived. Raises TimeoutError."""
        with self._carried:
            if not self._carried.wait_for(
                lambda: self._num_carried[direction] >= num_bytes, timeout_s
            ):
                raise TimeoutError(f"{self._num_carried[direction]} of {num_bytes} bytes arrived")

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:

            async def on_connection(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter
            ) -> None:
                number, self.num_connections = self.num_connections, self.num_connections + 1
                task = group.create_task(self._carry(number, reader, writer))
                tasks.append(task)

            tasks: list[asyncio.Task[None]] = []
            server = await asyncio.start_server(on_connection, sock=self._listener)
            await self._closing.wait()
            server.close()
            for task in tasks:
                task.cancel()

    async def _carry(
        self, number: int, near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter
    ) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            _break_off(near_writer)
            return
        halves = (
            _Half(near_reader, far_writer, self._wire(number, Direction.UP)),
            _Half(far_reader, near_writer, self._wire(number, Direction.DOWN)),
        )
        try:
            async with asyncio.TaskGroup() as group:
                for direction, half in zip(Direction, halves, strict=True):
                    group.create_task(self._read(number, direction, half))
                    group.create_task(self._write(number, direction, half))
        except* (OSError, _Reset):
            pass
        finally:
            for half in halves:
                _break_off(half.writer)

    def _wire(self, number: int, direction: Direction) -> Wire:
        link = Link() if self._links is None else self._links[direction]
        return Wire(random.Random(f"{self._seed} {number} {direction}"), link)

    def _weather(self, number: int, direction: Direction) -> Weather:
        return self.forecast(number, direction, time.monotonic() - self._started_s)

    async def _read(self, number: int, direction: Direction, half: _Half) -> None:
        while True:
            data = await half.reader.read(SEGMENT_BYTES)
            if not data:
                half.is_over = True
                half.has_news.set()
                return
            weather, now_s = self._weather(number, direction), time.monotonic()
            begin = 0
            for due_s, size in half.wire.pieces(weather, now_s, len(data)):
                half.held.append((due_s, data[begin : begin + size]))
                begin += size
            half.has_news.set()
            if half.num_held() > MAX_HELD_BYTES:
                half.has_room.clear()
                await half.has_room.wait()

    async def _write(self, number: int, direction: Direction, half: _Half) -> None:
        while True:
            weather, now_s = self._weather(number, direction), time.monotonic()
            if weather.resets:
                raise _Reset
            if not weather.stalls:
                while half.held and half.held[0][0] <= now_s:
                    data = half.held.pop(0)[1]
                    half.writer.write(data)
                    await half.writer.drain()
                    with self._carried:
                        self._num_carried[direction] += len(data)
                        self._carried.notify_all()
                if half.num_held() <= MAX_HELD_BYTES:
                    half.has_room.set()
                if half.is_over and not half.held:
                    half.writer.write_eof()
                    return
            if weather.stalls:
                await asyncio.sleep(self._poll_s)
            elif half.held:
                await asyncio.sleep(min(self._poll_s, max(0.0, half.held[0][0] - time.monotonic())))
            else:
                half.has_news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await half.has_news.wait()


class _Reset(Exception):
    """The weather breaks this connection off."""


def _break_off(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        # With a linger of zero a close sends RST, as a middlebox that forgot the connection does.
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
