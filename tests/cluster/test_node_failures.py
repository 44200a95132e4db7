"""Nodes that die, hang, are missing or are the wrong ones: a clear error, never a wrong token.

Every test runs in all four pairings of transports.
"""

import itertools
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from client.node_process import NodeProcess
from coordinator.expert_dispatch import PendingSums
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import errors, ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.transport import Transport
from support.cluster import Cluster, Flags, freeze, kill, thaw
from support.tiny_model import make_tiny_artifact

pytestmark = pytest.mark.processes
KINDS = (Transport.FAST, Transport.GRPCIO)
Connect = Callable[..., RemoteDispatch]


@pytest.fixture(params=list(itertools.product(KINDS, KINDS)), ids="-".join)
def pairing(request: pytest.FixtureRequest) -> tuple[Transport, Transport]:
    """Of the coordinator and of the nodes."""
    coordinator, nodes = request.param
    return coordinator, nodes


@dataclass(frozen=True)
class Shared:
    """Nodes of one transport that every test leaves as they were. a, b: equal, and whole.

    other: of another model. partial: with experts 0-11 of layers 0-1 only.
    """

    a: NodeProcess
    b: NodeProcess
    other: NodeProcess
    partial: NodeProcess


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    return make_tiny_artifact(folder, "qwen3_moe", "q8_0", seed=1, name="other")


@pytest.fixture(scope="module")
def shared_of(path: Path, other: Path) -> Iterator[dict[Transport, Shared]]:
    owned: list[Flags] = [{}, {}, {"experts": "0-11", "layers": "0-1"}]
    with ExitStack() as stack:
        shared = {}
        for kind in KINDS:
            cluster = stack.enter_context(Cluster(kind))
            a, b, part = cluster.nodes(path, owned)
            shared[kind] = Shared(a, b, cluster.node(other), part)
        yield shared


@pytest.fixture
def shared(pairing: tuple[Transport, Transport], shared_of: dict[Transport, Shared]) -> Shared:
    return shared_of[pairing[1]]


@pytest.fixture
def cluster(pairing: tuple[Transport, Transport]) -> Iterator[Cluster]:
    """For nodes that do not survive the test."""
    with Cluster(pairing[1]) as cluster:
        yield cluster


@pytest.fixture
def connect(pairing: tuple[Transport, Transport]) -> Connect:
    return partial(open_remote_dispatch, transport=pairing[0], shard_wait_s=0)


def start_layer(dispatch: RemoteDispatch, artifact: Artifact, layer: int = 0) -> PendingSums:
    """Start one row that visits all 16 experts, so every node of the map."""
    x = np.linspace(-1, 1, artifact.spec.model_dim, dtype=np.float32)[None]
    plan = RoutingPlan(np.arange(16, dtype=np.int32)[None], np.full((1, 16), 0.1, np.float32))
    return dispatch.start(layer, ops.quantise_rows(artifact.scheme(layer), x), plan)


def assert_refused(
    connect: Connect, artifact: Artifact, shards: str, error: type[errors.ShoalError], *words: str
) -> None:
    """Check that connecting fails with exactly that error, whose message has those words."""
    with pytest.raises(error) as caught:
        connect(artifact, shards, ready_timeout_s=1).close()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_node_killed_mid_call_is_unreachable_within_two_seconds(
    connect: Connect, shared: Shared, cluster: Cluster, path: Path, artifact: Artifact
) -> None:
    """1. Both nodes are open. 2. Node b freezes, and a call goes out to both. 3. b is killed.
    4. The call fails for want of another owner of its range, as nobody is to wait for one.
    5. Whoever needs b afterwards is told at once.
    """
    a, b = shared.a, cluster.node(path)
    shards = f"0-7={a.endpoint},8-15={b.endpoint}"
    with closing(connect(artifact, shards)) as dispatch:
        start_layer(dispatch, artifact).wait()
        freeze(b)
        pending = start_layer(dispatch, artifact)
        kill(b)
        for attempt in (pending, start_layer(dispatch, artifact)):
            with pytest.raises(errors.ShardUnavailable, match=f"8-15.*{b.endpoint}"):
                attempt.wait()


def test_a_hung_node_is_given_up_and_met_again_when_it_goes_on(
    connect: Connect, shared: Shared, artifact: Artifact
) -> None:
    """1. Node b freezes. 2. A call notices: b is given up. 3. b goes on; its late answer is lost.
    4. b is met again, the call is sent anew and gets its own answer, as does the next one.
    """
    a, b = shared.a, shared.b
    shards = f"0-7={a.endpoint},8-15={b.endpoint}"
    told: list[str] = []

    def hear(text: str) -> None:
        told.append(text)
        if "no sign of life" in text:
            thaw(b)

    patient = connect(artifact, shards, call_timeout_s=1.0, shard_wait_s=60, notify=hear)
    with closing(patient) as dispatch:
        before = [start_layer(dispatch, artifact, layer).wait() for layer in (0, 1)]
        freeze(b)
        after = [start_layer(dispatch, artifact, layer).wait() for layer in (0, 1)]
        for one, other in zip(before, after, strict=True):
            assert one.tobytes() == other.tobytes()
    lost, back = told[:2]
    assert f"node {b.endpoint} gave no sign of life" in lost and f"{b.endpoint} is back" in back


