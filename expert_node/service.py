"""The gRPC face of a node: moves frames between streams and sessions, answers Describe, Drain and
Reload.

No decisions here: what a frame means is the session's business. Execute is registered on raw
bytes, so that bytes that are no message reach the session instead of dying inside gRPC.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any, Protocol, TypeAlias

import grpc
import grpc.aio

from expert_node.reload import Outcome
from expert_node.session import Ending, NodeFacts, Session, StreamEnded
from expert_node.worker import Worker
from shoal import __version__, limits
from shoal.experts.call import ExpertCall
from shoal.log import get_logger
from shoal.v1 import expert_pb2 as pb

SERVICE_NAME = "shoal.v1.ExpertService"
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
    ("grpc.max_concurrent_streams", 1024),
]
_STATUS = {
    Ending.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Ending.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Ending.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}
_log = get_logger("service")
Context: TypeAlias = Any  # grpc.aio.ServicerContext: gRPC ships no types


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


class Host(Protocol):
    """The node that a service belongs to."""

    @property
    def is_ready(self) -> bool: ...

    def start_drain(self, reason: str) -> None:
        """Begin to leave."""
        ...

    def start_reload(self) -> "asyncio.Future[Outcome]":
        """Read the configuration again."""
        ...

    def on_stream(self, stream_id: int) -> None:
        """Learn of a new stream."""
        ...

    def on_stream_end(self, stream_id: int) -> None:
        """Learn that it is over."""
        ...

    def on_call(self, stream_id: int, call: ExpertCall) -> None:
        """Learn of a call that was taken in."""
        ...


class ExpertService:
    """Serves the streams of one node. Lives on the event loop's thread."""

    def __init__(self, facts: NodeFacts, worker: Worker, host: Host) -> None:
        self.facts = facts  # of the streams that open from now on
        self._worker = worker
        self._host = host
        self._stream_ids = count(1)
        self._streams: dict[int, tuple[Session, Callable[[], None]]] = {}

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `server.add_generic_rpc_handlers` takes."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self.describe, pb.DescribeRequest.FromString, _serialise
                ),
                "Drain": grpc.unary_unary_rpc_method_handler(
                    self.drain, pb.DrainRequest.FromString, _serialise
                ),
                "Reload": grpc.unary_unary_rpc_method_handler(
                    self.reload, pb.ReloadRequest.FromString, _serialise
                ),
                "Execute": grpc.stream_stream_rpc_method_handler(self.execute),
            },
        )

    async def describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        """Answer Describe."""
        return self.facts_reply()

    async def drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        """Answer Drain, at once."""
        return self.begin_drain(request)

    async def reload(self, request: pb.ReloadRequest, context: Context) -> pb.ReloadReply:
        """Answer Reload, once it is done."""
        return reload_reply(await self.begin_reload())

    @property
    def stream_ids(self) -> frozenset[int]:
        """The streams that are open."""
        return frozenset(self._streams)

    def facts_reply(self) -> pb.DescribeReply:
        """Say who this node is."""
        facts = self.facts
        return pb.DescribeReply(
            protocol_version=limits.PROTOCOL_VERSION,
            shoal_version=__version__,
            identity=facts.identity,
            numerics=facts.numerics,
            instance_epoch=facts.instance_epoch,
            owned=[
                pb.OwnedRange(
                    first_layer=owned.first_layer,
                    last_layer=owned.last_layer,
                    first_expert=owned.first_expert,
                    last_expert=owned.last_expert,
                )
                for owned in facts.owned
            ],
            quantisation=facts.quantisation,
            isa=facts.isa,
            num_threads=facts.num_threads,
            max_rows_per_call=facts.max_rows_per_call,
            max_message_bytes=limits.MAX_MESSAGE_BYTES,
            credit_bytes=facts.credit_bytes,
            ready=self._host.is_ready,
            draining=self._worker.is_draining,
            model_name=facts.model_name,
        )

    def begin_drain(self, request: pb.DrainRequest) -> pb.DrainReply:
        """Begin to leave; say how many calls are held."""
        num_held = self._worker.num_held
        self._host.start_drain(request.reason or "asked by a peer")
        return pb.DrainReply(calls_in_flight=num_held)

    def begin_reload(self) -> "asyncio.Future[Outcome]":
        """Ask for a reload; the future never fails."""
        return self._host.start_reload()

    async def execute(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Carry one stream from its Open to its end."""
        stream = _Stream(context)
        closing = asyncio.Event()
        stream_id, session = self.start_session(stream.emit, closing.set)
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(_read_frames(session, stream, context, closing))
                closer = group.create_task(_interrupt_when(closing, stream, reader))
                group.create_task(stream.write_until_stopped(session))
                ended = await _outcome(reader)
                closer.cancel()
                stream.stop()
        finally:
            self.end_session(stream_id)
        if ended is not None:
            _log.warning("stream ended", stream=stream_id, status=ended.ending.name, why=str(ended))
            await context.abort(_STATUS[ended.ending], str(ended))

    def start_session(
        self, emit: Callable[[bytes, int], None], end: Callable[[], None]
    ) -> tuple[int, Session]:
        """Return the session of a new stream, and its id.

        Args:
            emit: as Session takes it.
            end: ends the stream once it has sent what is queued: the node leaves.
        """
        stream_id = next(self._stream_ids)
        session = Session(stream_id, self.facts, self._worker, emit, observe=self._host.on_call)
        self._streams[stream_id] = (session, end)
        self._host.on_stream(stream_id)
        return stream_id, session

    def end_session(self, stream_id: int) -> None:
        """Forget a stream that is over; its calls are dropped."""
        session, _ = self._streams.pop(stream_id)
        session.close()
        self._host.on_stream_end(stream_id)

    def announce_drain(self, reason: str) -> None:
        """Tell every stream that the node is leaving."""
        for session, _ in self._streams.values():
            session.drain(reason)

    def end_streams(self) -> None:
        """Let every stream send what it has queued, and end."""
        for _, end in list(self._streams.values()):
            end()


def reload_reply(outcome: Outcome) -> pb.ReloadReply:
    """Return the answer to Reload."""
    return pb.ReloadReply(error=outcome.error, changed=outcome.changed, kept=outcome.kept)


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
