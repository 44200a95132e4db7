"""One Execute stream over a socket of its own, in our own framing of gRPC's wire.

Not thread-safe: its client calls it under one lock. The socket does not block once it is open.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from coordinator.calls_in_flight import NodeNews
from coordinator.dispatch_events import Lane
from coordinator.node_link import (
    CONNECT_TIMEOUT_S,
    EXECUTE,
    KEEPALIVE,
    Greeting,
    Keepalive,
    error_of_status,
    frame_of,
    opened_of,
    polite_end,
    silent,
)
from shoal import errors
from shoal.http2 import grpc_headers
from shoal.http2.connection import Connection
from shoal.http2.events import (
    Event,
    GoneAway,
    HeadersReceived,
    MessageReceived,
    MessageRefused,
    PingAnswered,
    RemoteEnded,
    StreamReset,
)
from shoal.http2.frames import Code, Http2Error
from shoal.http2.stream import PREFIX_BYTES
from shoal.shard_map import Endpoint, EndpointKind
from shoal.v1 import expert_pb2 as pb

RECEIVE_BYTES = 256 * 1024


class FastLane:
    """A lane of a node, as LaneLink is on grpc.aio."""

    def __init__(self, endpoint: Endpoint, lane: Lane, keepalive: Keepalive = KEEPALIVE) -> None:
        self.node, self.lane = str(endpoint), lane
        self._keepalive = keepalive
        self._endpoint = endpoint
        self._connection = Connection(is_client=True)
        self._socket: socket.socket | None = None
        self._is_opening = self._is_closed = False
        self.open_s = 0.0  # the first round trip, without connecting: a tunnel answers that itself
        self._stream_id = 0
        self._unwritten = memoryview(b"")
        self._heard_s = 0.0
        self._pinged_s: float | None = None
        self._status: tuple[grpc_headers.Status, str] | None = None
        self._goodbye = "Socket closed"

    def open(self, greeting: Greeting, stream_epoch: int) -> pb.Opened:
        """Connect, start the stream and return the answer to Open. Blocks. Raises NodeError.

        The one method that another thread may `close` meanwhile: then it fails soon.
        """
        self._is_opening = True
        try:
            return self._open(greeting, stream_epoch)
        except BaseException:
            self._is_closed = True
            raise
        finally:
            self._is_opening = False
            if self._is_closed and self._socket is not None:
                self._socket.close()
                self._socket = None

    def _open(self, greeting: Greeting, stream_epoch: int) -> pb.Opened:
        give_up_s = time.monotonic() + CONNECT_TIMEOUT_S
        try:
            self._socket = _connected(self._endpoint)
            is_unix = self._endpoint.kind is EndpointKind.UNIX
            authority = "localhost" if is_unix else self._endpoint.address
            self._stream_id = self._connection.open(grpc_headers.request(EXECUTE, authority))
            self.send(greeting.open_frame(self.lane, stream_epoch))
            asked_s = time.monotonic()
            self._socket.sendall(self._connection.take_output())
            buffer = memoryview(bytearray(RECEIVE_BYTES))
            while True:
                self._socket.settimeout(max(0.001, give_up_s - time.monotonic()))
                for frame, _ in self.receive(buffer):
                    self.open_s = time.monotonic() - asked_s
                    self._socket.setblocking(False)
                    self.flush()
                    return opened_of(self.node, frame)
                if time.monotonic() > give_up_s:
                    raise silent(self.node)
                self._socket.sendall(self._connection.take_output())
        except TimeoutError as error:
            raise silent(self.node) from error
        except OSError as error:
            raise self._unreachable(error) from error

    def fileno(self) -> int:
        assert self._socket is not None
        return self._socket.fileno()

    @property
    def has_output(self) -> bool:
        """Whether there is something to `flush` that the socket has not been offered."""
        return self._connection.has_output

    @property
    def has_unwritten(self) -> bool:
        """Whether the socket took less than there was."""
        return bool(self._unwritten)

    def send(self, frame: bytes) -> None:
        """Queue a frame for `flush`."""
        self._connection.send_message(self._stream_id, frame)

    def flush(self) -> None:
        """Write what the socket takes. Raises NodeUnreachable."""
        assert self._socket is not None
        try:
            while True:
                if not self._unwritten:
                    output = self._connection.take_output()
                    if not output:
                        return
                    self._unwritten = memoryview(output)
                written = self._socket.send(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except BlockingIOError:
            return
        except OSError as error:
            raise self._unreachable(error) from error

    def receive(self, buffer: memoryview) -> Iterator[tuple[NodeNews, int]]:
        """Read what the socket has, into the buffer; yield its frames and their sizes.

        A frame may be a view of the buffer: it is good until the next is asked for.

        Raises NodeUnreachable when the stream has ended, MalformedMessage when it makes no sense.
        """
        assert self._socket is not None
        try:
            num_bytes = self._socket.recv_into(buffer)
        except BlockingIOError:
            return
        except TimeoutError:
            raise
        except OSError as error:
            raise self._unreachable(error) from error
        if not num_bytes:
            raise self.ended(0)
        yield from self.take(buffer[:num_bytes], time.monotonic())

    def take(self, data: memoryview, now_s: float) -> Iterator[tuple[NodeNews, int]]:
        """Take bytes that came from the socket; see `receive`."""
        self._heard_s, self._pinged_s = now_s, None
        message = self._connection.take_message(data)
        if message is not None:
            yield frame_of(self.node, message[1]), len(message[1])
            return
        try:
            events = self._connection.receive(data, now_s)
        except Http2Error as error:
            raise errors.MalformedMessage(f"node {self.node} broke the wire: {error}") from error
        for event in events:
            if isinstance(event, MessageReceived):
                yield frame_of(self.node, event.payload), len(event.payload)
            else:
                self._on(event)

    def ended(self, number: int) -> errors.NodeError:
        """Return the error of a socket that has ended: with an errno, or 0 in good order."""
        why = os.strerror(number) if number else self._goodbye
        return error_of_status(self.node, "UNAVAILABLE", why)

    # What native code sends and receives beside this object (see `Connection.may_bypass`).

    @property
    def stream_id(self) -> int:
        return self._stream_id

    def may_bypass(self, num_bytes: int, count: int) -> bool:
        """Whether so many messages of that many bytes may be sent, and others received, so."""
        may = self._connection.may_bypass
        return not self._unwritten and may(self._stream_id, num_bytes, count)

    def sent_beside(self, num_bytes: int, unsent: bytes) -> None:
        """Count a message; `unsent`: what of it the socket did not take, for `flush`."""
        self._connection.exchanged_beside(self._stream_id, 1, 0, num_bytes + PREFIX_BYTES)
        if unsent:
            self._unwritten = memoryview(unsent)

    def exchanged_beside(
        self, num_messages: int, received_bytes: int, sent_bytes: int, now_s: float
    ) -> None:
        """Count so many messages that were received, and as many sent."""
        self._heard_s, self._pinged_s = now_s, None
        prefixes = num_messages * PREFIX_BYTES
        received_bytes, sent_bytes = received_bytes + prefixes, sent_bytes + prefixes
        count = self._connection.exchanged_beside
        count(self._stream_id, num_messages, received_bytes, sent_bytes)

    def received_beside(self, num_bytes: int, now_s: float) -> None:
        """Count a message."""
        self._heard_s, self._pinged_s = now_s, None
        self._connection.exchanged_beside(self._stream_id, 1, num_bytes + PREFIX_BYTES, 0)

    def _on(self, event: Event) -> None:
        match event:
            case HeadersReceived(_, fields):
                self._status = grpc_headers.status_of(fields)
            case RemoteEnded():
                status, details = self._status or (grpc_headers.Status.UNKNOWN, "no trailers")
                if status is grpc_headers.Status.OK:
                    raise polite_end(self.node)
                raise error_of_status(self.node, status.name, details or status.name)
            case StreamReset(_, code):
                why = f"the stream was reset, HTTP/2 code {code}"
                raise error_of_status(self.node, "UNAVAILABLE", why)
            case MessageRefused(_, is_compressed, num_bytes):
                what = "a compressed message" if is_compressed else f"{num_bytes} bytes at once"
                raise errors.MalformedMessage(f"node {self.node} sent {what}")
            case GoneAway(_, why):
                self._goodbye = why or self._goodbye
            case PingAnswered() | MessageReceived():
                pass

    def tick(self, now_s: float) -> None:
        """Ask a silent peer for a sign of life. Raises NodeUnreachable: it gave none."""
        if self._pinged_s is not None and now_s - self._pinged_s > self._keepalive.timeout_s:
            raise error_of_status(self.node, "UNAVAILABLE", "no answer to a ping")
        if self._pinged_s is None and now_s - self._heard_s > self._keepalive.after_s:
            self._pinged_s = now_s
            self._connection.ping()

    def close(self, *, is_read: bool = False) -> socket.socket | None:
        """Break the stream off and close the socket. Safe to call again.

        Args:
            is_read: native code reads from it now: it is returned, for whoever closes it later.
        """
        self._is_closed = True
        if self._socket is None:
            return None
        if self._is_opening:  # in another thread, which closes what it opened
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            return None
        if not self._unwritten:  # a goodbye in the middle of a frame would be none
            self._connection.reset(self._stream_id, Code.CANCEL)
            self._connection.go_away()
            with contextlib.suppress(OSError):
                self._socket.setblocking(False)
                self._socket.send(self._connection.take_output())
        closing, self._socket = self._socket, None
        if not is_read:
            closing.close()
            return None
        with contextlib.suppress(OSError):
            closing.shutdown(socket.SHUT_RDWR)  # which ends the reading
        return closing

    def _unreachable(self, error: OSError) -> errors.NodeError:
        why = error.strerror or str(error)
        return error_of_status(self.node, "UNAVAILABLE", why)


def _connected(endpoint: Endpoint) -> socket.socket:
    if endpoint.kind is EndpointKind.UNIX:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(CONNECT_TIMEOUT_S)
            connection.connect(endpoint.address)
        except OSError:
            connection.close()
            raise
        return connection
    host, _, port = endpoint.address.rpartition(":")
    address = (host.removeprefix("[").removesuffix("]"), int(port))
    connection = socket.create_connection(address, CONNECT_TIMEOUT_S)
    # Without it a small frame may wait 40 ms for the peer's delayed acknowledgement.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
