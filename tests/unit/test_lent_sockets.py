"""Plain calls on a lent socket, and everything that is none: as if it had never been lent."""

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from coordinator.dispatch_events import Lane
from shoal import wire
from shoal.artifact import Artifact
from shoal.experts.call import ExpertCall
from shoal.http2 import frames
from shoal.http2.connection import Connection
from shoal.http2.events import GoneAway, PingAnswered, RemoteEnded
from shoal.http2.frames import Kind
from shoal.http2.stream import GRANT_BYTES
from shoal.ops.call_server import Why
from shoal.v1 import expert_pb2 as pb
from support.fables import NUM_EXPERTS, fables
from support.served_node import Peer, ServedNode, data_frame, served_node, without_times
from support.streaming import call_of
from support.wire_mutations import hostile

NUM_SEEDS = 60
NUM_ROWS = 200


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return Artifact.open(fables())


@pytest.fixture(scope="module")
def node(artifact: Artifact) -> Iterator[ServedNode]:
    with served_node(artifact) as node:
        yield node


@pytest.fixture(scope="module")
def plain_node(artifact: Artifact) -> Iterator[ServedNode]:
    """One that answers everything on its loop."""
    with served_node(artifact, lends=False) as node:
        yield node


@pytest.fixture
def peer(node: ServedNode) -> Iterator[Peer]:
    """One whose socket is lent."""
    with Peer(node) as peer:
        yield peer.be_lent()


def num_lent(node: ServedNode) -> int:
    return node.run(lambda: node.lent.num_lent)


def num_beside(node: ServedNode) -> int:
    return node.run(lambda: node.lent.num_calls)


def test_a_reply_has_the_bytes_of_the_long_way(
    node: ServedNode, peer: Peer, plain_node: ServedNode
) -> None:
    """Every layer and several experts; the bytes but for the times."""
    calls = [node.frame(i, layer=i % 3, experts=range(i % 5, 8)) for i in range(12)]
    before = num_beside(node)
    answers = [peer.ask(call) for call in calls]
    assert num_beside(node) == before + len(calls)
    with Peer(plain_node) as other:
        assert answers == [other.ask(call) for call in calls]
    assert len({answer.reply.sums for answer in answers}) == len(calls)


def test_calls_that_come_together_are_answered_in_order(node: ServedNode, peer: Peer) -> None:
    before = num_beside(node)
    peer.send(*(node.frame(i) for i in range(40)))
    assert [peer.next_frame().reply.call_id for _ in range(40)] == list(range(40))
    assert num_beside(node) == before + 40
    assert num_lent(node) == 1


def test_a_call_that_comes_in_pieces_is_answered(node: ServedNode, peer: Peer) -> None:
    before = num_beside(node)
    data = data_frame(peer.stream_id, node.frame(7)) * 2
    for begin in range(0, len(data), 100):
        peer.socket.sendall(data[begin : begin + 100])
    assert [peer.next_frame().reply.call_id for _ in range(2)] == [7, 7]
    assert num_beside(node) == before + 2


def test_a_piece_of_a_call_goes_back_with_the_socket(node: ServedNode, peer: Peer) -> None:
    """A call and a half; the node wants the socket back between the halves."""
    before = num_beside(node)
    data = data_frame(peer.stream_id, node.frame(8))
    peer.socket.sendall(data + data[:50])
    assert peer.next_frame().reply.call_id == 8
    node.run(node.lent.take_all_back)
    peer.socket.sendall(data[50:])
    assert peer.next_frame().reply.call_id == 8
    assert num_beside(node) == before + 1


def test_what_is_no_call_goes_the_long_way_and_the_socket_is_lent_again(
    node: ServedNode, peer: Peer
) -> None:
    """A PING before a call, in one piece and alone; both answered, and the call after them too."""
    peer.http2.ping()
    peer.send(node.frame(1))
    assert peer.next_frame().reply.call_id == 1
    peer.wait_for(PingAnswered)
    assert num_lent(node) == 0
    peer.be_lent()
    peer.events.clear()
    peer._num_read = 0
    peer.http2.ping()
    peer.flush()
    peer.wait_for(PingAnswered)
    assert peer.ask(node.frame(2)).reply.call_id == 2


