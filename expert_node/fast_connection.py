"""One connection of the fast server: bytes to calls of the service's methods, and back."""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import cast

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from expert_node.lent_sockets import LentSockets
from expert_node.lifecycle import Health
from expert_node.reload import Outcome
from expert_node.service import SERVICE_NAME, ExpertService, reload_reply
from expert_node.session import Session, StreamEnded
from shoal import limits
from shoal.http2 import grpc_headers
from shoal.http2.connection import Connection
from shoal.http2.events import (
    Event,
    HeadersReceived,
    MessageReceived,
    MessageRefused,
    PingAnswered,
    RemoteEnded,
    StreamReset,
)
from shoal.http2.frames import Http2Error
from shoal.http2.grpc_headers import Status
from shoal.log import get_logger
from shoal.ops.call_server import Returned
from shoal.v1 import expert_pb2 as pb

KEEPALIVE_S = 10.0  # between looks at a silent peer
PING_TIMEOUT_S = 2.0
HANDSHAKE_TIMEOUT_S = 5.0  # for the first HTTP/2 bytes
# Plain calls in a row before a socket is lent: a loan that ends at once costs 200 us or so. Whose
# loans end before that many calls more has to show twice as many the next time.
LEND_AFTER, MAX_LEND_AFTER = 16, 4096
_HEALTH = "/grpc.health.v1.Health/"
_METHODS = frozenset(
    {f"/{SERVICE_NAME}/{name}" for name in ("Describe", "Drain", "Reload", "Execute")}
    | {_HEALTH + "Check", _HEALTH + "Watch"}
)
_log = get_logger("fast_server")


class _Execute:
    """An Execute stream: a session, and the credit of frames that have not gone out."""

    def __init__(self, session_id: int, session: Session) -> None:
        self.session_id, self.session = session_id, session
        self.unsent: deque[int] = deque()
        self.has_peer_ended = False


