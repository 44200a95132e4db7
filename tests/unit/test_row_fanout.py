"""A row's calls and replies on sockets, natively: the bytes are those of the long way."""

import socket
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coordinator import call_split
from coordinator.row_fanout import News
from shoal import ops, wire
from shoal.experts.call import ExpertCall
from shoal.http2 import frames, grpc_headers
from shoal.http2.connection import Connection
from shoal.http2.events import MessageReceived
from shoal.http2.frames import Kind
from shoal.ops import fanout
from shoal.ops.fanout import Stop
from shoal.quant import Scheme
from shoal.router import RoutingPlan
from shoal.rows import Rows

DIM, GRID = 64, 20
PATIENCE_S = 20.0  # never waited out

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A lane's socket, and its node's end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def streams() -> tuple[Connection, Connection, int]:
    """Both ends of a connection, and a stream that is open on it."""
    client, server = Connection(is_client=True), Connection(is_client=False)
    stream_id = client.open(grpc_headers.request("/s/M", "host"))
    server.receive(client.take_output(), 0.0)
    server.respond(stream_id, grpc_headers.RESPONSE)
    client.receive(server.take_output(), 0.0)
    server.receive(client.take_output(), 0.0)
    assert not (client.take_output() or server.take_output())
    return client, server, stream_id


def row(scheme: Scheme, num_experts: int = 8) -> tuple[Rows, RoutingPlan]:
    rng = np.random.default_rng(num_experts)
    rows = ops.quantise_rows(scheme, rng.standard_normal((1, DIM), np.float32))
    experts = rng.permutation(32).astype(np.int32)[None, :num_experts].copy()
    return rows, RoutingPlan(experts, rng.random((1, num_experts), np.float32))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=12, max_size=12), st.permutations(range(12)))
def test_a_row_is_split_into_its_owners_parts_the_largest_first(
    owners: list[int], order: list[int]
) -> None:
    experts = np.array([order[:8]], np.int32)
    plan = RoutingPlan(experts, np.arange(8, dtype=np.float32)[None])
    split = call_split.split_row(plan, np.array(owners, np.int32))
    sizes = [(begin - end, slot) for slot, begin, end in split.groups]
    assert sizes == sorted(sizes) and len({slot for _, slot in sizes}) == len(sizes)
    assert [begin for _, begin, _ in split.groups] == [0, *(e for _, _, e in split.groups)][:-1]
    for slot, begin, end in split.groups:
        mine = [i for i in range(8) if owners[order[i]] == slot]
        assert split.experts[begin:end].tolist() == [order[i] for i in mine]
        assert split.weights[begin:end].tolist() == mine


@pytest.mark.parametrize("scheme", list(Scheme))
def test_what_is_sent_is_what_the_long_way_sends(ends: Ends, scheme: Scheme) -> None:
    client, _, stream_id = streams()
    twin, _, _ = streams()
    rows, plan = row(scheme)
    split = call_split.split_row(plan, np.zeros(32, np.int32))
    [(_, begin, end)] = split.groups
    call = ExpertCall(3, rows, np.array([0, end - begin], np.int32), split.experts, split.weights)
    client.send_message(stream_id, wire.call_frame(77, 1500, call))
    wanted = client.take_output()
    ours, theirs = ends
    target = (ours.fileno(), stream_id, 77, begin, end)
    sent = fanout.send_row(
        [target],
        3,
        1500,
        scheme + 1,
        DIM,
        0,
        rows.values,
        rows.scales,
        split.experts,
        split.weights,
    )
    [(num_bytes, error, unsent)] = sent
    assert (error, unsent) == (0, b"")
    assert theirs.recv(1 << 20) == wanted
    twin.sent_beside(stream_id, num_bytes)
    assert twin._windows == client._windows, "a window that leaks ends all sending one day"
    assert twin._streams[stream_id].windows == client._streams[stream_id].windows


def test_what_a_full_socket_does_not_take_is_given_back_and_an_end_is_told(ends: Ends) -> None:
    rows, plan = row(Scheme.INT8_32)
    split = call_split.split_row(plan, np.zeros(32, np.int32))
    ours, theirs = ends
    received, sent, unsent = b"", 0, b""
    target = (ours.fileno(), 1, 7, 0, 8)
    while not unsent:
        [(size, error, unsent)] = fanout.send_row(
            [target], 0, 9, 2, DIM, 0, rows.values, rows.scales, split.experts, split.weights
        )
        assert error == 0
        sent += frames.HEADER_BYTES + 5 + size
    theirs.settimeout(10)
    while len(received) < sent - len(unsent):
        received += theirs.recv(1 << 20)
    assert len(received) == sent - len(unsent)
    theirs.close()
    [(_, error, _)] = fanout.send_row(
        [target], 0, 9, 2, DIM, 0, rows.values, rows.scales, split.experts, split.weights
    )
    assert error != 0


