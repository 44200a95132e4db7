"""A row's calls and replies on sockets, natively: the bytes are those of the long way."""

import socket
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coordinator import call_split
from shoal import ops, wire
from shoal.experts.call import ExpertCall
from shoal.http2 import frames, grpc_headers
from shoal.http2.connection import Connection
from shoal.http2.events import MessageReceived
from shoal.http2.frames import Kind
from shoal.http2.stream import PREFIX_BYTES
from shoal.ops import fanout
from shoal.ops.fanout import RowReport, SentCall, Stop
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


def wires(fd: int, stream_id: int, others: tuple[int, ...] = ()) -> fanout.RowWires:
    """One lane, the owner of every expert."""
    return fanout.RowWires([(fd, stream_id)], [0], list(others), 4096)


def send(on: fanout.RowWires, first_id: int, scheme: Scheme = Scheme.INT8_32) -> list[SentCall]:
    """Send `row(scheme)` to slot 0."""
    rows, plan = row(scheme)
    owners = np.zeros(32, np.int32)
    return send_row(on, first_id, rows, plan, owners)


def send_row(
    on: fanout.RowWires, first_id: int, rows: Rows, plan: RoutingPlan, owners: NDArray[np.int32]
) -> list[SentCall]:
    """Send, and wait for nothing."""
    report: list[RowReport] = []
    on.run(
        first_id,
        3,
        1500,
        rows.scheme + 1,
        DIM,
        0,
        rows.values,
        rows.scales,
        plan.experts,
        plan.weights,
        owners,
        GRID,
        False,
        np.zeros((1, DIM), np.int64),
        0.0,
        report,
    )
    [(sent, why, _, _, replies, unread)] = report
    is_whole = bool(sent) and not any(error or rest for *_, error, rest in sent)
    assert why == (Stop.TIME if is_whole else Stop.UNSENT) and not (replies or unread)
    return sent


@pytest.mark.parametrize("scheme", list(Scheme))
def test_what_is_sent_is_what_the_long_way_sends(ends: Ends, scheme: Scheme) -> None:
    client, _, stream_id = streams()
    twin, _, _ = streams()
    rows, plan = row(scheme)
    offsets = np.array([0, 8], np.int32)
    call = ExpertCall(3, rows, offsets, plan.experts[0], plan.weights[0])
    client.send_message(stream_id, wire.call_frame(77, 1500, call))
    wanted = client.take_output()
    ours, theirs = ends
    [(lane, slot, num_pairs, num_bytes, error, unsent)] = send(
        wires(ours.fileno(), stream_id), 77, scheme
    )
    assert (lane, slot, num_pairs, error, unsent) == (0, 0, 8, 0, b"")
    assert theirs.recv(1 << 20) == wanted
    twin.exchanged_beside(stream_id, 1, 0, num_bytes + PREFIX_BYTES)
    assert twin._windows == client._windows, "a window that leaks ends all sending one day"
    assert twin._streams[stream_id].windows == client._streams[stream_id].windows


def test_each_owner_gets_its_part_the_largest_first_under_ids_in_that_order() -> None:
    rows, plan = row(Scheme.INT8_32)
    owners = np.zeros(32, np.int32)
    owners[plan.experts[0, :5]] = 2
    with closing(Lanes()) as lanes:
        a, b = lanes.ours
        on = fanout.RowWires([(a.fileno(), 1), (b.fileno(), 3)], [0, -1, 1], [], 4096)
        sent = send_row(on, 40, rows, plan, owners)
    assert [call[:3] for call in sent] == [(1, 2, 5), (0, 0, 3)]
    split = call_split.split_row(plan, owners)
    for (_, _, _, num_bytes, _, _), (_, begin, end), call_id in zip(
        sent, split.groups, (40, 41), strict=True
    ):
        offsets = np.array([0, end - begin], np.int32)
        experts, weights = split.experts[begin:end], split.weights[begin:end]
        call = ExpertCall(3, rows, offsets, experts, weights)
        assert num_bytes == len(wire.call_frame(call_id, 1500, call))


