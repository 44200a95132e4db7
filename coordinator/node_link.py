"""One node's connections: channel options, Describe, the Open handshake, frames in and out.

Two channels a node, so that a prefill's megabytes never stand before a decode's kilobytes. All of
it runs on the gRPC loop's thread.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from coordinator.dispatch_events import Lane
from coordinator.handshake import NodeFacts
from coordinator.tls import Trust, why_untrusted
from shoal import errors, limits, wire
from shoal.experts.ownership import OwnedRange
from shoal.ops.frames import ReplyView
from shoal.shard_map import Endpoint, EndpointKind
from shoal.v1 import expert_pb2 as pb

CONNECT_TIMEOUT_S = 1.8  # a node that is down is reported within 2 s
EXECUTE = "/shoal.v1.ExpertService/Execute"
DESCRIBE = "/shoal.v1.ExpertService/Describe"
_channel_numbers = itertools.count()
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Keepalive:
    """The backstop behind call deadlines: a peer that is cut off while nobody calls it.

    after_s: of silence a PING goes out; gRPC nodes take no more than two a second.
    timeout_s: without an answer to it the node is lost. A node that hangs during a call is the
        dispatch core's to find, in 2 s: pings are more patient.
    """

    after_s: float = 10.0
    timeout_s: float = 4.0


KEEPALIVE = Keepalive()


@dataclass(frozen=True, slots=True)
class Greeting:
    """What Open says of this coordinator. nonce: 16 bytes, new for each NodeClient."""

    identity: str
    numerics: str
    nonce: bytes

    def open_frame(self, lane: Lane, stream_epoch: int) -> bytes:
        """Return the first frame of a stream."""
        opening = pb.Open(
            protocol_version=limits.PROTOCOL_VERSION,
            identity=self.identity,
            numerics=self.numerics,
            lane=pb.LANE_BULK if lane is Lane.BULK else pb.LANE_INTERACTIVE,
            coordinator_nonce=self.nonce,
            stream_epoch=stream_epoch,
        )
        return pb.ClientFrame(open=opening).SerializeToString()


class LaneLink:
    """One stream on a channel of its own."""

    def __init__(
        self, node: str, target: str, lane: Lane, keepalive: Keepalive, trust: Trust | None = None
    ) -> None:
        """Nothing is opened yet. trust: of a node with TLS."""
        self.node, self.lane = node, lane
        self._trust = trust
        self._target = target
        self._keepalive = keepalive
        # A bare deque: asyncio.Queue costs 20 us a frame more. Credit bounds what is in it.
        self._outbox: deque[bytes] = deque()
        self._filled: asyncio.Future[None] | None = None  # what the idle writer waits for
        self._channel: grpc.aio.Channel | None = None
        self._stream: Any = None
        self._broken: errors.NodeError | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            options = channel_options(self._keepalive)
            if self._trust is None:
                self._channel = grpc.aio.insecure_channel(self._target, options=options)
            else:
                if self._trust.server_name is not None:
                    options.append(("grpc.ssl_target_name_override", self._trust.server_name))
                credentials = self._trust.credentials()
                self._channel = grpc.aio.secure_channel(self._target, credentials, options=options)
        return self._channel

    async def open(self, greeting: Greeting, stream_epoch: int) -> pb.Opened:
        """Start the stream and return the node's answer to Open. Raises NodeError."""
        self._stream = self.channel.stream_stream(EXECUTE)()
        await _answer(self.node, self._stream.write(greeting.open_frame(self.lane, stream_epoch)))
        answer, _ = await _answer(self.node, self.read())
        return opened_of(self.node, answer)

    def send(self, frame: bytes) -> None:
        """Queue a frame. Frames go out in order."""
        self._outbox.append(frame)
        if self._filled is not None:
            self._filled.set_result(None)
            self._filled = None

    async def write_loop(self) -> None:
        """Write what is queued, until the stream ends: its reader is the one to report that."""
        try:
            while True:
                while self._outbox:
                    await self._stream.write(self._outbox.popleft())
                self._filled = asyncio.get_running_loop().create_future()
                await self._filled
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
        except asyncio.CancelledError:
            if self._broken is None:
                raise

    async def read(self) -> tuple[pb.NodeFrame | ReplyView, int]:
        """Return the next frame and its size in bytes.

        Raises NodeUnreachable when there is none: the stream has ended, however politely.
        """
        try:
            data = await self._stream.read()
        except grpc.aio.AioRpcError as error:
            raise self._broken or _error_of_status(self.node, error) from error
        except asyncio.CancelledError:
            if self._broken is not None:
                raise self._broken from None
            raise
        if not isinstance(data, bytes):
            raise polite_end(self.node)
        return frame_of(self.node, data), len(data)

    def break_off(self, error: errors.NodeError) -> None:
        """End the stream without its peer: whoever reads it is told that error."""
        self._broken = error
        if self._stream is not None:
            self._stream.cancel()

    async def close(self) -> None:
        """Close the channel, and with it the stream."""
        if self._channel is not None:
            await self._channel.close()


