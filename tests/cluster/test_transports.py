"""Both transports on both ends: the same sums, the same failures, nothing left behind."""

import itertools
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.dispatch_events import Lane
from coordinator.expert_dispatch import PendingSums
from coordinator.fast_lane import FastLane
from coordinator.node_link import Greeting
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import errors, numerics, ops
from shoal.artifact import Artifact
from shoal.http2 import frames, grpc_headers
from shoal.http2.connection import Connection
from shoal.http2.frames import Kind
from shoal.router import RoutingPlan
from shoal.shard_map import Endpoint, EndpointKind
from shoal.transport import Transport
from support.cluster import Cluster
from support.expert_node import connection

pytestmark = pytest.mark.processes
KINDS = (Transport.FAST, Transport.GRPCIO)
NUM_EXPERTS = 16


@pytest.fixture(scope="module")
def fast_node(path: Path) -> Iterator[str]:
    with Cluster(Transport.FAST) as cluster:
        yield cluster.node(path).endpoint


def start(dispatch: RemoteDispatch, artifact: Artifact, layer: int, num_rows: int) -> PendingSums:
    rng = np.random.default_rng(1000 * layer + num_rows)
    x = rng.normal(size=(num_rows, artifact.spec.model_dim)).astype(np.float32)
    experts = np.array([rng.permutation(NUM_EXPERTS)[:4] for _ in range(num_rows)], np.int32)
    plan = RoutingPlan(np.sort(experts, axis=1), np.full((num_rows, 4), 0.25, np.float32))
    return dispatch.start(layer, ops.quantise_rows(artifact.scheme(layer), x), plan)


def in_process(artifact: Artifact) -> RemoteDispatch:
    return open_remote_dispatch(artifact, f"0-{NUM_EXPERTS - 1}=local")


@pytest.mark.parametrize(
    ("kind", "node_kind", "is_unix"),
    [
        *((a, b, False) for a, b in itertools.product(KINDS, KINDS)),
        (*KINDS, True),
        (*KINDS[::-1], True),
    ],
)
def test_every_pairing_brings_the_same_bits(
    path: Path, artifact: Artifact, kind: Transport, node_kind: Transport, is_unix: bool
) -> None:
    """Decode's one row and prefill's large messages, several fan-outs in flight at once."""
    shapes = [(layer, rows) for layer in range(artifact.spec.num_layers) for rows in (1, 7, 600)]
    with closing(in_process(artifact)) as local:
        wanted = [start(local, artifact, *shape).wait().tobytes() for shape in shapes]
    with Cluster(node_kind) as cluster:
        a, b = cluster.nodes(path, is_unix=is_unix)
        shards = f"0-7={a.endpoint},8-15={b.endpoint}"
        with closing(open_remote_dispatch(artifact, shards, transport=kind)) as dispatch:
            for _ in range(3):
                pending = [start(dispatch, artifact, *shape) for shape in shapes]
                assert [one.wait().tobytes() for one in pending] == wanted