@pytest.mark.parametrize("lane_of_slot", [[0, -1], [0, 0]])
def test_nothing_is_sent_unless_every_owner_has_a_lane_of_its_own(
    ends: Ends, lane_of_slot: list[int]
) -> None:
    rows, plan = row(Scheme.INT8_32)
    owners = np.zeros(32, np.int32)
    owners[plan.experts[0, 7]] = 1
    ours, theirs = ends
    on = fanout.RowWires([(ours.fileno(), 1)], lane_of_slot, [], 4096)
    assert send_row(on, 1, rows, plan, owners) == []
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


@pytest.mark.parametrize("wrong", ["expert", "slot", "lane"])
def test_numbers_out_of_range_are_refused(ends: Ends, wrong: str) -> None:
    rows, plan = row(Scheme.INT8_32)
    owners = np.zeros(32, np.int32)
    if wrong == "lane":
        with pytest.raises(ValueError, match="a slot of no lane"):
            fanout.RowWires([(ends[0].fileno(), 1)], [1], [], 4096)
        return
    if wrong == "slot":
        owners[:] = 1
    else:
        owners = owners[: int(plan.experts.max())]
    with pytest.raises(ValueError, match="owner"):
        send_row(wires(ends[0].fileno(), 1), 1, rows, plan, owners)


def test_what_a_full_socket_does_not_take_is_given_back_and_an_end_is_told(ends: Ends) -> None:
    ours, theirs = ends
    on = wires(ours.fileno(), 1)
    received, sent, unsent = b"", 0, b""
    while not unsent:
        [(*_, size, error, unsent)] = send(on, 7)
        assert error == 0
        sent += frames.HEADER_BYTES + 5 + size
    theirs.settimeout(10)
    while len(received) < sent - len(unsent):
        received += theirs.recv(1 << 20)
    assert len(received) == sent - len(unsent)
    theirs.close()
    [(*_, error, _)] = send(on, 7)
    assert error != 0


class Lanes:
    """Two lanes, call 5 in flight on the first and 6 on the second, and nodes that do as told."""

    def __init__(self) -> None:
        self.ours, self.theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        self.other, self.other_end = socket.socketpair()
        self.client, self.server, self.stream_id = streams()
        rows, plan = row(Scheme.INT8_32)
        owners = np.zeros(32, np.int32)
        owners[plan.experts[0, 4:]] = 1
        for end in self.ours:
            end.setblocking(False)
        lanes = [(end.fileno(), self.stream_id) for end in self.ours]
        self.wires = fanout.RowWires(lanes, [0, 1], [self.other.fileno()], 4096)
        assert [lane for lane, *_ in send_row(self.wires, 5, rows, plan, owners)] == [0, 1]
        self.sums = np.zeros((1, DIM), np.int64)
        self.answers = {
            call_id: np.random.default_rng(call_id).integers(-(2**30), 2**30, (1, DIM))
            for call_id in (5, 6)
        }
        self.left = [5, 6]

    def close(self) -> None:
        for end in (*self.ours, *self.theirs, self.other, self.other_end):
            end.close()

    def reply(self, call_id: int, sums: NDArray[np.int64] | None = None, grid: int = GRID) -> bytes:
        answer = self.answers[call_id] if sums is None else sums
        frame = wire.reply_frame(call_id, answer, grid, compute_us=call_id)
        self.server.send_message(self.stream_id, frame)
        return self.server.take_output()

    def collect(self, patience_s: float = PATIENCE_S) -> tuple[int, list[int], dict[int, bytes]]:
        """Return why it stopped, which calls were answered, and what is unread of each lane."""
        news: list[RowReport] = []
        self.wires.collect(self.left, GRID, False, self.sums, patience_s, news)
        [(_, why, _, _, replies, unread)] = news
        answered = [reply[0] for reply in replies]
        assert all(reply[4] == reply[0] for reply in replies), "compute_us"
        assert all(reply[1] == reply[0] - 5 for reply in replies), "lane"
        self.left = [call_id for call_id in self.left if call_id not in answered]
        return why, answered, dict(unread)

    def wanted(self, *call_ids: int) -> NDArray[np.int64]:
        return sum((self.answers[call_id] for call_id in call_ids), np.zeros((1, DIM), np.int64))


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    with closing(Lanes()) as made:
        yield made


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), max_size=8), first=st.sampled_from([0, 1]))
def test_replies_are_added_however_their_bytes_are_cut(cuts: list[int], first: int) -> None:
    """Every piece may be all there is for now: then the wait ends, and the rest is read later."""
    with closing(Lanes()) as lanes:
        for lane in (first, 1 - first):
            data, kept = lanes.reply(5 + lane), b""
            is_last = lane != first
            for cut in [*cuts, len(data)]:
                if not data:
                    break
                # What lay unread goes the long way in the client; here it is sent again.
                lanes.theirs[lane].sendall(kept + data[:cut])
                data = data[cut:]
                is_over = is_last and not data
                why, _, unread = lanes.collect(PATIENCE_S if is_over else 0.001)
                assert why == (Stop.DONE if is_over else Stop.TIME)
                kept = unread.get(lane, b"")
            assert not kept
        assert lanes.left == []
        assert np.array_equal(lanes.sums, lanes.wanted(5, 6))


