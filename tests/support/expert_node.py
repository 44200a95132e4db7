"""A real expert node process, and the other end of its streams, for tests."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import orjson

from shoal import limits
from shoal.v1 import expert_pb2 as pb

STREAM_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 60.0
SERVICE = "/shoal.v1.ExpertService/"


class NodeDied(Exception):
    """The process ended before it was ready."""

    def __init__(self, status: int, stderr: str) -> None:
        super().__init__(f"exit {status}: {stderr}")
        self.status = status
        self.stderr = stderr


@dataclass
class RunningNode:
    """A node process that has said it is ready. `ready`: what it said."""

    process: "subprocess.Popen[bytes]"
    ready: dict[str, Any]
    log: Path

    @property
    def endpoint(self) -> str:
        return str(self.ready["endpoint"])

    @property
    def target(self) -> str:
        """The endpoint as gRPC names it."""
        return self.endpoint.removeprefix("grpc://").replace("unix://", "unix:")

    def terminate(self) -> int:
        """Send SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(EXIT_TIMEOUT_S)


def start_node(
    model: Path | None, log: Path, *flags: str, env: dict[str, str] | None = None
) -> RunningNode:
    """Start `shoal node` on any free port (unless flags say otherwise) and wait until it is ready.

    Args:
        model: None: flags or variables name it.

    Raises: NodeDied with its exit status and what it said.
    """
    command = [sys.executable, "-m", "expert_node", "--json-ready"]
    command += [str(model)] if model is not None else []
    if "--listen" not in flags:
        command += ["--listen", "127.0.0.1:0"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "NO_COLOR": "1", **(env or {})},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.stdout.close()
        raise NodeDied(process.wait(EXIT_TIMEOUT_S), log.read_text())
    return RunningNode(process, orjson.loads(line), log)


@contextmanager
def running_node(
    model: Path | None, log: Path, *flags: str, env: dict[str, str] | None = None
) -> Iterator[RunningNode]:
    """Like `start_node`; the process is gone at the end of the block."""
    node = start_node(model, log, *flags, env=env)
    try:
        yield node
    finally:
        node.process.kill()
        node.process.wait(EXIT_TIMEOUT_S)
        assert node.process.stdout is not None
        node.process.stdout.close()


@contextmanager
def connection(target: str) -> Iterator[grpc.Channel]:
    """A channel of its own to a node."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    ]
    with grpc.insecure_channel(target, options=options) as channel:
        yield channel


def describe(channel: grpc.Channel) -> pb.DescribeReply:
    """Ask the node who it is."""
    method = channel.unary_unary(
        SERVICE + "Describe", pb.DescribeRequest.SerializeToString, pb.DescribeReply.FromString
    )
    reply: pb.DescribeReply = method(pb.DescribeRequest(), timeout=STREAM_TIMEOUT_S)
    return reply


def drain(channel: grpc.Channel, reason: str) -> pb.DrainReply:
    """Ask the node to leave."""
    method = channel.unary_unary(
        SERVICE + "Drain", pb.DrainRequest.SerializeToString, pb.DrainReply.FromString
    )
    reply: pb.DrainReply = method(pb.DrainRequest(reason=reason), timeout=STREAM_TIMEOUT_S)
    return reply


def reload(channel: grpc.Channel) -> pb.ReloadReply:
    """Ask the node to read its configuration again; return once it has."""
    method = channel.unary_unary(
        SERVICE + "Reload", pb.ReloadRequest.SerializeToString, pb.ReloadReply.FromString
    )
    reply: pb.ReloadReply = method(pb.ReloadRequest(), timeout=STREAM_TIMEOUT_S)
    return reply


class Stream:
    """One Execute stream, as raw frames."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        requests: Iterator[bytes] = iter(self._outgoing.get, None)
        self._call = channel.stream_stream(SERVICE + "Execute")(requests, timeout=STREAM_TIMEOUT_S)

    def send(self, frame: pb.ClientFrame | bytes) -> None:
        """Send a frame, or bytes that are none."""
        self._outgoing.put(frame if isinstance(frame, bytes) else frame.SerializeToString())

    def receive(self) -> pb.NodeFrame:
        """Return the next frame that is no progress frame.

        Raises: StopIteration when the node ended the stream in peace, grpc.RpcError otherwise.
        """
        while True:
            frame = pb.NodeFrame.FromString(next(self._call))
            if frame.WhichOneof("frame") != "progress":
                return frame

    def open(
        self, who: pb.DescribeReply, lane: pb.Lane = pb.LANE_INTERACTIVE, **changes: Any
    ) -> None:
        """Send the Open that fits that node, except for `changes`, and take its answer."""
        fields: dict[str, Any] = {
            "protocol_version": limits.PROTOCOL_VERSION,
            "identity": who.identity,
            "numerics": who.numerics,
            "lane": lane,
            "coordinator_nonce": b"0123456789abcdef",
            "stream_epoch": 1,
        }
        self.send(pb.ClientFrame(open=fields | changes))
        assert self.receive().opened.credit_bytes == who.credit_bytes

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        self._outgoing.put(None)

    def cancel(self) -> None:
        """Break the stream off."""
        self._call.cancel()