class Lane:
    """A lane with calls 5 and 6 in flight, and a node that answers as it is told."""

    def __init__(self, ends: Ends) -> None:
        self.ours, self.theirs = ends
        self.client, self.server, self.stream_id = streams()
        self.sums = np.zeros((1, DIM), np.int64)
        self.answers = {
            call_id: np.random.default_rng(call_id).integers(-(2**30), 2**30, (1, DIM))
            for call_id in (5, 6)
        }
        self.left = [5, 6]
        self.news: list[News] = []

    def reply(self, call_id: int, sums: NDArray[np.int64] | None = None, grid: int = GRID) -> bytes:
        answer = self.answers[call_id] if sums is None else sums
        frame = wire.reply_frame(call_id, answer, grid, compute_us=call_id)
        self.server.send_message(self.stream_id, frame)
        return self.server.take_output()

    def collect(
        self, others: tuple[int, ...] = (), patience_s: float = PATIENCE_S
    ) -> tuple[int, list[int], bytes]:
        """Return why it stopped, which calls were answered, and the bytes left unread."""
        buffer = np.zeros(4096, np.uint8)
        fanout.collect_row(
            [(self.ours.fileno(), self.stream_id)],
            list(others),
            [(call_id, 0) for call_id in self.left],
            GRID,
            False,
            self.sums,
            buffer,
            patience_s,
            self.news,
        )
        why, _, _, replies, unread = self.news.pop()
        answered = [reply[0] for reply in replies]
        assert all(reply[4] == reply[0] for reply in replies), "compute_us"
        self.left = [call_id for call_id in self.left if call_id not in answered]
        rest = b"".join(buffer[begin:end].tobytes() for _, begin, end in unread)
        return why, answered, rest

    def wanted(self, *call_ids: int) -> NDArray[np.int64]:
        return sum((self.answers[call_id] for call_id in call_ids), np.zeros((1, DIM), np.int64))


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), max_size=8), first=st.sampled_from([5, 6]))
def test_replies_are_added_however_their_bytes_are_cut(cuts: list[int], first: int) -> None:
    """Every piece may be all there is for now: then the wait ends, and the rest is read later."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        lane = Lane((ours, theirs))
        data = lane.reply(first) + lane.reply(11 - first)
        kept = b""
        for cut in [*cuts, len(data)]:
            if not data:
                break
            # What lay unread goes the long way in the client; here it is sent again with the rest.
            theirs.sendall(kept + data[:cut])
            data = data[cut:]
            why, _, kept = lane.collect(patience_s=0.0 if data else PATIENCE_S)
            assert why == (Stop.TIME if data else Stop.DONE) or not lane.left
        assert lane.left == [] and not kept
        assert np.array_equal(lane.sums, lane.wanted(5, 6))


def test_a_reply_in_pieces_is_waited_for(ends: Ends) -> None:
    lane = Lane(ends)
    data = lane.reply(5) + lane.reply(6)
    others, other_end = socket.socketpair()
    with others, other_end:
        lane.theirs.sendall(data[:100])
        other_end.send(b"x")
        why, answered, rest = lane.collect((others.fileno(),))
        assert (why, answered, rest) == (Stop.OTHERS, [], data[:100])
    lane.theirs.sendall(data)
    assert lane.collect() == (Stop.DONE, [5, 6], b"")
    assert np.array_equal(lane.sums, lane.wanted(5, 6))


@pytest.mark.parametrize(
    "what", ["ping", "foreign", "grid", "dim", "stream", "flags", "compressed", "progress"]
)
def test_anything_but_an_answer_is_left_as_it_came(ends: Ends, what: str) -> None:
    """1. A reply comes, then that, then another reply. 2. The first one is added, the rest unread.
    3. The connection takes the rest the long way, or breaks, as it would have without us.
    """
    lane = Lane(ends)
    good, last = lane.reply(5), lane.reply(6)
    match what:
        case "ping":
            odd = frames.pack(Kind.PING, 0, 0, bytes(8))
        case "foreign":
            lane.server.send_message(lane.stream_id, wire.reply_frame(7, lane.answers[6], GRID))
            odd = lane.server.take_output()
        case "grid":
            odd = lane.reply(6, grid=GRID + 1)
        case "dim":
            odd = lane.reply(6, lane.answers[6][:, :-1].copy())
        case "progress":
            lane.server.send_message(lane.stream_id, b"\x22\x03\x0a\x01\x05")
            odd = lane.server.take_output()
        case _:
            changed = bytearray(last)
            changed[{"flags": 4, "stream": 8, "compressed": 9}[what]] ^= 2
            odd = bytes(changed)
    lane.theirs.sendall(good + odd + last)
    why, answered, rest = lane.collect()
    assert (why, answered) == (Stop.UNREAD, [5]) and rest == odd + last
    assert np.array_equal(lane.sums, lane.wanted(5))
    if what in ("ping", "foreign", "progress"):
        lane.client.received_beside(lane.stream_id, len(good) - frames.HEADER_BYTES - 5)
        events = lane.client.receive(rest, 0.0)
        assert isinstance(events[-1], MessageReceived)
        lane.client.check_integrity()


def test_an_answer_counts_on_the_lane_that_was_asked_alone(ends: Ends) -> None:
    lane = Lane(ends)
    lane.theirs.sendall(lane.reply(5))
    other, other_end = socket.socketpair()
    with other, other_end:
        other.setblocking(False)
        news: list[News] = []
        fanout.collect_row(
            [(lane.ours.fileno(), lane.stream_id), (other.fileno(), lane.stream_id)],
            [],
            [(5, 1), (6, 1)],
            GRID,
            False,
            lane.sums,
            np.zeros(8192, np.uint8),
            PATIENCE_S,
            news,
        )
    why, _, _, replies, _ = news.pop()
    assert why == Stop.UNREAD and replies == [] and not lane.sums.any()


def test_an_end_and_impatience_are_told(ends: Ends) -> None:
    lane = Lane(ends)
    assert lane.collect(patience_s=0.001)[0] == Stop.TIME
    lane.theirs.sendall(lane.reply(6))
    lane.theirs.close()
    assert lane.collect()[:2] == (Stop.BROKEN, [6])