class NodeLink:
    """A node's two lanes, and its unary calls, which travel on the interactive channel."""

    def __init__(
        self, endpoint: Endpoint, keepalive: Keepalive, trust: Trust | None = None
    ) -> None:
        """Nothing is opened yet. trust: what `grpcs://` nodes are met with."""
        self.node = str(endpoint)
        self._endpoint = endpoint
        self._trust = trust if endpoint.kind is EndpointKind.GRPCS else None
        is_unix = endpoint.kind is EndpointKind.UNIX
        target = f"unix:{endpoint.address}" if is_unix else endpoint.address
        self.lanes = {
            lane: LaneLink(self.node, target, lane, keepalive, self._trust) for lane in Lane
        }

    async def describe(self) -> NodeFacts:
        """Ask the node who it is. Raises NodeUnreachable within CONNECT_TIMEOUT_S.

        NodeUntrusted, where TLS is why, may take PROBE_TIMEOUT_S more.
        """
        call = self.lanes[Lane.INTERACTIVE].channel.unary_unary(
            DESCRIBE,
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.DescribeReply.FromString,
        )
        request = pb.DescribeRequest(protocol_version=limits.PROTOCOL_VERSION)
        waiting = call(request, timeout=CONNECT_TIMEOUT_S)
        try:
            return _facts(await _answer(self.node, waiting))
        except errors.NodeUnreachable as error:
            if not isinstance(error.__cause__, grpc.aio.AioRpcError):
                raise  # silent: it would be to a probe, too
            untrusted = await why_untrusted(self._endpoint, self._trust)
            raise untrusted or error from error.__cause__

    async def close(self) -> None:
        for lane in self.lanes.values():
            await lane.close()


def channel_options(keepalive: Keepalive) -> list[tuple[str, int | str]]:
    """Return gRPC's options of one channel."""
    timeout_ms = int(keepalive.timeout_s * 1000)
    return [
        # Channels to one target share a connection unless an argument differs.
        ("shoal.channel", next(_channel_numbers)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(keepalive.after_s * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),  # its default, 60 s, would win (1.85.1)
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.lookahead_bytes", 16 * limits.MIB),
        ("grpc.experimental.tcp_min_read_chunk_size", 32 * limits.KIB),  # a row's in one go
        ("grpc.enable_retries", 0),  # retrying is the dispatch core's business
        ("grpc.enable_http_proxy", 0),  # nodes are peers, not web sites
    ]


async def _answer(node: str, waiting: Awaitable[_T]) -> _T:
    """Await a step of the handshake, bounded; a failed one becomes the node's error."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await waiting
    except grpc.aio.AioRpcError as error:
        raise _error_of_status(node, error) from error
    except TimeoutError as error:
        raise silent(node) from error


def silent(node: str) -> errors.NodeUnreachable:
    """Return the error of a node that does not answer a step of the handshake."""
    return errors.NodeUnreachable(
        f"node {node} accepts connections but gave no answer within {CONNECT_TIMEOUT_S:g} s: "
        "it hangs, or something else listens there"
    )


def _error_of_status(node: str, error: grpc.aio.AioRpcError) -> errors.NodeError:
    if "execute_batch" in (error.debug_error_string() or ""):
        # A write met a stream that had ended, politely or not: grpc.aio reports itself (1.85.1).
        return error_of_status(node, "UNAVAILABLE", "its stream ended during a write")
    # gRPC chains its layers' messages; of a broken connection the last one says why.
    details = error.details() or error.code().name
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        details = details.rpartition(": ")[2].strip("[]{} ")
    return error_of_status(node, error.code().name, details)


def error_of_status(node: str, status: str, details: str) -> errors.NodeError:
    """Return what a stream's end with that gRPC status means."""
    match status:
        case "UNAVAILABLE":
            return errors.NodeUnreachable(
                f"node {node} is not reachable ({details}): start it with `shoal node`, or correct "
                "--moe-shards"
            )
        case "DEADLINE_EXCEEDED":
            return silent(node)
        case "FAILED_PRECONDITION":
            return errors.NodeMismatch(f"node {node} refuses this coordinator: {details}")
        case "UNIMPLEMENTED":
            return errors.NodeMismatch(
                f"node {node} is a gRPC server, but no shoal node: {details}"
            )
        case "INVALID_ARGUMENT" | "RESOURCE_EXHAUSTED":
            return errors.MalformedMessage(f"node {node}: {details}")
        case _:
            return errors.NodeError(f"node {node}: {details} ({status})")


def frame_of(node: str, data: bytes | memoryview) -> pb.NodeFrame | ReplyView:
    """Return the frame that a message holds; a reply may be a view of the data.

    Raises MalformedMessage: none.
    """
    reply = wire.parse_reply(data)
    if reply is not None:
        return reply
    try:
        return pb.NodeFrame.FromString(bytes(data))
    except DecodeError as error:
        raise errors.MalformedMessage(f"node {node} sent bytes that are no frame") from error


def opened_of(node: str, answer: pb.NodeFrame | ReplyView) -> pb.Opened:
    """Return a node's answer to Open. Raises MalformedMessage: it is none."""
    if isinstance(answer, ReplyView) or answer.WhichOneof("frame") != "opened":
        raise errors.MalformedMessage(f"node {node} did not answer Open with Opened")
    return answer.opened


def polite_end(node: str) -> errors.NodeUnreachable:
    """Return the error of a stream that ended without one."""
    return errors.NodeUnreachable(f"node {node} ended its stream: it is shutting down")


def _facts(reply: pb.DescribeReply) -> NodeFacts:
    return NodeFacts(
        protocol_version=reply.protocol_version,
        shoal_version=reply.shoal_version,
        identity=reply.identity,
        model_name=reply.model_name,
        numerics=reply.numerics,
        instance_epoch=reply.instance_epoch,
        owned=tuple(
            OwnedRange(x.first_layer, x.last_layer, x.first_expert, x.last_expert)
            for x in reply.owned
        ),
        quantisation=reply.quantisation,
        isa=reply.isa,
        num_threads=reply.num_threads,
        max_rows_per_call=reply.max_rows_per_call,
        is_ready=reply.ready,
        is_draining=reply.draining,
    )