def test_many_threads_each_get_their_own_sums(fast_node: str, artifact: Artifact) -> None:
    """Whoever waits moves everybody's frames: nobody sleeps for ever, nobody gets another's."""
    with closing(in_process(artifact)) as local:
        wanted = {rows: start(local, artifact, 0, rows).wait().tobytes() for rows in (1, 2, 3, 300)}
    outcomes: list[bool] = []
    shards = f"0-{NUM_EXPERTS - 1}={fast_node}"

    def work(rows: int) -> None:
        for _ in range(20):
            sums = start(dispatch, artifact, 0, rows).wait()
            outcomes.append(sums.tobytes() == wanted[rows])

    with closing(open_remote_dispatch(artifact, shards, transport=Transport.FAST)) as dispatch:
        threads = [threading.Thread(target=work, args=(rows,)) for rows in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes == [True] * 80


def test_nothing_is_left_behind(fast_node: str, artifact: Artifact) -> None:
    def held() -> tuple[int, set[str]]:
        threads = {thread.name for thread in threading.enumerate() if thread.name == "shoal-fast"}
        remote = int(fast_node.rpartition(":")[2])
        found = [c for c in psutil.Process().net_connections("tcp") if c.raddr]
        return sum(c.raddr.port == remote and c.status == "ESTABLISHED" for c in found), threads

    for _ in range(3):
        dispatch = open_remote_dispatch(
            artifact, f"0-{NUM_EXPERTS - 1}={fast_node}", transport=Transport.FAST
        )
        start(dispatch, artifact, 0, 1).wait()
        assert held() == (2, {"shoal-fast"})
        pending = start(dispatch, artifact, 0, 1)
        dispatch.close()
        try:
            pending.wait()  # ended: answered before the end, or told of it
        except errors.NodeUnreachable as error:
            assert "are closed" in str(error)
        assert held() == (0, set())
        dispatch.close()  # again
        with pytest.raises(errors.NodeUnreachable, match="are closed"):
            start(dispatch, artifact, 0, 1).wait()


def test_a_silent_peer_is_asked_for_a_sign_of_life_and_then_given_up(
    fast_node: str, artifact: Artifact
) -> None:
    """1. The node answers a PING. 2. One whose answer is not heard for 4 s is lost."""
    endpoint = Endpoint(EndpointKind.GRPC, fast_node.removeprefix("grpc://"))
    with closing(FastLane(endpoint, Lane.INTERACTIVE)) as lane:
        lane.open(Greeting(artifact.identity, numerics.NUMERICS, bytes(16)), 0)
        lane.tick(time.monotonic() + 11)
        lane.flush()
        select.select([lane], [], [], 20)
        assert list(lane.receive(memoryview(bytearray(4096)))) == []
        lane.tick(time.monotonic() + 9)  # heard of just now
        lane.tick(time.monotonic() + 11)
        lane.tick(time.monotonic() + 14)
        with pytest.raises(errors.NodeUnreachable, match="no answer to a ping"):
            lane.tick(time.monotonic() + 16)


class Spoiler:
    """A wire to a node that carries bytes as they are, until it is told what to do instead."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host.rpartition("/")[2], int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.spoil: bytes | None = None  # what the coordinator gets in place of an answer
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if self.spoil is not None:  # once spoiled, nobody is met through it again
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            for ends in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(65536):
                if is_answer and self.spoil is not None:
                    sink.sendall(self.spoil)
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        self.listener.close()
        for end in self._sockets:
            end.close()


@contextmanager
def spoiled(endpoint: str) -> Iterator[tuple[Spoiler, str]]:
    with closing(Spoiler(endpoint)) as spoiler:
        yield spoiler, f"grpc://127.0.0.1:{spoiler.listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (b"", "is not reachable"),
        (b"\0\0\x10\0\0\0\0\0\1half", "is not reachable"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n" * 9, "a frame of 4740180"),
        (frames.pack(Kind.DATA, 0, 77, b"?"), "PROTOCOL_ERROR"),
        (frames.pack(Kind.DATA, 0, 1, b"\1\0\0\0\0"), "compressed"),
        (frames.pack(Kind.DATA, 0, 1, b"\0\xff\0\0\0"), "4278190080 b"),
        (frames.pack(Kind.DATA, 0, 1, b"\0\0\0\0\2\xff\xff"), "no frame"),
        (frames.pack(Kind.RST_STREAM, 0, 1, bytes(4)), "was reset"),
        (frames.pack(Kind.GOAWAY, 0, 0, bytes(8) + b"moving"), "moving"),
        (frames.pack(Kind.DATA, 1, 1), "no trailers"),
    ],
)
def test_broken_bytes_name_their_node_and_disturb_no_other(
    fast_node: str, artifact: Artifact, spoil: bytes, words: str
) -> None:
    """The coordinator is fast. The node behind the spoiled wire is lost, the other serves on."""
    with spoiled(fast_node) as (spoiler, endpoint):
        shards = f"0-7@0={endpoint},8-15@0={fast_node},0-15@1-2={fast_node}"
        with closing(
            open_remote_dispatch(artifact, shards, shard_wait_s=0, transport=Transport.FAST)
        ) as dispatch:
            before = start(dispatch, artifact, 0, 5).wait().tobytes()
            assert before == start(dispatch, artifact, 0, 5).wait().tobytes()
            fine = start(dispatch, artifact, 1, 5)
            spoiler.spoil = spoil
            lost = "no node is left for experts 0-7 of layer 0"
            with pytest.raises(errors.ShardUnavailable, match=f"{lost}.*node {endpoint}.*{words}"):
                start(dispatch, artifact, 0, 5).wait()
            fine.wait()
            with pytest.raises(errors.ShardUnavailable, match=lost):  # at once: it is known
                start(dispatch, artifact, 0, 5).wait()
            start(dispatch, artifact, 1, 5).wait()


def preamble() -> bytes:
    client = Connection(is_client=True)
    client.open(grpc_headers.request("/shoal.v1.ExpertService/Execute", "x"))
    return client.take_output()


@pytest.mark.parametrize(
    "attack",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        preamble() + b"\xff" * 100,
        preamble() + frames.pack(Kind.PING, 0, 0, bytes(8)) * 5000,
        preamble() + frames.pack(Kind.HEADERS, 0, 3) + frames.pack(Kind.CONTINUATION, 0, 3) * 99,
        preamble() + frames.pack(Kind.DATA, 0, 1, b"\0\xff\xff\xff\xff"),
        preamble() + frames.pack(Kind.DATA, 0, 1, b"\0\0\0\0\3\xff\xff\xff"),
    ],
)  # fmt: skip
def test_an_attacker_s_connection_ends_and_others_go_on(
    fast_node: str, artifact: Artifact, attack: bytes
) -> None:
    """It is closed, or its stream is ended with a status; nothing hangs, nobody else notices."""
    host, _, port = fast_node.removeprefix("grpc://").rpartition(":")
    shards = f"0-{NUM_EXPERTS - 1}={fast_node}"
    with closing(open_remote_dispatch(artifact, shards)) as dispatch:
        wanted = start(dispatch, artifact, 0, 3).wait().tobytes()
        with socket.create_connection((host, int(port)), 20) as attacker:
            attacker.sendall(attack)
            answer = b""
            while not (b"grpc-status" in answer or b"HTTP/2 " in answer):
                data = attacker.recv(65536)
                if not data:
                    break
                answer += data
            assert answer, "it was let go without a word"
        assert start(dispatch, artifact, 0, 3).wait().tobytes() == wanted


def test_health_is_told_to_unmodified_clients_that_check_and_watch(path: Path) -> None:
    statuses = health_pb2.HealthCheckResponse
    with Cluster(Transport.FAST) as cluster:
        node = cluster.node(path)
        with connection(node.endpoint.removeprefix("grpc://")) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="shoal.v1.ExpertService")
            assert stub.Check(request, timeout=20).status == statuses.SERVING
            watched = stub.Watch(request, timeout=20)
            assert next(watched).status == statuses.SERVING
            stranger = health_pb2.HealthCheckRequest(service="nobody")
            assert next(stub.Watch(stranger, timeout=20)).status == statuses.SERVICE_UNKNOWN
            node.send(15)
            assert next(watched).status == statuses.NOT_SERVING