def test_a_node_that_drains_finishes_the_call_and_takes_no_new_one(
    connect: Connect, shared: Shared, cluster: Cluster, path: Path, artifact: Artifact
) -> None:
    """1. Node b freezes with a call on its way to it. 2. It is told to leave, and goes on.
    3. The call ends (answered, or refused as draining). 4. The next one fails by name.
    """
    a, b = shared.a, cluster.node(path)
    shards = f"0-7={a.endpoint},8-15={b.endpoint}"
    with closing(connect(artifact, shards)) as dispatch:
        expected = start_layer(dispatch, artifact).wait()
        freeze(b)
        pending = start_layer(dispatch, artifact)
        b.send(signal.SIGTERM)
        thaw(b)
        try:
            assert pending.wait().tobytes() == expected.tobytes()
        except (errors.NodeDraining, errors.NodeUnreachable) as error:
            assert b.endpoint in str(error)
        b.wait()
        with pytest.raises(errors.NodeError, match=b.endpoint):
            start_layer(dispatch, artifact).wait()
        assert b.exit_status == 0


def test_a_node_down_at_start_is_named(connect: Connect, artifact: Artifact) -> None:
    port = free_port()
    assert_refused(
        connect,
        artifact,
        f"0-15=grpc://127.0.0.1:{port}",
        errors.NodeUnreachable,
        f"node grpc://127.0.0.1:{port} is not reachable",
        "Connection refused",
        "shoal node",
    )
    assert_refused(
        connect, artifact, "0-15=unix:///nowhere.sock", errors.NodeUnreachable, "unix:///nowhere"
    )


def test_every_node_that_is_down_is_named(
    connect: Connect, shared: Shared, artifact: Artifact
) -> None:
    up = shared.a.endpoint
    ports = free_port(), free_port()
    shards = f"0-3={up},4-7=grpc://127.0.0.1:{ports[0]},8-15=grpc://127.0.0.1:{ports[1]}"
    assert_refused(
        connect, artifact, shards, errors.NodeUnreachable, f":{ports[0]} is", f":{ports[1]} is"
    )


def test_a_node_frozen_at_start_is_named(
    connect: Connect, shared: Shared, artifact: Artifact
) -> None:
    endpoint = shared.b.endpoint
    freeze(shared.b)
    try:
        assert_refused(
            connect, artifact, f"0-15={endpoint}", errors.NodeUnreachable, endpoint, "no answer"
        )
    finally:
        thaw(shared.b)


def test_something_that_is_no_node_is_named(connect: Connect, artifact: Artifact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert_refused(
            connect,
            artifact,
            f"0-15=grpc://127.0.0.1:{port}",
            errors.NodeUnreachable,
            f"127.0.0.1:{port}",
        )


def test_a_node_of_another_model_is_refused(
    connect: Connect, shared: Shared, artifact: Artifact, other: Path
) -> None:
    node = shared.other
    assert_refused(
        connect,
        artifact,
        f"0-15={node.endpoint}",
        errors.NodeMismatch,
        node.endpoint,
        "another model",
        "other",
        artifact.identity[:16],
        Artifact.open(other).identity[:16],
    )


def test_a_node_that_lacks_part_of_its_range_is_refused(
    connect: Connect, shared: Shared, artifact: Artifact
) -> None:
    node = shared.partial
    assert_refused(
        connect,
        artifact,
        f"0-7=local,8-15={node.endpoint}",
        errors.NodeMismatch,
        f"node {node.endpoint} does not own experts 12-15 of layers 0-1; experts 8-15 of layer 2",
        "it owns experts 0-11 of layers 0-1",
    )


def test_a_gapped_map_is_refused_before_any_connection(
    connect: Connect, artifact: Artifact
) -> None:
    assert_refused(
        connect,
        artifact,
        "0-7=grpc://127.0.0.1:1,9-15=grpc://127.0.0.1:1",
        errors.ShardMapError,
        "no endpoint for expert 8 of layers 0-2",
    )


def test_a_map_file_that_is_not_there_is_named(connect: Connect, artifact: Artifact) -> None:
    assert_refused(
        connect, artifact, "@nowhere.toml", errors.ShardMapError, "nowhere.toml", "No such file"
    )