class FastConnection(asyncio.Protocol):
    """See the module. All of it runs on the event loop's thread."""

    def __init__(
        self,
        service: ExpertService,
        health: Health,
        joined: Callable[["FastConnection"], None],
        left: Callable[["FastConnection"], None],
        lent: LentSockets | None = None,
    ) -> None:
        """Args: lent: who answers plain calls beside the loop; None: nobody."""
        self._service, self._health = service, health
        self._joined, self._left = joined, left
        self._connection = Connection(is_client=False)
        self._transport: asyncio.Transport | None = None
        self._executes: dict[int, _Execute] = {}
        self._waiting: dict[int, str] = {}  # unary: methods whose message has not come
        self._reloads: set[int] = set()  # unary: streams whose answer takes a while
        self._watches: dict[int, Callable[[], None]] = {}
        self._is_reading = False  # what is sent meanwhile goes out at once afterwards
        self._is_leaving = False
        self._last_ping: bool | None = None  # of a leaving node: whether it was answered
        self._is_lingering = False  # our half is closed; what comes is discarded
        self._heard_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_choked = False  # the peer does not read its answers
        self._lent = lent
        self._loan: tuple[int, int] | None = None  # id, stream
        self._is_resuming = False  # the socket is back, and what it brought not received yet
        self._num_plain = 0  # calls that came one by one and were answered at once, in a row
        self._num_plain_to_lend = LEND_AFTER

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family != getattr(socket, "AF_UNIX", None):
            # Without it a reply may wait 40 ms for the peer's delayed acknowledgement.
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._joined(self)
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._check_alive)
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            return
        self._heard_s = time.monotonic()
        self._receive(data)

    def _receive(self, data: bytes) -> None:
        self._is_reading = True
        try:
            message = self._connection.take_message(data)
            if message is not None and message[0] in self._executes:
                stream_id, payload = message
                is_plain = self._on_frame(stream_id, self._executes[stream_id], payload)
                self._num_plain = self._num_plain + 1 if is_plain else 0
                if self._num_plain == self._num_plain_to_lend:
                    self._lend_soon(stream_id)
            elif message is not None:
                self._on(MessageReceived(message[0], bytes(message[1])))
            else:
                for event in self._connection.receive(data, self._heard_s):
                    self._on(event)
        except Http2Error as error:
            self._break(error)
        finally:
            self._is_reading = False
        self._flush()
        if self._is_leaving:
            self._part()

    def pause_writing(self) -> None:
        # A peer that does not read its answers gets no more calls in.
        self._is_choked = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_choked = False
        if self._transport is None or self._transport.is_closing():
            return
        if self._loan is None and not self._is_resuming:
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        return False  # closes: a stream's half-close is HTTP/2's, not the socket's

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.take_back()
        if self._timer is not None:
            self._timer.cancel()
        for stream_id in [*self._executes, *self._watches, *self._reloads]:
            self._forget(stream_id)
        self._left(self)

    # The server's

    def leave(self) -> None:
        """End what is open and close."""
        self.take_back()
        self._is_leaving = True
        for stream_id in list(self._executes):
            self._finish(stream_id, Status.OK)
        for stream_id in list(self._watches):
            self._finish(stream_id, Status.UNAVAILABLE, "the node is leaving")
        self._connection.go_away()
        self._flush()
        self._part()

    def abort(self) -> None:
        """Close without sending what is queued."""
        self.take_back()
        if self._transport is not None:
            self._transport.abort()

    # The socket while it is lent (see LentSockets)

    def _lend_soon(self, stream_id: int) -> None:
        # What was written in this turn of the loop goes out at its end.
        if self._lent is not None:
            asyncio.get_running_loop().call_soon(self._lend, stream_id)

    def _lend(self, stream_id: int) -> None:
        execute, transport = self._executes.get(stream_id), self._transport
        if self._lent is None or execute is None or transport is None or self._loan is not None:
            return
        is_busy = self._is_leaving or self._is_choked or self._is_resuming
        is_busy = is_busy or transport.is_closing() or transport.get_write_buffer_size() > 0
        bypass = self._connection.bypass(stream_id)  # the only stream: no watch, nothing unary
        raw = transport.get_extra_info("socket")
        has_tls = transport.get_extra_info("sslcontext") is not None
        if is_busy or bypass is None or raw is None or has_tls or not execute.session.may_bypass:
            self._num_plain = 0
            return
        transport.pause_reading()
        loan_id = self._lent.lend(self, raw.fileno(), stream_id, bypass)
        if loan_id is None:
            self._num_plain = 0
            transport.resume_reading()
        else:
            self._loan = loan_id, stream_id

    def take_back(self) -> None:
        """Have the socket to ourselves (see `lent_sockets.Lender`)."""
        if self._loan is not None and self._lent is not None:
            self.on_returned(self._lent.take_back(self._loan[0]))

    def on_returned(self, returned: Returned) -> None:
        """Take note of what happened on the socket (see `lent_sockets.Lender`)."""
        assert self._loan is not None
        _, stream_id = self._loan
        self._loan, self._is_resuming = None, True
        self._heard_s = time.monotonic() - returned.quiet_s
        self._connection.exchanged_beside(
            stream_id, returned.num_calls, returned.received_bytes, returned.sent_bytes
        )
        if returned.num_calls >= self._num_plain_to_lend:
            self._num_plain = self._num_plain_to_lend = LEND_AFTER
        else:
            self._num_plain, doubled = 0, 2 * self._num_plain_to_lend
            self._num_plain_to_lend = min(doubled, MAX_LEND_AFTER)
        if self._transport is None:
            return
        if returned.unsent:
            self._transport.write(returned.unsent)
        if returned.reply:
            self._emit(stream_id, returned.reply, 0)
        # Not from here: whoever takes it back is about to send something.
        asyncio.get_running_loop().call_soon(self._resume, stream_id, returned)

    def _resume(self, stream_id: int, returned: Returned) -> None:
        self._is_resuming = False
        if self._transport is None or self._transport.is_closing():
            return
        if returned.error:
            self.abort()
            return
        if returned.unread and not self._is_lingering:
            self._receive(returned.unread)
        else:
            self._flush()
        if self._transport is None or self._transport.is_closing():
            return
        if not self._is_choked:
            self._transport.resume_reading()
        if self._num_plain >= self._num_plain_to_lend:
            self._lend_soon(stream_id)

    # Everything else

    def _on(self, event: Event) -> None:
        match event:
            case MessageReceived(stream_id, payload):
                self._num_plain = 0
                execute = self._executes.get(stream_id)
                if execute is not None:
                    self._on_frame(stream_id, execute, payload)
                elif stream_id in self._waiting:
                    self._answer(stream_id, self._waiting.pop(stream_id), payload)
            case HeadersReceived(stream_id, fields):
                if stream_id not in self._executes and stream_id not in self._waiting:
                    self._start(stream_id, grpc_headers.method_of(fields))
            case RemoteEnded(stream_id, is_torn):
                self._on_ended(stream_id, is_torn)
            case MessageRefused(stream_id, is_compressed, num_bytes):
                if is_compressed:
                    self._finish(stream_id, Status.UNIMPLEMENTED, "compressed messages")
                else:
                    why = (
                        f"Received message larger than max ({num_bytes} vs. "
                        f"{limits.MAX_MESSAGE_BYTES})"
                    )
                    self._finish(stream_id, Status.RESOURCE_EXHAUSTED, why)
            case StreamReset(stream_id, _):
                self._forget(stream_id)
            case PingAnswered():
                if self._last_ping is False:
                    self._last_ping = True
            case _:  # GOAWAY: the peer will close when it is done
                pass

    def _start(self, stream_id: int, method: str | None) -> None:
        self._connection.respond(stream_id, grpc_headers.RESPONSE)
        if method not in _METHODS:
            self._finish(stream_id, Status.UNIMPLEMENTED, "Method not found!")
        elif self._is_leaving:
            self._finish(stream_id, Status.UNAVAILABLE, "the node is leaving")
        elif method.endswith("/Execute"):
            session_id, session = self._service.start_session(
                lambda frame, credit: self._emit(stream_id, frame, credit),
                lambda: self._end_execute(stream_id),
            )
            self._executes[stream_id] = _Execute(session_id, session)
        else:
            self._waiting[stream_id] = method

    def _on_frame(self, stream_id: int, execute: _Execute, payload: bytes | memoryview) -> bool:
        try:
            return execute.session.receive(payload)
        except StreamEnded as ended:
            _log.warning(
                "stream ended",
                stream=execute.session_id,
                status=ended.ending.name,
                why=str(ended),
            )
            self._finish(stream_id, Status[ended.ending.name], str(ended))
            return False

    def _emit(self, stream_id: int, frame: bytes, credit_bytes: int) -> None:
        self.take_back()
        execute = self._executes.get(stream_id)
        if execute is None:
            return
        try:
            self._connection.send_message(stream_id, frame)
        except Http2Error as error:
            self._break(error)
            return
        execute.unsent.append(credit_bytes)
        if not self._is_reading:
            self._flush()
        if execute.has_peer_ended and not execute.session.has_calls:
            self._finish(stream_id, Status.OK)

    def _answer(self, stream_id: int, method: str, payload: bytes) -> None:
        """Answer a unary call, or begin to answer a Watch."""
        try:
            if method.endswith("/Describe"):
                pb.DescribeRequest.FromString(payload)
                reply = self._service.facts_reply().SerializeToString()
            elif method.endswith("/Drain"):
                request = pb.DrainRequest.FromString(payload)
                reply = self._service.begin_drain(request).SerializeToString()
            elif method.endswith("/Reload"):
                pb.ReloadRequest.FromString(payload)
                self._reloads.add(stream_id)
                self._service.begin_reload().add_done_callback(
                    lambda done: self._answer_reload(stream_id, done.result())
                )
                return
            else:
                service = health_pb2.HealthCheckRequest.FromString(payload).service
                self._answer_health(stream_id, method, service)
                return
        except DecodeError:
            self._finish(stream_id, Status.INTERNAL, "the request is no message of this method")
            return
        self._connection.send_message(stream_id, reply)
        self._finish(stream_id, Status.OK)

    def _answer_reload(self, stream_id: int, outcome: Outcome) -> None:
        if stream_id in self._reloads:  # else its asker is gone
            self._connection.send_message(stream_id, reload_reply(outcome).SerializeToString())
            self._finish(stream_id, Status.OK)

    def _answer_health(self, stream_id: int, method: str, service: str) -> None:
        statuses = health_pb2.HealthCheckResponse
        is_known = service in ("", SERVICE_NAME)

        def tell() -> None:
            status = statuses.SERVING if self._health.is_serving else statuses.NOT_SERVING
            status = status if is_known else statuses.SERVICE_UNKNOWN
            reply = health_pb2.HealthCheckResponse(status=status).SerializeToString()
            self._connection.send_message(stream_id, reply)
            if not self._is_reading:
                self._flush()

        if method.endswith("/Watch"):
            self._watches[stream_id] = tell
            self._health.watchers.add(tell)
            tell()
        elif is_known:
            tell()
            self._finish(stream_id, Status.OK)
        else:
            self._finish(stream_id, Status.NOT_FOUND)

    def _on_ended(self, stream_id: int, is_torn: bool) -> None:
        if self._waiting.pop(stream_id, None) is not None:
            self._finish(stream_id, Status.INTERNAL, "the request has no message")
        execute = self._executes.get(stream_id)
        if execute is None:
            return
        execute.has_peer_ended = True
        if is_torn:
            self._finish(stream_id, Status.INTERNAL, "the last message is not complete")
        elif not execute.session.has_calls:
            self._finish(stream_id, Status.OK)

    def _end_execute(self, stream_id: int) -> None:
        self._finish(stream_id, Status.OK)

    def _finish(self, stream_id: int, status: Status, message: str = "") -> None:
        """End our half with that status, after what is queued."""
        self.take_back()
        self._connection.end(stream_id, grpc_headers.trailers(status, message))
        self._forget(stream_id)
        if not self._is_reading:
            self._flush()

    def _forget(self, stream_id: int) -> None:
        self._waiting.pop(stream_id, None)
        self._reloads.discard(stream_id)
        tell = self._watches.pop(stream_id, None)
        if tell is not None:
            self._health.watchers.discard(tell)
        execute = self._executes.pop(stream_id, None)
        if execute is not None:
            self._service.end_session(execute.session_id)

    def _flush(self) -> None:
        if self._transport is None or self._is_lingering:
            return
        output = self._connection.take_output()
        if output and not self._transport.is_closing():
            self._transport.write(output)
        for stream_id, execute in self._executes.items():
            if execute.unsent:
                num_unsent = self._connection.num_unsent(stream_id)
                while len(execute.unsent) > num_unsent:
                    execute.session.sent(execute.unsent.popleft())

    def _break(self, error: Http2Error) -> None:
        _log.warning("connection broken", why=str(error))
        self._flush()
        self._close()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _part(self) -> None:
        """Close our half once the last answer is out and the peer has taken it in.

        Until it is out, the peer's windows must be heard. And a gRPC client that reads the end of
        a stream and the end of the connection in one go may take the latter for what ended the
        stream (seen with 1.85.1): the answer to a PING tells that it is past the former.
        """
        if self._connection.has_unsent:
            return
        if not self._heard_s or self._last_ping:
            self._linger()
        elif self._last_ping is None:
            self._last_ping = False
            self._connection.ping()
            self._flush()

    def _linger(self) -> None:
        """Close our half; what still comes is discarded until the peer closes the other.

        Closing with bytes unread resets the connection, and a reset takes answers with it that the
        peer has not read yet. The server aborts who takes too long.
        """
        if self._transport is None or self._transport.is_closing():
            return
        self._is_lingering = True
        if not self._transport.is_reading():
            self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:  # TLS: its own goodbye goes out, and what still comes is discarded meanwhile
            self._transport.close()

    def _check_alive(self) -> None:
        """Close a peer that never spoke; ask a silent one for a sign of life."""
        if self._transport is None or self._transport.is_closing():
            return
        loop = asyncio.get_running_loop()
        if self._loan is not None and self._lent is not None:
            self._heard_s = time.monotonic() - self._lent.quiet_s(self._loan[0])
        if not self._heard_s:
            self.abort()
        elif time.monotonic() - self._heard_s < KEEPALIVE_S:
            self._timer = loop.call_later(KEEPALIVE_S, self._check_alive)
        else:
            self.take_back()
            self._connection.ping()
            self._flush()
            heard_s = self._heard_s
            self._timer = loop.call_later(PING_TIMEOUT_S, self._abort_if_silent, heard_s)

    def _abort_if_silent(self, heard_s: float) -> None:
        if self._heard_s == heard_s:
            self.abort()
        else:
            self._check_alive()
