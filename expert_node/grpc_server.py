"""The transport `grpcio` of a node: the service and health on grpc.aio.

Execute is registered on raw bytes, so that bytes that are no message reach the session instead of
dying inside gRPC. The fast transport does without this file, and without gRPC's 0.1 s of import.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from expert_node.config import ListenAddress
from expert_node.lifecycle import Health
from expert_node.service import SERVICE_NAME, ExpertService, reload_reply
from expert_node.session import Ending, Session, StreamEnded
from shoal import limits
from shoal.log import get_logger
from shoal.tls import ServerTls
from shoal.v1 import expert_pb2 as pb

SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),  # two nodes on one port would share its connections without an error
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),  # without it, 60 s pass before a dead peer is noticed
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),  # the default answers pings with GOAWAY
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_metadata_size", 16 * limits.KIB),
    ("grpc.http2.max_frame_size", limits.MIB),  # fewer frames for prefill's large messages
    ("grpc.http2.lookahead_bytes", limits.MAX_MESSAGE_BYTES),
    ("grpc.experimental.tcp_min_read_chunk_size", 32 * limits.KIB),  # a row's in one go
    ("grpc.max_concurrent_streams", 1024),
]
_STATUS = {
    Ending.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Ending.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Ending.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}
_log = get_logger("service")
Context: TypeAlias = Any  # grpc.aio.ServicerContext: gRPC ships no types


class GrpcServer:
    """See service.Server."""

    def __init__(self, service: ExpertService, health: Health) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((_Methods(service).handler(),))
        self._health = _health_servicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health.listeners.append(self._set_serving)
        self._certificate: Any = None  # gRPC's: under TLS

    async def start(self, listen: ListenAddress, tls: ServerTls | None) -> int:
        """Listen; return the port."""
        port: int
        if tls is None:
            port = self._server.add_insecure_port(listen.grpc_target)
        else:
            self.use_tls(tls)
            credentials = grpc.dynamic_ssl_server_credentials(
                self._certificate, lambda: self._certificate, tls.files.is_mutual
            )
            port = self._server.add_secure_port(listen.grpc_target, credentials)
        await self._server.start()
        return port

    def use_tls(self, tls: ServerTls) -> None:
        """Show another certificate from the next connection on: gRPC asks at each."""
        self._certificate = grpc.ssl_server_certificate_configuration(
            [(tls.key, tls.cert)], tls.client_ca
        )

    async def stop(self, grace_s: float) -> None:
        """End within that time."""
        await self._server.stop(grace_s)

    async def _set_serving(self, is_serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if is_serving else statuses.NOT_SERVING
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


def _health_servicer() -> Any:
    return health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]


class _Methods:
    """The service's methods as gRPC calls them."""

    def __init__(self, service: ExpertService) -> None:
        self._service = service

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `server.add_generic_rpc_handlers` takes."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self._describe, pb.DescribeRequest.FromString, _serialise
                ),
                "Drain": grpc.unary_unary_rpc_method_handler(
                    self._drain, pb.DrainRequest.FromString, _serialise
                ),
                "Reload": grpc.unary_unary_rpc_method_handler(
                    self._reload, pb.ReloadRequest.FromString, _serialise
                ),
                "Execute": grpc.stream_stream_rpc_method_handler(self._execute),
            },
        )

    async def _describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        """Answer Describe."""
        return self._service.facts_reply()

    async def _drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        """Answer Drain, at once."""
        return self._service.begin_drain(request)

    async def _reload(self, request: pb.ReloadRequest, context: Context) -> pb.ReloadReply:
        """Answer Reload, once it is done."""
        return reload_reply(await self._service.begin_reload())

    async def _execute(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Carry one stream from its Open to its end."""
        stream = _Stream(context)
        closing = asyncio.Event()
        stream_id, session = self._service.start_session(stream.emit, closing.set)
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(_read_frames(session, stream, context, closing))
                closer = group.create_task(_interrupt_when(closing, stream, reader))
                group.create_task(stream.write_until_stopped(session))
                ended = await _outcome(reader)
                closer.cancel()
                stream.stop()
        finally:
            self._service.end_session(stream_id)
        if ended is not None:
            _log.warning("stream ended", stream=stream_id, status=ended.ending.name, why=str(ended))
            await context.abort(_STATUS[ended.ending], str(ended))


class _Stream:
    """The outgoing half of an Execute stream: frames in order, one write at a time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._outbox: deque[tuple[bytes, int]] = deque()  # bounded by the session's credit
        self._woken = asyncio.Event()
        self._is_writing = False
        self._is_stopping = False
        self.reader_will_flush = False
        self.reader_is_waiting = False

    def emit(self, frame: bytes, credit_bytes: int) -> None:
        """Queue a frame; the reader flushes after what it does, the writer all else."""
        self._outbox.append((frame, credit_bytes))
        if not self.reader_will_flush:
            self._woken.set()

    async def flush(self, session: Session) -> None:
        """Send what is queued, unless somebody is at it, who then sends this too."""
        if self._is_writing:
            return
        self._is_writing = True
        try:
            while self._outbox:
                frame, credit_bytes = self._outbox.popleft()
                await self._context.write(frame)
                session.sent(credit_bytes)
        finally:
            self._is_writing = False
            if self._is_stopping:
                self._woken.set()

    async def write_until_stopped(self, session: Session) -> None:
        """Send frames that come from elsewhere than the stream's reader.

        Returns once stopped and every call has been answered. Never cancelled in the middle of a
        write unless the whole stream is gone: gRPC takes one write at a time.
        """
        while True:
            await self._woken.wait()
            self._woken.clear()
            await self.flush(session)
            if self._is_stopping and not (self._is_writing or session.has_calls):
                return

    def stop(self) -> None:
        """Let `write_until_stopped` return when its work is done."""
        self._is_stopping = True
        self._woken.set()


async def _read_frames(
    session: Session, stream: _Stream, context: Context, closing: asyncio.Event
) -> StreamEnded | None:
    while not closing.is_set():
        stream.reader_is_waiting = True
        data = await context.read()
        stream.reader_is_waiting = False
        if not isinstance(data, bytes):  # gRPC's end-of-stream marker
            return None
        stream.reader_will_flush = True
        try:
            session.receive(data)
        except StreamEnded as ended:
            return ended
        finally:
            stream.reader_will_flush = False
        await stream.flush(session)
    return None


async def _outcome(reader: "asyncio.Task[StreamEnded | None]") -> StreamEnded | None:
    await asyncio.wait([reader])
    return None if reader.cancelled() else reader.result()


async def _interrupt_when(
    closing: asyncio.Event, stream: _Stream, reader: "asyncio.Task[Any]"
) -> None:
    # Only while it waits for a frame: a write that is cancelled goes on inside gRPC, which then
    # refuses the next one. A reader that is writing looks at `closing` when it is done.
    await closing.wait()
    if stream.reader_is_waiting:
        reader.cancel()


def _serialise(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