def test_a_reply_in_pieces_is_waited_for(lanes: Lanes) -> None:
    data = lanes.reply(5)
    lanes.theirs[0].sendall(data[:100])
    lanes.other_end.send(b"x")
    assert lanes.collect() == (Stop.OTHERS, [], {0: data[:100]})
    lanes.other.recv(1)
    lanes.theirs[0].sendall(data)
    lanes.theirs[1].sendall(lanes.reply(6))
    assert lanes.collect() == (Stop.DONE, [5, 6], {})
    assert np.array_equal(lanes.sums, lanes.wanted(5, 6))


@pytest.mark.parametrize("what", ["ping", "foreign", "again", "progress"])
def test_anything_but_an_answer_is_left_as_it_came(lanes: Lanes, what: str) -> None:
    """1. A reply comes, then that, then another reply. 2. The first one is added, the rest unread.
    3. The connection takes the rest the long way, as it would have without us.
    """
    good, last = lanes.reply(5), lanes.reply(6)
    match what:
        case "ping":
            odd = frames.pack(Kind.PING, 0, 0, bytes(8))
        case "foreign" | "again":
            call_id = 7 if what == "foreign" else 5
            lanes.server.send_message(
                lanes.stream_id, wire.reply_frame(call_id, lanes.answers[6], GRID)
            )
            odd = lanes.server.take_output()
        case _:
            lanes.server.send_message(lanes.stream_id, b"\x22\x03\x0a\x01\x05")
            odd = lanes.server.take_output()
    lanes.theirs[0].sendall(good + odd + last)
    assert lanes.collect() == (Stop.UNREAD, [5], {0: odd + last})
    assert np.array_equal(lanes.sums, lanes.wanted(5))
    lanes.client.exchanged_beside(lanes.stream_id, 1, len(good) - frames.HEADER_BYTES, 0)
    events = lanes.client.receive(odd + last, 0.0)
    assert isinstance(events[-1], MessageReceived)
    lanes.client.check_integrity()


@pytest.mark.parametrize("what", ["grid", "dim", "stream", "flags", "compressed", "lane"])
def test_an_answer_that_is_none_is_not_added(lanes: Lanes, what: str) -> None:
    match what:
        case "grid":
            odd = lanes.reply(5, grid=GRID + 1)
        case "dim":
            odd = lanes.reply(5, lanes.answers[5][:, :-1].copy())
        case "lane":  # to another node's call
            odd = lanes.reply(6)
        case _:
            changed = bytearray(lanes.reply(5))
            changed[{"flags": 4, "stream": 8, "compressed": 9}[what]] ^= 2
            odd = bytes(changed)
    lanes.theirs[0].sendall(odd)
    assert lanes.collect() == (Stop.UNREAD, [], {0: odd})
    assert not lanes.sums.any()


def test_an_end_and_impatience_are_told(lanes: Lanes) -> None:
    assert lanes.collect(patience_s=0.001)[0] == Stop.TIME
    lanes.theirs[0].sendall(lanes.reply(5))
    lanes.theirs[0].close()
    assert lanes.collect()[:2] == (Stop.BROKEN, [5])
