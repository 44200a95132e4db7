"""A real expert node process: what it answers, refuses, survives, and how it leaves.

The other end is unmodified grpcio; the node's is each transport in turn.
"""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shoal import ops, wire
from shoal.artifact import Artifact
from shoal.experts.call import ExpertCall
from shoal.v1 import expert_pb2 as pb
from support.expert_node import (
    NodeDied,
    RunningNode,
    Stream,
    connection,
    describe,
    drain,
    running_node,
    start_node,
)
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module", params=["fast", "grpcio"], autouse=True)
def transport(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_TRANSPORT", request.param)  # the nodes inherit it
        yield


@pytest.fixture(scope="module")
def node(
    transport: None, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningNode]:
    """One node for every test that leaves it alive. It lacks the last expert."""
    last = Artifact.open(path).owned_experts[1][-1]
    log = tmp_path_factory.mktemp("node") / "log"
    with running_node(path, log, "--experts", f"0-{last - 1}", "--threads", "1") as running:
        yield running


@pytest.fixture
def channel(node: RunningNode) -> Iterator[grpc.Channel]:
    with connection(node.target) as channel:
        yield channel


@pytest.fixture
def stream(channel: grpc.Channel) -> Iterator[Stream]:
    stream = Stream(channel)
    stream.open(describe(channel))
    yield stream
    stream.cancel()


def random_call(
    path: Path, layer: int, num_rows: int, *, seed: int = 0, num_experts: int | None = None
) -> ExpertCall:
    artifact = Artifact.open(path)
    rng = np.random.default_rng(seed)
    router = artifact.spec.layers[layer].router
    assert router is not None
    experts = num_experts or router.num_experts - 1
    per_row = min(router.experts_per_token, experts)
    x = rng.normal(size=(num_rows, artifact.spec.model_dim)).astype(np.float32)
    chosen = [rng.permutation(experts)[:per_row] for _ in range(num_rows)]
    return ExpertCall(
        layer=layer,
        rows=ops.quantise_rows(artifact.scheme(layer), x),
        row_offsets=np.arange(0, num_rows * per_row + 1, per_row, dtype=np.int32),
        experts=np.concatenate(chosen).astype(np.int32),
        weights=rng.random(num_rows * per_row).astype(np.float32),
    )


def local_sums(path: Path, call: ExpertCall) -> np.ndarray:
    return whole_executor(Artifact.open(path)).compute(call)


def sums_of(reply: pb.Reply, call: ExpertCall, grid: int) -> np.ndarray:
    into = np.zeros((call.rows.num_rows, call.rows.dim), np.int64)
    wire.add_reply(reply, np.arange(call.rows.num_rows, dtype=np.int32), grid, into)
    return into


def test_describe_says_who_the_node_is(
    path: Path, node: RunningNode, channel: grpc.Channel
) -> None:
    artifact, who = Artifact.open(path), describe(channel)
    assert who.identity == artifact.identity == node.ready["identity"]
    assert who.numerics == node.ready["numerics"]
    assert (who.ready, who.draining, who.num_threads) == (True, False, 1)
    assert (who.quantisation, who.isa) == ("q8_0", ops.isa())
    experts = artifact.owned_experts[0]
    assert [(o.first_layer, o.last_layer, o.first_expert, o.last_expert) for o in who.owned] == [
        (0, artifact.spec.num_layers - 1, 0, experts[-1] - 1)
    ]


@pytest.mark.parametrize("num_rows", [1, 2, 17, 300])
def test_a_node_answers_with_the_bits_of_a_local_executor(
    path: Path, stream: Stream, num_rows: int
) -> None:
    artifact = Artifact.open(path)
    for layer in range(artifact.spec.num_layers):
        call = random_call(path, layer, num_rows, seed=layer)
        stream.send(wire.encode_call(layer, 60_000, call))
        reply = stream.receive().reply
        assert reply.call_id == layer
        expected = local_sums(path, call)
        assert np.count_nonzero(expected) > expected.size // 2, "sums are degenerate"
        assert (sums_of(reply, call, artifact.grid(layer)) == expected).all()


def test_many_calls_in_flight_on_two_streams_each_get_their_answer(
    path: Path, channel: grpc.Channel
) -> None:
    grid = Artifact.open(path).grid(0)
    calls = {call_id: random_call(path, 0, 1 + call_id % 5, seed=call_id) for call_id in range(40)}
    streams = {lane: Stream(channel) for lane in (pb.LANE_INTERACTIVE, pb.LANE_BULK)}
    who = describe(channel)
    for lane, stream in streams.items():
        stream.open(who, lane)
    for call_id, call in calls.items():
        for stream in streams.values():
            stream.send(wire.encode_call(call_id, 60_000, call))
    for stream in streams.values():
        replies = [stream.receive().reply for _ in calls]
        assert {reply.call_id for reply in replies} == set(calls)
        for reply in replies:
            call = calls[reply.call_id]
            assert (sums_of(reply, call, grid) == local_sums(path, call)).all()
        stream.cancel()


def test_an_expert_that_is_not_owned_is_named_and_never_zeros(path: Path, stream: Stream) -> None:
    call = random_call(path, 1, 1)
    missing = Artifact.open(path).owned_experts[1][-1]
    call.experts[0] = missing
    stream.send(wire.encode_call(5, 60_000, call))
    failure = stream.receive().failure
    assert (failure.call_id, failure.code) == (5, pb.Failure.NOT_OWNED)
    assert f"expert {missing} of layer 1" in failure.message
    assert f"0-{missing - 1}" in failure.message


def test_rows_that_are_not_finite_fail_their_call_and_name_layer_and_rows(
    path: Path, stream: Stream
) -> None:
    call = random_call(path, 1, 3)
    call.rows.scales[2, 0] = np.nan
    stream.send(wire.encode_call(1, 60_000, call))
    stream.send(wire.encode_call(2, 60_000, random_call(path, 1, 1)))
    failure = stream.receive().failure
    assert (failure.code, list(failure.rows)) == (pb.Failure.NON_FINITE, [2])
    assert "layer 1" in failure.message
    assert stream.receive().reply.call_id == 2


def test_a_result_beyond_the_grid_fails_its_call_and_names_layer_and_rows(
    path: Path, stream: Stream
) -> None:
    call = random_call(path, 1, 3)
    call.weights[call.row_offsets[1]] = 3e38
    stream.send(wire.encode_call(1, 60_000, call))
    failure = stream.receive().failure
    assert (failure.code, list(failure.rows)) == (pb.Failure.NON_FINITE, [1])
    assert "layer 1" in failure.message


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("layer", 77, "layer 77"), ("dim", 32, "values"), ("scheme", 3, "values")],
)
def test_a_call_that_does_not_fit_the_model_is_malformed(
    path: Path, stream: Stream, field: str, value: int, complaint: str
) -> None:
    frame = wire.encode_call(1, 60_000, random_call(path, 0, 1))
    setattr(frame.call, field, value)
    stream.send(frame)
    failure = stream.receive().failure
    assert failure.code == pb.Failure.MALFORMED
    assert complaint in failure.message