def spoiled(artifact: Artifact, field: str, value: Any) -> bytes:
    frame = pb.ClientFrame.FromString(wire.call_frame(9, 60_000, call_of(artifact, 0, [1, 2])))
    setattr(frame.call, field, value)
    return frame.SerializeToString()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", 900),
        ("dim", 32),
        ("scheme", 1),
        ("experts", bytes([1, 0, 1, 0])),
        ("experts", bytes([1, 0, NUM_EXPERTS, 0])),
        ("weights", b"\0\0\x80\x7f" * 2),
        ("values", b""),
    ],
)
def test_a_call_that_fails_fails_as_on_the_long_way(
    artifact: Artifact, node: ServedNode, peer: Peer, plain_node: ServedNode, field: str, value: Any
) -> None:
    call = spoiled(artifact, field, value)
    failure = peer.ask(call)
    assert failure.HasField("failure")
    with Peer(plain_node) as other:
        assert failure == other.ask(call)
    assert peer.ask(node.frame(3)).reply.call_id == 3


def test_bytes_that_are_no_frame_end_the_stream(node: ServedNode, peer: Peer) -> None:
    peer.socket.sendall(data_frame(peer.stream_id, b"\xff\xff\xff"))
    peer.wait_for(RemoteEnded)
    assert num_lent(node) == 0
    assert not node.run(lambda: bool(node.service.stream_ids))


def test_bytes_that_are_no_http2_end_the_connection(node: ServedNode, peer: Peer) -> None:
    peer.socket.sendall(frames.pack(Kind.PUSH_PROMISE, 0, 1, bytes(8)))
    peer.wait_for(GoneAway)
    assert not node.run(lambda: bool(node.service.stream_ids))


def test_a_peer_that_leaves_is_forgotten(node: ServedNode) -> None:
    with Peer(node) as peer:
        peer.be_lent()
    while node.run(lambda: bool(node.service.stream_ids)):
        pass
    assert num_lent(node) == 0


def test_a_worker_that_has_calls_shuts_the_gate(node: ServedNode, peer: Peer) -> None:
    """What the node computes otherwise has its order: a call on a lent socket waits its turn."""
    node.run(node.lent.shut)
    before = num_beside(node)
    assert peer.ask(node.frame(4)).reply.call_id == 4
    assert num_beside(node) == before and num_lent(node) == 0
    node.run(node.lent.open)
    peer.be_lent()


def test_a_bulk_stream_is_never_lent(node: ServedNode) -> None:
    with Peer(node, Lane.BULK) as peer, pytest.raises(AssertionError, match="never lent"):
        peer.be_lent()


def test_a_table_that_is_withdrawn_is_let_go_of(artifact: Artifact) -> None:
    """The memory of its experts is free, and the next call goes the long way."""
    with served_node(artifact) as node, Peer(node) as peer:
        peer.be_lent()
        store: Any = node.experts.store
        with store._lock:
            store._resident.withdraw()
        assert not store._resident._leaving
        before = num_beside(node)
        assert peer.ask(node.frame(5)).reply.call_id == 5
        assert num_beside(node) == before and num_lent(node) == 0


def test_a_draining_node_says_so_and_refuses(artifact: Artifact) -> None:
    with served_node(artifact) as node, Peer(node) as peer:
        peer.be_lent()

        def drain() -> None:
            node.worker.drain()
            node.service.announce_drain("told to")

        node.run(drain)
        assert peer.next_frame().draining.reason == "told to"
        assert peer.ask(node.frame(6)).failure.code == pb.Failure.DRAINING
        assert num_lent(node) == 0


