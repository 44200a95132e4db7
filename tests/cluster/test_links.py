"""The links to nodes: what one round trip carries, who notices a peer that is gone, how one leaves.

The weather is placed, not timed: a direction of the wire is shut and opened at chosen points.
"""

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import hpack
import numpy as np
import pytest

from coordinator.calls_in_flight import Fanout
from coordinator.dispatch_events import Lane
from coordinator.expert_dispatch import PendingSums, call_of_plan
from coordinator.node_link import EXECUTE, Greeting, Keepalive
from coordinator.remote_dispatch import open_remote_dispatch
from coordinator.remote_sums import RemoteSums
from shoal import numerics, ops, wire
from shoal.artifact import Artifact
from shoal.http2 import frames, grpc_headers
from shoal.http2.frames import Kind
from shoal.router import RoutingPlan
from shoal.rows import Rows
from shoal.transport import Transport, Wire
from shoal.v1 import expert_pb2 as pb
from support.chaos_proxy import FAIR, ChaosProxy, Direction, Weather, steady
from support.cluster import Cluster
from support.news import WAIT_S, News
from support.tiny_model import make_tiny_artifact

pytestmark = pytest.mark.processes
SHUT = Weather(stalls=True)
KINDS = (Transport.FAST, Transport.GRPCIO)
both_transports = pytest.mark.parametrize("transport", KINDS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, and wide: a prompt's rows are megabytes."""
    return make_tiny_artifact(
        tmp_path_factory.mktemp("model"),
        quant="q8_0",
        hidden_size=2048,
        num_hidden_layers=2,
        moe_intermediate_size=32,
    )


@pytest.fixture(scope="module")
def artifact(path: Path) -> Artifact:
    return Artifact.open(path)


@pytest.fixture(scope="module")
def nodes(path: Path) -> Iterator[dict[Transport, str]]:
    """The endpoint of a node, by its transport."""
    with ExitStack() as stack:
        clusters = {kind: stack.enter_context(Cluster(kind)) for kind in KINDS}
        yield {kind: cluster.node(path).endpoint for kind, cluster in clusters.items()}


Asked = tuple[int, Rows, RoutingPlan]


def asked(artifact: Artifact, layer: int, num_rows: int) -> Asked:
    rng = np.random.default_rng(1000 * layer + num_rows)
    x = rng.normal(size=(num_rows, artifact.spec.model_dim)).astype(np.float32)
    experts = np.array([rng.permutation(16)[:4] for _ in range(num_rows)], np.int32)
    plan = RoutingPlan(np.sort(experts, axis=1), np.full((num_rows, 4), 0.25, np.float32))
    return layer, ops.quantise_rows(artifact.scheme(layer), x), plan


def sums_here(artifact: Artifact, questions: list[Asked]) -> list[bytes]:
    with closing(open_remote_dispatch(artifact, "0-15=local")) as local:
        return [local.start(*question).wait().tobytes() for question in questions]


@both_transports
@pytest.mark.parametrize(
    "shapes",
    [
        [(0, 512)],
        [(n % 2, 1 + n % 32) for n in range(60)],
    ],
    ids=["prompt", "all-layers-at-once"],
)
def test_what_is_asked_at_once_takes_one_round_trip(
    nodes: dict[Transport, str],
    artifact: Artifact,
    transport: Transport,
    shapes: list[tuple[int, int]],
) -> None:
    """A layer of a 512-token prompt; sixty layers of a batch pass, none waited for meanwhile.

    1. Nothing comes back from the node: all that is asked arrives there nevertheless.
    2. Nothing goes there any more: all answers arrive nevertheless. No window, no credit, no
    acknowledgement cost a second trip, and nothing was sent twice.
    """
    questions = [asked(artifact, *shape) for shape in shapes]
    wanted = sums_here(artifact, questions)
    with ChaosProxy(nodes[transport]) as proxy:
        shards = f"0-15={proxy.endpoint}"
        with closing(open_remote_dispatch(artifact, shards, transport=transport)) as dispatch:
            dispatch.start(*asked(artifact, 0, 1)).wait()
            proxy.forecast = steady(FAIR, SHUT)
            before = proxy.num_carried(Direction.UP)
            pending = [dispatch.start(*question) for question in questions]
            sizes = [
                len(call.frame(call.call_id)) for one in pending for call in fanout_of(one).calls
            ]
            proxy.wait_carried(Direction.UP, before + sum(sizes), WAIT_S)
            proxy.forecast = steady(SHUT, FAIR)
            assert [one.wait().tobytes() for one in pending] == wanted
            assert all(fanout_of(one).retries == [] for one in pending)
            health = dispatch.health(proxy.endpoint)
            assert health is not None and not health.is_suspect and not health.demoted_until_s
            proxy.forecast = steady(FAIR)
    if len(shapes) == 1:
        assert len(sizes) == 2 and min(sizes) > 256 * 1024, "two messages on the bulk connection"


def fanout_of(pending: PendingSums) -> Fanout:
    assert isinstance(pending, RemoteSums) and pending._fanout is not None
    return pending._fanout


@both_transports
def test_a_tunnel_that_takes_the_connection_itself_hides_no_distance(
    nodes: dict[Transport, str], artifact: Artifact, transport: Transport
) -> None:
    delay_s = 0.03  # each way; connecting to the proxy takes none of it
    with ChaosProxy(nodes[transport], steady(Weather(delay_s=delay_s))) as proxy:
        shards = f"0-15={proxy.endpoint}"
        with closing(open_remote_dispatch(artifact, shards, transport=transport)) as dispatch:
            assert dispatch.farthest_s is not None and dispatch.farthest_s >= 2 * delay_s


@both_transports
def test_an_idle_node_that_is_cut_off_is_noticed_and_met_again(
    nodes: dict[Transport, str], artifact: Artifact, transport: Transport
) -> None:
    """Nobody calls. 1. Three wires fall silent: both ways, there only, back only; they stay open.
    2. Each is given up for want of an answer to a PING. 3. It is met anew when the wire is mended.
    """
    node = nodes[transport]
    cuts = [steady(SHUT), steady(SHUT, FAIR), steady(FAIR, SHUT)]
    question = asked(artifact, 1, 5)
    [wanted] = sums_here(artifact, [question])
    news = News()
    with ExitStack() as stack:
        proxies = [stack.enter_context(ChaosProxy(node)) for _ in cuts]
        a, b, c = (proxy.endpoint for proxy in proxies)
        dispatch = stack.enter_context(
            closing(
                open_remote_dispatch(
                    artifact,
                    f"0-4={a},5-9={b},10-15={c}",
                    shard_wait_s=WAIT_S,
                    transport=transport,
                    keepalive=Keepalive(after_s=0.6, timeout_s=0.4),
                    notify=news,
                )
            )
        )
        assert dispatch.start(*question).wait().tobytes() == wanted
        for proxy, cut in zip(proxies, cuts, strict=True):
            proxy.forecast = cut
        for proxy in proxies:
            news.wait(proxy.endpoint, "looking for it again")
        for proxy in proxies:
            proxy.forecast = steady(FAIR)
        for proxy in proxies:
            news.wait(proxy.endpoint, "is back")
        assert dispatch.start(*question).wait().tobytes() == wanted


def test_a_leaving_node_waits_until_its_last_answers_are_taken_in(
    path: Path, artifact: Artifact
) -> None:
    """1. A coordinator asks for more than its windows hold. 2. The node drains and says GOAWAY;
    only then windows are given. 3. All answers and the stream's status come, and then a PING.
    4. The connection stays until that is answered.
    """
    question = asked(artifact, 0, 64)
    with Cluster(Transport.FAST) as cluster:
        node = cluster.node(path)
        host, _, port = node.endpoint.removeprefix("grpc://").rpartition(":")
        with socket.create_connection((host, int(port)), WAIT_S) as connection:
            peer = SlowReader(connection)
            peer.open(artifact)
            for call_id in range(1, 9):
                peer.send(call_of(call_id, question))
            peer.until_taken_in()
            node.send(signal.SIGTERM)
            peer.read_until(Kind.GOAWAY, widens=False)
            assert not peer.has_status and peer.num_data_bytes <= frames.DEFAULT_WINDOW
            peer.widen(peer.num_data_bytes)
            peer.read_until(Kind.PING, widens=True)
            assert peer.answered() == list(range(1, 9))
            assert peer.has_status, "the connection would end before the stream does"
            peer.answer_ping()
            assert connection.recv(1) == b"", "and now it is closed"
        node.wait()
        assert node.exit_status == 0


@both_transports
def test_bf16_replies_are_said_to_be_inexact_near_and_shorter(
    nodes: dict[Transport, str], artifact: Artifact, transport: Transport
) -> None:
    shards = f"0-7={nodes[Transport.FAST]},8-15={nodes[Transport.GRPCIO]}"
    question = asked(artifact, 1, 3)
    told: list[str] = []
    sums, num_bytes = {}, {}
    for form in Wire:
        with closing(
            open_remote_dispatch(
                artifact, shards, transport=transport, replies=form, notify=told.append
            )
        ) as dispatch:
            sums[form] = [dispatch.start(*question).wait() for _ in range(2)]
            summary = dispatch.stats.summary()
            assert summary.wire is form
            num_bytes[form] = summary.bytes_down
    assert [text for text in told if "NOT exact" in text] == told and len(told) == 1
    exact, rounded = sums[Wire.EXACT][0], sums[Wire.BF16][0]
    assert rounded.tobytes() == sums[Wire.BF16][1].tobytes(), "the same calls, the same bits"
    assert (rounded != exact).mean() > 0.5
    assert abs(rounded - exact).max() < abs(exact).max() / 64
    assert num_bytes[Wire.BF16] < num_bytes[Wire.EXACT]


def call_of(call_id: int, question: Asked) -> bytes:
    layer, rows, plan = question
    call = call_of_plan(layer, rows, plan)
    return wire.encode_call(call_id, 60_000, call).SerializeToString()


class SlowReader:
    """A gRPC client with HTTP/2's small default windows, which it widens when it likes."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer
        self._received = bytearray()
        self._data = bytearray()  # of the one stream
        self.has_status = False

    def open(self, artifact: Artifact) -> None:
        """Start an Execute stream on the bulk lane."""
        headers = hpack.Encoder().encode(grpc_headers.request(EXECUTE, "node"))
        self._socket.sendall(
            frames.PREFACE
            + frames.pack_settings({})
            + frames.pack(Kind.HEADERS, frames.END_HEADERS, 1, headers)
        )
        greeting = Greeting(artifact.identity, numerics.NUMERICS, bytes(16))
        self.send(greeting.open_frame(Lane.BULK, 0))

    def send(self, message: bytes) -> None:
        """Send one message, in frames that any peer takes."""
        data = b"\0" + len(message).to_bytes(4, "big") + message
        for begin in range(0, len(data), frames.DEFAULT_FRAME_BYTES):
            piece = data[begin : begin + frames.DEFAULT_FRAME_BYTES]
            self._socket.sendall(frames.pack(Kind.DATA, 0, 1, piece))

    def until_taken_in(self) -> None:
        """Return when the node has read all that was sent; windows stay as they are."""
        self._socket.sendall(frames.pack(Kind.PING, 0, 0, bytes(8)))
        self.read_until(Kind.PING, widens=False, acknowledges=True)

    def read_until(self, wanted: Kind, *, widens: bool, acknowledges: bool = False) -> None:
        """Read up to a frame of that kind that is an acknowledgement, or none.

        Args:
            widens: give a window for what is read.
        """
        while True:
            kind, flags, body = self._next_frame()
            if kind is Kind.DATA:
                self._data += body
                if widens and body:
                    update = frames.window_update(0, len(body)) + frames.window_update(1, len(body))
                    self._socket.sendall(update)
            elif kind is Kind.HEADERS and flags & frames.END_STREAM:
                self.has_status = True
            if kind is wanted and bool(flags & frames.ACK) == acknowledges:
                return

    def widen(self, num_bytes: int) -> None:
        """Give windows for what was read without."""
        update = frames.window_update(0, num_bytes) + frames.window_update(1, num_bytes)
        self._socket.sendall(update)

    def answer_ping(self) -> None:
        self._socket.sendall(frames.pack(Kind.PING, frames.ACK, 0, bytes(8)))

    @property
    def num_data_bytes(self) -> int:
        return len(self._data)

    def answered(self) -> list[int]:
        """Return the calls whose replies have come whole, in order."""
        call_ids, at = [], 0
        while at < len(self._data):
            end = at + 5 + int.from_bytes(self._data[at + 1 : at + 5], "big")
            frame = pb.NodeFrame.FromString(bytes(self._data[at + 5 : end]))
            assert end <= len(self._data), "the last message is not whole"
            call_ids += [frame.reply.call_id] if frame.HasField("reply") else []
            at = end
        return call_ids

    def _next_frame(self) -> tuple[Kind, int, bytes]:
        while True:
            if len(self._received) >= frames.HEADER_BYTES:
                length, kind, flags, _ = frames.unpack_header(self._received, 0)
                end = frames.HEADER_BYTES + length
                if len(self._received) >= end:
                    body = bytes(self._received[frames.HEADER_BYTES : end])
                    del self._received[:end]
                    return Kind(kind), flags, body
            data = self._socket.recv(65536)
            assert data, "the connection ended first"
            self._received += data