def test_bytes_that_are_no_frame_end_their_stream_and_no_other(
    channel: grpc.Channel, path: Path, stream: Stream
) -> None:
    other = Stream(channel)
    other.open(describe(channel))
    other.send(b"\xff\xff\xff\xff")
    with pytest.raises(grpc.RpcError) as caught:
        other.receive()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no ClientFrame" in str(caught.value.details())
    stream.send(wire.encode_call(1, 60_000, random_call(path, 0, 1)))
    assert stream.receive().reply.call_id == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"identity": "0" * 64}, "model identity"),
        ({"numerics": "0" * 64}, "numerics"),
        ({"protocol_version": 2}, "protocol version"),
    ],
)
def test_a_coordinator_of_another_model_numerics_or_protocol_is_refused(
    channel: grpc.Channel, changes: dict[str, Any], complaint: str
) -> None:
    stream = Stream(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stream.open(describe(channel), **changes)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert complaint in str(caught.value.details())


def test_calls_sent_before_the_end_of_a_stream_are_still_answered(
    path: Path, stream: Stream
) -> None:
    for call_id in range(5):
        stream.send(wire.encode_call(call_id, 60_000, random_call(path, 0, 200)))
    stream.finish()
    assert [stream.receive().reply.call_id for _ in range(5)] == list(range(5))
    with pytest.raises(StopIteration):
        stream.receive()


def test_health_says_serving(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", "shoal.v1.ExpertService"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "Drain"])
def test_a_node_under_load_leaves_in_peace(path: Path, tmp_path: Path, how: str) -> None:
    """1. calls are in flight; 2. the node is told to leave; 3. each is answered once; 4. exit 0."""
    with running_node(path, tmp_path / "log") as node, connection(node.target) as channel:
        stream = Stream(channel)
        stream.open(describe(channel), pb.LANE_BULK)
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        for call_id in range(100):
            stream.send(wire.encode_call(call_id, 60_000, random_call(path, 0, 64, seed=call_id)))
        answered = [stream.receive().reply.call_id]
        if how == "Drain":
            drain(channel, "a test")
        else:
            node.process.send_signal(getattr(signal, how))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        draining = 0
        for frame in iter_frames(stream):
            match frame.WhichOneof("frame"):
                case "reply":
                    answered.append(frame.reply.call_id)
                case "failure":
                    assert frame.failure.code == pb.Failure.DRAINING
                    answered.append(frame.failure.call_id)
                case "draining":
                    draining += 1
        assert draining == 1
        assert len(answered) == len(set(answered)), "a call was answered twice"
        assert node.process.wait(60) == 0


def iter_frames(stream: Stream) -> Iterator[pb.NodeFrame]:
    """Yield frames until the node ends the stream in peace."""
    while True:
        try:
            yield stream.receive()
        except StopIteration:
            return


def test_an_idle_node_with_an_open_stream_leaves_in_peace(path: Path, tmp_path: Path) -> None:
    with running_node(path, tmp_path / "log") as node, connection(node.target) as channel:
        stream = Stream(channel)
        stream.open(describe(channel))
        assert node.terminate() == 0
        assert stream.receive().WhichOneof("frame") == "draining"
        with pytest.raises(StopIteration):
            stream.receive()


def test_warm_up_reads_everything_before_ready(path: Path, tmp_path: Path) -> None:
    with running_node(path, tmp_path / "log", "--warmup", "--log-format", "json") as node:
        assert '"event":"warm-up"' in node.log.read_text()
        assert node.terminate() == 0


def test_a_unix_socket_serves_and_is_removed(path: Path, tmp_path: Path) -> None:
    socket_path = tmp_path / "node.sock"
    listen = f"unix://{socket_path}"
    with running_node(path, tmp_path / "log", "--listen", listen) as node:
        assert node.endpoint == listen
        with connection(node.target) as channel:
            assert describe(channel).ready
        with pytest.raises(NodeDied, match="another process") as caught:
            start_node(path, tmp_path / "second", "--listen", listen)
        assert caught.value.status == 4
        assert node.terminate() == 0
        assert not socket_path.exists()


def test_a_used_port_is_refused(path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NodeDied, match=f"cannot listen on {listen}") as caught:
            start_node(path, tmp_path / "log", "--listen", listen)
        assert caught.value.status == 4


def test_two_nodes_do_not_share_a_port(path: Path, node: RunningNode, tmp_path: Path) -> None:
    with pytest.raises(NodeDied, match="cannot listen on"):
        start_node(path, tmp_path / "log", "--listen", node.target)


@pytest.mark.parametrize(
    ("flags", "status", "complaint"),
    [
        (("--experts", "0-999"), 2, "--experts: '0-999' is out of range"),
        (("--experts", "5-2"), 2, "runs backwards"),
        (("--layers", "x"), 2, "--layers: 'x'"),
        (("--listen", "nonsense"), 2, "write host:port"),
        (("--listen", "0.0.0.0:0"), 2, "--insecure"),
        (("--threads", "0"), 2, "--threads 0"),
    ],
)
def test_a_wrong_flag_is_refused_with_its_fix(
    path: Path, tmp_path: Path, flags: tuple[str, ...], status: int, complaint: str
) -> None:
    with pytest.raises(NodeDied) as caught:
        start_node(path, tmp_path / "log", *flags)
    assert caught.value.status == status
    assert complaint in caught.value.stderr


def test_insecure_listening_is_said_loudly(path: Path, tmp_path: Path) -> None:
    with running_node(path, tmp_path / "log", "--listen", "0.0.0.0:0", "--insecure") as node:
        assert "INSECURE" in node.log.read_text()


def test_the_environment_sets_what_flags_set(path: Path, tmp_path: Path) -> None:
    env = {"EXPERTS": "1-2", "LAYERS": "0", "WARMUP": "1", "PORT": "0", "SHOAL_THREADS": "1"}
    with running_node(path, tmp_path / "log", "--listen", "127.0.0.1:1", env=env) as node:
        assert (node.ready["experts"], node.ready["layers"]) == ("1-2", "0")
        assert node.ready["num_threads"] == 1
        assert not node.endpoint.endswith(":1")
        assert "warm-up" in node.log.read_text()


def test_a_flipped_bit_is_never_served(tmp_path: Path) -> None:
    """1. one bit of an expert flips; 2. lazily: its calls fail, others work; 3. warm-up refuses."""
    path = make_tiny_artifact(tmp_path, quant="q8_0")
    where = Artifact.open(path).expert_location(0, 1)
    with where.path.open("r+b") as file:
        file.seek(where.offset + 100)
        [byte] = file.read(1)
        file.seek(where.offset + 100)
        file.write(bytes([byte ^ 4]))
    with running_node(path, tmp_path / "log") as node, connection(node.target) as channel:
        stream = Stream(channel)
        stream.open(describe(channel))
        for call_id, expert in enumerate((1, 0, 1)):
            call = random_call(path, 0, 1, num_experts=1)
            call.experts[:] = expert
            stream.send(wire.encode_call(call_id, 60_000, call))
        received = [stream.receive() for _ in range(3)]  # whoever waits for no read is first
        answers = sorted(received, key=lambda each: max(each.reply.call_id, each.failure.call_id))
        for failure in (answers[0].failure, answers[2].failure):
            assert failure.code == pb.Failure.UNAVAILABLE
            assert "expert 1 of layer 0" in failure.message
        assert answers[1].reply.call_id == 1
    with pytest.raises(NodeDied, match="expert 1 of layer 0") as caught:
        start_node(path, tmp_path / "second", "--warmup")
    assert caught.value.status == 3
