"""A node that says the wrong thing: the coordinator names it, and never uses what it said.

The node here is a gRPC server in the test's own process that follows a script; the coordinator
talks to it over either transport.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.expert_dispatch import PendingSums
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import __version__, errors, limits, numerics, ops, wire
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.transport import Transport
from shoal.v1 import expert_pb2 as pb

NUM_EXPERTS = 16
Connect = Callable[..., RemoteDispatch]
Answer = Callable[[pb.ExpertCall], list[pb.NodeFrame | bytes]]


@pytest.fixture(params=[Transport.FAST, Transport.GRPCIO])
def connect(request: pytest.FixtureRequest) -> Connect:
    return partial(open_remote_dispatch, transport=request.param, shard_wait_s=0)


def true_sums(message: pb.ExpertCall) -> NDArray[np.int64]:
    """Numbers that no other call has, in place of what real experts compute."""
    count = message.num_rows * message.dim
    sums = np.arange(count, dtype=np.int64) + 1000 * message.layer
    return sums.reshape(message.num_rows, message.dim)


@dataclass
class ScriptedNode:
    """Answers Describe with `facts`, Open with `opening`, and each call with `answer`."""

    artifact: Artifact
    answer: Answer
    opening: list[pb.NodeFrame | bytes] = field(
        default_factory=lambda: [
            pb.NodeFrame(opened=pb.Opened(credit_bytes=limits.CREDIT_BYTES, max_rows_per_call=512))
        ]
    )
    changes: dict[str, object] = field(default_factory=dict)
    not_ready: int = 0  # so many first answers say that it is warming up

    def facts(self) -> pb.DescribeReply:
        last_layer = self.artifact.spec.num_layers - 1
        owned = pb.OwnedRange(last_layer=last_layer, last_expert=NUM_EXPERTS - 1)
        facts = pb.DescribeReply(
            protocol_version=limits.PROTOCOL_VERSION,
            shoal_version=__version__,
            identity=self.artifact.identity,
            numerics=numerics.NUMERICS,
            owned=[owned],
            max_rows_per_call=512,
            ready=self.not_ready <= 0,
            model_name="scripted",
        )
        self.not_ready -= 1
        for name, value in self.changes.items():
            setattr(facts, name, value)
        return facts

    def reply(self, message: pb.ExpertCall, call_id: int | None = None) -> pb.NodeFrame:
        """Return the right answer to a call, under another id if one is given."""
        grid = self.artifact.grid(message.layer)
        frame = wire.encode_reply(message.call_id, true_sums(message), grid)
        if call_id is not None:
            frame.reply.call_id = call_id
        return frame

    def execute(self, requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        yield from (_bytes(frame) for frame in self.opening)
        for request in requests:
            frame = pb.ClientFrame.FromString(request)
            if frame.WhichOneof("frame") == "call":
                for answer in self.answer(frame.call):
                    if answer == b"":
                        return
                    yield _bytes(answer)


def _bytes(frame: pb.NodeFrame | bytes) -> bytes:
    return frame if isinstance(frame, bytes) else frame.SerializeToString()


@contextmanager
def served(node: ScriptedNode) -> Iterator[str]:
    """Serve a scripted node; yields the map that gives it every expert."""
    handlers = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            lambda _request, _context: node.facts(),
            response_serializer=pb.DescribeReply.SerializeToString,
        ),
        "Execute": grpc.stream_stream_rpc_method_handler(node.execute),
    }
    with ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads)
        service = grpc.method_handlers_generic_handler("shoal.v1.ExpertService", handlers)
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"0-{NUM_EXPERTS - 1}=grpc://127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@contextmanager
def connected(
    connect: Connect, node: ScriptedNode, call_timeout_s: float = 30.0
) -> Iterator[RemoteDispatch]:
    with (
        served(node) as shards,
        closing(connect(node.artifact, shards, call_timeout_s)) as dispatch,
    ):
        yield dispatch


def start(dispatch: RemoteDispatch, artifact: Artifact, num_rows: int = 2) -> PendingSums:
    rows = np.linspace(-1, 1, num_rows * artifact.spec.model_dim, dtype=np.float32)
    plan = RoutingPlan(
        np.tile(np.arange(4, dtype=np.int32), (num_rows, 1)), np.ones((num_rows, 4), np.float32)
    )
    return dispatch.start(
        1, ops.quantise_rows(artifact.scheme(1), rows.reshape(num_rows, -1)), plan
    )


def expected(artifact: Artifact, num_rows: int = 2) -> NDArray[np.int64]:
    return true_sums(pb.ExpertCall(layer=1, num_rows=num_rows, dim=artifact.spec.model_dim))


def test_answers_that_nobody_asked_for_change_nothing(connect: Connect, artifact: Artifact) -> None:
    """Unknown ids, progress, and each answer twice: the sums are right all the same."""

    def answer(call: pb.ExpertCall) -> list[pb.NodeFrame | bytes]:
        progress = pb.NodeFrame(progress=pb.Progress(call_ids=[call.call_id, 999]))
        stranger = pb.NodeFrame(failure=pb.Failure(call_id=888, code=pb.Failure.OVERLOADED))
        right = node.reply(call)
        return [progress, node.reply(call, call_id=999), stranger, right, right]

    node = ScriptedNode(artifact, answer)
    with connected(connect, node) as dispatch:
        for _ in range(3):
            assert start(dispatch, artifact).wait().tobytes() == expected(artifact).tobytes()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda reply: setattr(reply, "grid", reply.grid + 1), "grid"),
        (lambda reply: setattr(reply, "num_rows", 1), "num_rows"),
        (lambda reply: setattr(reply, "dim", reply.dim - 1), "dim"),
        (lambda reply: setattr(reply, "sums", reply.sums[:-1]), "sums"),
        (lambda reply: setattr(reply, "widths", b"\x05" * len(reply.widths)), "sums"),
        (lambda reply: setattr(reply, "widths", b""), "widths"),
    ],
)
def test_a_reply_of_the_wrong_shape_or_grid_is_refused(
    connect: Connect, artifact: Artifact, spoil: Callable[[pb.Reply], None], words: str
) -> None:
    def answer(call: pb.ExpertCall) -> list[pb.NodeFrame | bytes]:
        frame = node.reply(call)
        spoil(frame.reply)
        return [frame]

    node = ScriptedNode(artifact, answer)
    wanted = pytest.raises(errors.MalformedMessage, match=rf"node grpc://127.*{words}")
    with connected(connect, node) as dispatch, wanted:
        start(dispatch, artifact).wait()


@pytest.mark.parametrize("answer", [b"\xff\xff\xff", pb.NodeFrame(), pb.NodeFrame(opened={})])
def test_bytes_that_are_no_answer_end_the_connection(
    connect: Connect, artifact: Artifact, answer: pb.NodeFrame | bytes
) -> None:
    node = ScriptedNode(artifact, lambda _call: [answer])
    with connected(connect, node) as dispatch:
        for _ in range(2):  # the one that waits, and the next one
            with pytest.raises(errors.ShardUnavailable, match=r"node grpc://127.* sent"):
                start(dispatch, artifact).wait()


def test_a_stream_that_ends_politely_is_a_lost_node(connect: Connect, artifact: Artifact) -> None:
    node = ScriptedNode(artifact, lambda _call: [b""])
    ended = pytest.raises(errors.NodeUnreachable, match="ended its stream")
    with connected(connect, node) as dispatch, ended:
        start(dispatch, artifact).wait()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (pb.Failure.MALFORMED, errors.MalformedMessage),
        (pb.Failure.NOT_OWNED, errors.NotOwned),
        (pb.Failure.OVERLOADED, errors.NodeBusy),
        (pb.Failure.DEADLINE, errors.CallTimeout),
        (pb.Failure.UNAVAILABLE, errors.ExpertUnavailable),
        (pb.Failure.DRAINING, errors.ShardUnavailable),  # it is on its way out
        (pb.Failure.INTERNAL, errors.NodeError),
    ],
)
def test_a_failure_frame_becomes_its_error(
    connect: Connect, artifact: Artifact, code: pb.Failure.Code, error: type[errors.ShoalError]
) -> None:
    def answer(call: pb.ExpertCall) -> list[pb.NodeFrame | bytes]:
        failure = pb.Failure(call_id=call.call_id, code=code, message="the reason")
        return [pb.NodeFrame(failure=failure)]

    with connected(connect, ScriptedNode(artifact, answer)) as dispatch:
        with pytest.raises(error, match=r"node grpc://127.*the reason") as caught:
            start(dispatch, artifact).wait()
        assert type(caught.value) is error


def test_the_rows_of_a_numeric_error_are_the_layer_s_not_the_call_s(
    connect: Connect, artifact: Artifact
) -> None:
    """600 rows travel as several calls; row 3 of the call that holds row 500 is at fault."""

    def answer(call: pb.ExpertCall) -> list[pb.NodeFrame | bytes]:
        if call.call_id == faulty:
            failure = pb.Failure(call_id=call.call_id, code=pb.Failure.NON_FINITE, rows=[3])
            return [pb.NodeFrame(failure=failure)]
        return [node.reply(call)]

    node = ScriptedNode(artifact, answer)
    faulty = 3  # calls are numbered from 1
    with connected(connect, node) as dispatch, pytest.raises(errors.NumericError) as caught:
        start(dispatch, artifact, num_rows=600).wait()
    assert caught.value.rows == (400 + 3,)  # 600 rows in three calls of 200


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"numerics": "0" * 64}, errors.NodeMismatch, "computes other bits"),
        ({"protocol_version": 77}, errors.NodeMismatch, "speaks protocol 77"),
        ({"draining": True}, errors.NodeDraining, "is draining"),
        ({"max_rows_per_call": 0}, errors.MalformedMessage, "0 rows a call"),
    ],
)
def test_a_node_that_describes_itself_as_another_is_refused(
    connect: Connect,
    artifact: Artifact,
    changes: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    node = ScriptedNode(artifact, lambda _call: [], changes=changes)
    with served(node) as shards, pytest.raises(error, match=words):
        connect(artifact, shards)


def test_a_warming_node_is_waited_for(connect: Connect, artifact: Artifact) -> None:
    node = ScriptedNode(artifact, lambda call: [node.reply(call)], not_ready=2)
    told: list[str] = []
    with (
        served(node) as shards,
        closing(connect(artifact, shards, notify=told.append)) as dispatch,
    ):
        assert start(dispatch, artifact).wait().tobytes() == expected(artifact).tobytes()
    [sentence] = told
    assert "is warming up" in sentence and "grpc://127.0.0.1" in sentence


def test_a_node_that_warms_up_for_too_long_is_named(connect: Connect, artifact: Artifact) -> None:
    node = ScriptedNode(artifact, lambda _call: [], not_ready=10**6)
    named = pytest.raises(errors.NodeBusy, match=r"still warming up after 0\.1 s")
    with served(node) as shards, named:
        connect(artifact, shards, ready_timeout_s=0.1)


@pytest.mark.parametrize(
    ("opening", "error", "words"),
    [
        ([], errors.NodeUnreachable, "no answer within"),
        ([pb.NodeFrame(draining={})], errors.MalformedMessage, "did not answer Open with Opened"),
        ([b"\xff\xff"], errors.MalformedMessage, "no frame"),
    ],
)
def test_an_open_that_is_not_answered_is_named(
    connect: Connect,
    artifact: Artifact,
    opening: list[pb.NodeFrame | bytes],
    error: type[errors.NodeError],
    words: str,
) -> None:
    node = ScriptedNode(artifact, lambda _call: [], opening=opening)
    with served(node) as shards, pytest.raises(error, match=words):
        connect(artifact, shards)


def test_a_caller_that_gives_up_takes_its_call_back(connect: Connect, artifact: Artifact) -> None:
    """1. Half of a row's experts are local, and fail; the node has the other half and sits on it.
    2. The node gets a Cancel, so the connection serves on."""
    calls: list[int] = []

    def answer(call: pb.ExpertCall) -> list[pb.NodeFrame | bytes]:
        calls.append(call.call_id)
        return [] if len(calls) == 1 else [node.reply(call)]

    node = ScriptedNode(artifact, answer)
    with served(node) as shards:
        endpoint = shards.partition("=")[2]
        mixed = f"0-1={endpoint},2-{NUM_EXPERTS - 1}=local"
        with closing(connect(artifact, mixed)) as dispatch:
            rows = ops.quantise_rows(
                artifact.scheme(0), np.ones((1, artifact.spec.model_dim), np.float32)
            )
            experts = np.array([[0, 2]], np.int32)
            huge = RoutingPlan(experts, np.array([[1.0, 3e38]], np.float32))
            with pytest.raises(errors.NumericError):
                dispatch.start(0, rows, huge).wait()
            fine = RoutingPlan(experts, np.array([[1.0, 0.5]], np.float32))
            assert dispatch.start(0, rows, fine).wait().shape == (1, artifact.spec.model_dim)


def test_a_slice_cannot_compute_locally_what_it_does_not_hold(
    connect: Connect, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {layer: range(8) for layer in range(artifact.spec.num_layers)}
    monkeypatch.setattr(type(artifact), "owned_experts", held)
    with pytest.raises(errors.ShardMapError, match="a slice without experts 8-15 of layer 0"):
        connect(artifact, f"0-{NUM_EXPERTS - 1}=local")
