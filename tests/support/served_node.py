"""A node's server on a loop of its own, with real experts and sockets, and a client of its wire."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import uvloop

from coordinator.dispatch_events import Lane
from expert_node.config import ListenAddress
from expert_node.fast_server import FastServer
from expert_node.lent_sockets import LentSockets
from expert_node.lifecycle import Health
from expert_node.service import ExpertService
from expert_node.worker import Worker
from shoal import wire
from shoal.artifact import Artifact
from shoal.experts.local import LocalExperts
from shoal.experts.ownership import Ownership
from shoal.http2 import frames, grpc_headers
from shoal.http2.connection import Connection
from shoal.http2.events import Event, MessageReceived
from shoal.v1 import expert_pb2 as pb
from support.streaming import call_of
from support.wire_fuzz import EXECUTE, FACTS, GREETING, Host

T = TypeVar("T")
PATIENCE_S = 60.0
ENOUGH_TO_LEND = 200  # calls


class ServedNode:
    """See the module. lends: whether plain calls may be answered beside its loop."""

    def __init__(self, artifact: Artifact, *, lends: bool = True) -> None:
        """Use `served_node`."""
        self.artifact = artifact
        self.experts = LocalExperts(artifact, Ownership(artifact.owned_experts))
        self.experts.warm_up(lambda _: None)
        for layer in artifact.owned_experts:  # a table is made when a layer is called
            while layer not in {known for known, *_ in self.experts.executor.resident_layers()}:
                self.experts.executor.compute(call_of(artifact, layer, [1, 2]))
        self.lends = lends
        self.port = 0
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served-node")
        self._thread.start()

    def run(self, what: Callable[[], T]) -> T:
        """Do something on the node's loop."""

        async def on_loop() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(PATIENCE_S)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.lent = LentSockets(loop, self.experts.executor.resident_layers)
        # To a clock that stands no call is long: none is put off to the loop's next turn.
        self.worker = Worker(self.experts.executor, loop, clock=lambda: 0.0, gate=self.lent)
        self.service = ExpertService(FACTS, self.worker, Host())
        self.server = FastServer(self.service, Health(), self.lent if self.lends else None)
        self.port = await self.server.start(ListenAddress("127.0.0.1", 0), None)

    def open(self) -> None:
        asyncio.run_coroutine_threadsafe(self.start(), self._loop).result(PATIENCE_S)

    def close(self) -> None:
        stopped = asyncio.run_coroutine_threadsafe(self.server.stop(1.0), self._loop)
        stopped.result(PATIENCE_S)
        self.run(self.lent.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.worker.close()
        self.experts.close()

    @property
    def connections(self) -> list[Connection]:
        """The HTTP/2 of each open connection, as it is while nothing is lent."""
        return [each._connection for each in self.server._connections]

    def frame(self, call_id: int, layer: int = 0, experts: Sequence[int] = (1, 5)) -> bytes:
        call = call_of(self.artifact, layer, list(experts), call_id)
        return wire.call_frame(call_id, 60_000, call)


@contextmanager
def served_node(artifact: Artifact, *, lends: bool = True) -> Iterator[ServedNode]:
    node = ServedNode(artifact, lends=lends)
    node.open()
    try:
        yield node
    finally:
        node.close()


class Peer:
    """A client of the wire with one Execute stream that is open."""

    def __init__(self, node: ServedNode, lane: Lane = Lane.INTERACTIVE, **options: int) -> None:
        """options: of the socket, by the names of socket.SO_*."""
        self._node = node
        self.socket = socket.socket()
        for name, value in options.items():
            self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(("127.0.0.1", node.port))
        self.http2 = Connection(is_client=True)
        self.stream_id = self.http2.open(grpc_headers.request(EXECUTE, "node"))
        self.events: list[Event] = []
        self._num_read = 0
        self.send(GREETING.open_frame(lane, 0))
        assert self.next_frame().HasField("opened")

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self.http2.send_message(self.stream_id, message)
        self.flush()

    def flush(self) -> None:
        if output := self.http2.take_output():
            self.socket.sendall(output)

    def receive(self) -> bool:
        """Take what comes next; False: the node has closed."""
        data = self.socket.recv(1 << 16)
        self.events += self.http2.receive(data, 0.0)
        self.flush()
        return bool(data)

    def next_frame(self) -> pb.NodeFrame:
        """Return the next frame, its times left out."""
        while True:
            while self._num_read < len(self.events):
                event = self.events[self._num_read]
                self._num_read += 1
                if isinstance(event, MessageReceived):
                    return without_times(event.payload)
            assert self.receive(), f"the node has closed; {self.events}"

    def wait_for(self, kind: type[Any]) -> None:
        """Read until such an event has come."""
        while not any(isinstance(event, kind) for event in self.events):
            assert self.receive(), f"the node has closed; {self.events}"

    def ask(self, frame: bytes) -> pb.NodeFrame:
        self.send(frame)
        return self.next_frame()

    def be_lent(self) -> "Peer":
        """Make plain calls until the node has lent this socket."""
        before = self._node.run(lambda: self._node.lent.num_lent)
        for call_id in range(10_000, 10_000 + ENOUGH_TO_LEND):
            assert self.ask(self._node.frame(call_id)).reply.call_id == call_id
            if self._node.run(lambda: self._node.lent.num_lent) > before:
                return self
        raise AssertionError("it is never lent")


def without_times(payload: bytes) -> pb.NodeFrame:
    frame = pb.NodeFrame.FromString(payload)
    if frame.HasField("reply"):
        frame.reply.queue_us = frame.reply.compute_us = frame.reply.load_us = 0
    return frame


def data_frame(stream_id: int, message: bytes) -> bytes:
    """Return a message as a frame of its own."""
    body = b"\0" + len(message).to_bytes(4, "big") + message
    return frames.header(len(body), frames.Kind.DATA, 0, stream_id) + body