def test_a_node_that_stops_ends_the_stream_of_a_lent_socket(artifact: Artifact) -> None:
    """Politely: the stream first, then the connection, and nothing is left of it."""
    with ExitStack() as stack:
        with served_node(artifact) as node:
            peer = stack.enter_context(Peer(node)).be_lent()
        while peer.receive():
            pass
        assert any(isinstance(event, RemoteEnded) for event in peer.events)
        assert node.lent.num_lent == 0


def test_a_lent_socket_that_was_heard_is_left_alone_and_a_silent_one_is_asked(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served_node(artifact) as node, Peer(node) as peer:
        peer.be_lent()
        (connection,) = node.server._connections
        node.run(connection._check_alive)
        assert num_lent(node) == 1
        monkeypatch.setattr("expert_node.fast_connection.KEEPALIVE_S", -1.0)
        node.run(connection._check_alive)
        assert num_lent(node) == 0
        data = peer.socket.recv(64)
        assert frames.unpack_header(data, 0)[1] == Kind.PING
        peer.http2.receive(data, 0.0)
        peer.flush()
        assert peer.ask(node.frame(1)).reply.call_id == 1


def windows_agree(node: ServedNode, peer: Peer, sent_beside_us: int = 0) -> None:
    """What each end may send is what the other one takes: nothing counted twice, or not at all.

    sent_beside_us: bytes of messages that the test wrote to the socket.
    """
    node.run(node.lent.take_all_back)
    theirs: Connection = node.run(lambda: node.connections[0])
    node.run(theirs.check_integrity)
    its_stream = theirs._streams[peer.stream_id].windows
    our_stream = peer.http2._streams[peer.stream_id].windows
    for its, our in ((theirs._windows, peer.http2._windows), (its_stream, our_stream)):
        assert its.receive == our.send - sent_beside_us
        assert its.send == our.receive


def many_rows(artifact: Artifact, call_id: int = 0) -> bytes:
    """A call whose reply has some 100 KiB."""
    call = call_of(artifact, 0, [3])
    rows = call.rows.take(np.zeros(NUM_ROWS, np.intp))
    experts, weights = call.experts.repeat(NUM_ROWS), call.weights.repeat(NUM_ROWS)
    offsets = np.arange(NUM_ROWS + 1, dtype=np.int32)
    return wire.call_frame(call_id, 60_000, ExpertCall(0, rows, offsets, experts, weights))


def test_windows_are_right_and_given_back(artifact: Artifact, plain_node: ServedNode) -> None:
    """More requests than a window, and a byte fewer and more than what is given back at once."""
    with served_node(artifact) as node, Peer(node) as peer:
        peer.be_lent()
        windows_agree(node, peer)
        peer.be_lent()
        big = many_rows(artifact)
        before = num_beside(node)
        num_calls = GRANT_BYTES * 2 // len(big)
        for _ in range(num_calls):
            assert peer.ask(big).reply.num_rows == NUM_ROWS
        assert num_beside(node) - before > num_calls // 2
        windows_agree(node, peer)


def test_a_reply_waits_for_the_peers_window(artifact: Artifact) -> None:
    """The peer's window is used up while calls are answered; the rest comes when it grows."""
    num_calls = 60
    with served_node(artifact) as node, Peer(node) as peer:
        theirs = node.run(lambda: node.connections[0])
        node.run(lambda: setattr(theirs._streams[peer.stream_id].windows, "send", 30_000))
        peer.be_lent()
        before = num_beside(node)
        peer.send(*(node.frame(i) for i in range(num_calls)))
        while not node.run(lambda: theirs.has_unsent):
            pass
        assert 0 < num_beside(node) - before < num_calls
        peer.socket.sendall(frames.window_update(peer.stream_id, 1 << 20))
        got = [peer.next_frame().reply.call_id for _ in range(num_calls)]
        assert got == list(range(num_calls))
        node.run(theirs.check_integrity)


def test_a_peer_that_reads_late_gets_every_byte(artifact: Artifact) -> None:
    """The node's socket fills: what it did not take follows when there is room."""
    num_calls = 120
    with served_node(artifact) as node, Peer(node, SO_RCVBUF=4096) as peer:
        peer.be_lent()
        calls = b"".join(
            data_frame(peer.stream_id, many_rows(artifact, i)) for i in range(num_calls)
        )
        sender = threading.Thread(target=peer.socket.sendall, args=(calls,))
        sender.start()
        while num_lent(node):
            pass
        before = num_beside(node)
        replies = [peer.next_frame().reply for _ in range(num_calls)]
        sender.join()
        assert [reply.call_id for reply in replies] == list(range(num_calls))
        assert len({reply.sums for reply in replies}) == 1
        assert 0 < before < num_calls
        windows_agree(node, peer, sent_beside_us=len(calls) - 9 * num_calls)


def answers(
    node: ServedNode, chunks: list[bytes]
) -> tuple[list[pb.NodeFrame], list[tuple[object, ...]], bool]:
    """What a node says to these bytes of a peer that then leaves.

    Returns messages, other frames (which may overtake messages), and whether that was all of it.
    """
    with Peer(node) as peer:
        for call_id in range(40):
            peer.ask(node.frame(call_id))
        if node.lends:
            assert num_lent(node) == 1
        data = bytearray()
        try:
            for chunk in chunks:
                peer.socket.sendall(chunk)
            peer.socket.shutdown(socket.SHUT_WR)
            while more := peer.socket.recv(1 << 16):
                data += more
            is_whole = True
        except ConnectionError:  # it had not read everything when it closed
            is_whole = False
    messages: list[pb.NodeFrame] = []
    others: list[tuple[object, ...]] = []
    for part in split_whole(bytes(data)):
        length, kind, flags, stream_id = frames.unpack_header(part, 0)
        if kind == Kind.DATA and length:
            messages.append(without_times(part[14:]))
        elif kind == Kind.GOAWAY:
            others.append((kind, stream_id, part[13:17]))
        elif kind not in (Kind.HEADERS, Kind.WINDOW_UPDATE):
            others.append((kind, flags, stream_id))
    return messages, others, is_whole


def split_whole(data: bytes) -> list[bytes]:
    """Return the frames of some bytes but for one that is cut off at the end."""
    parts: list[bytes] = []
    while len(data) >= frames.HEADER_BYTES:
        end = frames.HEADER_BYTES + frames.unpack_header(data, 0)[0]
        if end > len(data):
            break
        parts.append(data[:end])
        data = data[end:]
    return parts


def test_whatever_comes_on_a_lent_socket_is_answered_as_on_any_other(
    node: ServedNode, plain_node: ServedNode
) -> None:
    num_alike = 0
    for seed in range(NUM_SEEDS):
        calls = [data_frame(1, node.frame(i, i % 3)) for i in range(6)]
        hint = wire.encode_hint(1, [2, 3]).SerializeToString()
        cancel = pb.ClientFrame(cancel=pb.Cancel(call_id=2)).SerializeToString()
        parts = [*calls, data_frame(1, hint), frames.pack(Kind.PING, 0, 0, bytes(8)), *calls[:3]]
        parts += [data_frame(1, cancel), *calls[3:], frames.window_update(0, 77)]
        chunks = hostile(random.Random(seed), parts)
        messages, others, is_whole = answers(node, chunks)
        wanted, other_wanted, wanted_is_whole = answers(plain_node, chunks)
        if is_whole and wanted_is_whole:
            assert others == other_wanted, f"seed {seed}"
            # What ends a stream or the connection does so before the calls in the same piece are
            # looked at, or, here, after them.
            num_alike += messages == wanted
        shorter = min(len(messages), len(wanted))
        assert messages[:shorter] == wanted[:shorter], f"seed {seed}"
    assert num_alike > NUM_SEEDS // 2


def test_reasons_have_the_numbers_of_the_native_side() -> None:
    """kernels/call_server.h, enum Why."""
    assert [why.name for why in Why] == ["ASKED", "OTHER", "REPLY", "FULL", "ENDED"]
