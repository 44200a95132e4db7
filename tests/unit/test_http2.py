"""Our HTTP/2: what two of its ends say arrives; whatever else arrives does no harm."""

import struct
from collections.abc import Callable
from functools import partial

import hpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal import limits
from shoal.http2 import frames, grpc_headers
from shoal.http2.connection import Connection
from shoal.http2.events import (
    Event,
    GoneAway,
    HeadersReceived,
    MessageReceived,
    MessageRefused,
    PingAnswered,
    RemoteEnded,
    StreamReset,
)
from shoal.http2.frames import Code, Http2Error, Kind, Setting
from shoal.http2.grpc_headers import Status

REQUEST = grpc_headers.request("/s/M", "host")


def pair() -> tuple[Connection, Connection, int]:
    """A client and a server that know each other's settings, and a stream between them."""
    client, server = Connection(is_client=True), Connection(is_client=False)
    stream_id = client.open(REQUEST)
    exchange(client, server)
    server.respond(stream_id, grpc_headers.RESPONSE)
    exchange(client, server)
    return client, server, stream_id


def exchange(client: Connection, server: Connection) -> tuple[list[Event], list[Event]]:
    """Move bytes until there are none; return what the client and the server saw."""
    seen: tuple[list[Event], list[Event]] = ([], [])
    while True:
        up, down = client.take_output(), server.take_output()
        if not (up or down):
            return seen
        seen[1].extend(server.receive(up, 0.0))
        seen[0].extend(client.receive(down, 0.0))
        for end in (client, server):
            end.check_integrity()


def taken(end: Connection, data: bytes) -> list[Event]:
    """Take data as a shell does: whole messages the quick way, all else the long one."""
    message = end.take_message(data)
    if message is None:
        return end.receive(data, 0.0)
    stream_id, payload = message
    return [MessageReceived(stream_id, bytes(payload))]


def opened_server(headers: bool = True) -> Connection:
    """A server that has read a client's start, and a request on stream 1."""
    client, server = Connection(is_client=True), Connection(is_client=False)
    if headers:
        client.open(REQUEST)
    server.receive(client.take_output(), 0.0)
    return server


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 7)), max_size=2),
)
def test_the_quick_way_in_sees_and_leaves_what_the_long_one_does(
    sizes: list[int], cuts: list[int], flips: list[tuple[int, int]]
) -> None:
    """Two servers are given the same bytes, whole, cut or damaged: one may take the quick way."""
    client, quick, stream_id = pair()
    other_client, long, _ = pair()
    for size in sizes:
        for end in (client, other_client):
            end.send_message(stream_id, bytes(size))
    data = bytearray(client.take_output())
    for place, bit in flips:
        data[place % len(data)] ^= 1 << bit
    turn = 0
    while data:
        piece = bytes(data[: cuts[turn % len(cuts)]])
        del data[: len(piece)]
        turn += 1
        seen, errors = [], []
        for take in (partial(taken, quick, piece), partial(long.receive, piece, 0.0)):
            try:
                seen.append(take())
                errors.append("")
            except Http2Error as error:
                errors.append(str(error))
        assert errors[0] == errors[1]
        if errors[0]:
            break
        assert seen[0] == seen[1]
        quick.check_integrity()
    assert quick.take_output() == long.take_output()


@pytest.mark.parametrize("size", [0, 1, 16_379])
def test_a_whole_message_is_taken_the_quick_way_until_windows_are_to_be_given_back(
    size: int,
) -> None:
    client, server, stream_id = pair()
    num_quick = 0
    for _ in range(2 * limits.H2_WINDOW_BYTES // 16_384):
        client.send_message(stream_id, bytes(size))
        data = client.take_output()
        message = server.take_message(data)
        if message is None:
            assert payloads(server.receive(data, 0.0)) == [bytes(size)]
            client.receive(server.take_output(), 0.0)
        else:
            assert (message[0], bytes(message[1])) == (stream_id, bytes(size))
            num_quick += 1
        server.check_integrity()
    assert num_quick > limits.H2_WINDOW_BYTES // 16_384


def payloads(events: list[Event]) -> list[bytes]:
    return [event.payload for event in events if isinstance(event, MessageReceived)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 40), st.sampled_from([16_379, 16_380, 70_000, 1_100_000])),
        max_size=12,
    ),
    cuts=st.lists(st.integers(1, 30_000), min_size=1, max_size=8),
)
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(
    sizes: list[int], cuts: list[int]
) -> None:
    client, server, stream_id = pair()
    sent = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
    for message in sent:
        client.send_message(stream_id, message)
    client.end(stream_id)
    data, received, turn = client.take_output(), list[Event](), 0
    while data:
        cut = max(cuts[turn % len(cuts)], len(data) // 100)
        received += server.receive(memoryview(data[:cut]), 0.0)
        server.check_integrity()
        data, turn = data[cut:], turn + 1
    assert payloads(received) == sent
    assert received[-1] == RemoteEnded(stream_id, is_torn=False)


def test_more_than_the_windows_hold_flows_as_the_peer_reads() -> None:
    client, server, stream_id = pair()
    sent = [struct.pack(">I", i) * 1_000_000 for i in range(12)]  # 48 MB, three windows
    for message in sent:
        client.send_message(stream_id, message)
    assert client.num_unsent(stream_id) > 0, "the window of 16 MiB was not respected"
    _, seen = exchange(client, server)
    assert payloads(seen) == sent and client.num_unsent(stream_id) == 0


def test_a_peer_that_does_not_read_its_answers_gets_no_window_for_more_calls() -> None:
    client, server, stream_id = pair()
    for _ in range(20):
        server.send_message(stream_id, bytes(1_000_000))  # 4 MB more than the client's window
    server.take_output()  # which the client never sees
    for _ in range(20):
        client.send_message(stream_id, bytes(1_000_000))
    server.receive(client.take_output(), 0.0)
    assert not server.take_output(), "the server asks for more"


def test_a_call_ends_with_its_status_and_its_message() -> None:
    client, server, stream_id = pair()
    server.send_message(stream_id, b"answer")
    server.end(stream_id, grpc_headers.trailers(Status.FAILED_PRECONDITION, "no: 100 % ü\n"))
    seen, _ = exchange(client, server)
    message, trailers, ended = seen
    assert message == MessageReceived(stream_id, b"answer")
    assert isinstance(trailers, HeadersReceived)
    assert grpc_headers.status_of(trailers.fields) == (Status.FAILED_PRECONDITION, "no: 100 % ü\n")
    assert ended == RemoteEnded(stream_id, is_torn=False)


def test_pings_resets_and_goodbyes_are_told() -> None:
    client, server, stream_id = pair()
    client.ping()
    assert exchange(client, server)[0] == [PingAnswered()]
    server.reset(stream_id, Code.CANCEL)
    server.go_away(Code.NO_ERROR, "bye")
    assert exchange(client, server)[0] == [StreamReset(stream_id, 8), GoneAway(0, "bye")]
    client.send_message(stream_id, b"late")
    assert client.take_output() == b"", "it goes on about a stream that is over"


@pytest.mark.parametrize(
    ("prefix", "is_compressed"), [(b"\1\0\0\0\4", True), (b"\0\2\0\0\0", False)]
)
def test_a_message_too_long_or_compressed_ends_its_stream_alone(
    prefix: bytes, is_compressed: bool
) -> None:
    server = opened_server()
    data = frames.pack(Kind.DATA, 0, 1, prefix + b"rest")
    [event] = server.receive(data, 0.0)
    assert isinstance(event, MessageRefused) and event.is_compressed == is_compressed
    assert server.receive(frames.pack(Kind.DATA, 0, 1, b"more"), 0.0) == []
    server.end(1, grpc_headers.trailers(Status.RESOURCE_EXHAUSTED))
    assert server.take_output()


def test_a_stream_that_ends_within_a_message_is_torn() -> None:
    server = opened_server()
    data = frames.pack(Kind.DATA, frames.END_STREAM, 1, b"\0\0\0\0\x09half")
    assert server.receive(data, 0.0) == [RemoteEnded(1, is_torn=True)]


def settings_frame(name: Setting, value: int) -> bytes:
    return frames.pack_settings({name: value})


OUTRAGES: list[tuple[bytes, Code]] = [
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Code.PROTOCOL_ERROR),
    (frames.header(limits.H2_FRAME_BYTES + 1, Kind.DATA, 0, 1), Code.FRAME_SIZE_ERROR),
    (frames.pack(Kind.DATA, 0, 3, b"x"), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.DATA, 0, 0, b"x"), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.DATA, frames.PADDED, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.HEADERS, frames.END_HEADERS, 0, b""), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.HEADERS, frames.END_HEADERS, 2, b""), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.HEADERS, frames.END_HEADERS, 3, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
     Code.COMPRESSION_ERROR),
    (frames.pack(Kind.HEADERS, 0, 3, b"") + frames.pack(Kind.PING, 0, 0, bytes(8)),
     Code.PROTOCOL_ERROR),
    (frames.pack(Kind.CONTINUATION, frames.END_HEADERS, 1, b""), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.PING, 0, 0, b"short"), Code.FRAME_SIZE_ERROR),
    (frames.pack(Kind.RST_STREAM, 0, 9, bytes(4)), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    (frames.pack(Kind.WINDOW_UPDATE, 0, 0, bytes(4)), Code.PROTOCOL_ERROR),
    (frames.window_update(0, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    (frames.pack(Kind.PUSH_PROMISE, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.GOAWAY, 0, 0, b""), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.SETTINGS, 0, 0, b"odd"), Code.FRAME_SIZE_ERROR),
    (frames.pack(Kind.SETTINGS, frames.ACK, 0, bytes(6)), Code.PROTOCOL_ERROR),
    (settings_frame(Setting.INITIAL_WINDOW_SIZE, 2**31), Code.FLOW_CONTROL_ERROR),
    (settings_frame(Setting.MAX_FRAME_SIZE, 1), Code.PROTOCOL_ERROR),
    (settings_frame(Setting.ENABLE_PUSH, 2), Code.PROTOCOL_ERROR),
    (frames.pack(Kind.SETTINGS, 0, 0, bytes(6 * 65)), Code.ENHANCE_YOUR_CALM),
]  # fmt: skip


@pytest.mark.parametrize(("outrage", "code"), OUTRAGES)
def test_what_breaks_the_rfc_ends_the_connection_with_its_code(outrage: bytes, code: Code) -> None:
    is_no_http2 = outrage.startswith(b"GET")
    server = Connection(is_client=False) if is_no_http2 else opened_server()
    server.take_output()
    with pytest.raises(Http2Error) as caught:
        server.receive(outrage, 0.0)
    assert caught.value.code is code
    goodbye = server.take_output()
    assert frames.unpack_header(goodbye, len(goodbye) - len(str(caught.value)) - 17)[1] == 7


def test_the_first_frame_must_be_settings() -> None:
    server = Connection(is_client=False)
    with pytest.raises(Http2Error, match="first frame"):
        server.receive(frames.PREFACE + frames.pack(Kind.PING, 0, 0, bytes(8)), 0.0)


FLOODS: dict[str, Callable[[int], bytes]] = {
    "PING": lambda _: frames.pack(Kind.PING, 0, 0, bytes(8)),
    "SETTINGS": lambda _: frames.pack(Kind.SETTINGS, 0, 0),
    "empty DATA": lambda _: frames.pack(Kind.DATA, 0, 1),
    "RST_STREAM": lambda i: (
        frames.pack(Kind.HEADERS, frames.END_HEADERS, 2 * i + 3, b"\x82")
        + frames.pack(Kind.RST_STREAM, 0, 2 * i + 3, bytes(4))
    ),
    "WINDOW_UPDATE": lambda _: frames.window_update(0, 1),
    "of kind 2": lambda _: frames.pack(Kind.PRIORITY, 0, 1, bytes(5)),
    "of kind 99": lambda _: b"\0\0\0\x63" + bytes(5),
}


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_of_frames_that_carry_nothing_ends_the_connection(what: str) -> None:
    server = opened_server()
    with pytest.raises(Http2Error) as caught:
        for i in range(2 * limits.MAX_H2_CONTROL_FRAMES):
            server.receive(FLOODS[what](i), 0.0)
            server.check_integrity()
    assert caught.value.code is Code.ENHANCE_YOUR_CALM and what in str(caught.value)


def test_the_same_frames_between_messages_or_over_time_are_no_flood() -> None:
    server = opened_server()
    ping, message = FLOODS["PING"](0), frames.pack(Kind.DATA, 0, 1, bytes(5))
    for _ in range(2 * limits.MAX_H2_CONTROL_FRAMES):
        server.receive(2 * ping + message, 0.0)
        server.take_output()
    for second in range(2 * limits.MAX_H2_CONTROL_FRAMES):
        server.receive(ping, float(second))


def test_a_header_block_without_end_is_refused() -> None:
    server = opened_server()
    with pytest.raises(Http2Error, match="header block of too many"):
        server.receive(frames.pack(Kind.HEADERS, 0, 3, b""), 0.0)
        for _ in range(2 * limits.MAX_H2_CONTINUATIONS):
            server.receive(frames.pack(Kind.CONTINUATION, 0, 3, b""), 0.0)


def test_a_header_block_that_unpacks_to_megabytes_is_refused() -> None:
    """One entry of 3 kB in the dynamic table, then named a thousand times by one byte each."""
    server = opened_server()
    encoder = hpack.Encoder()
    block = encoder.encode([("bomb", "x" * 3000)], huffman=False) + b"\xbe" * 1000
    with pytest.raises(Http2Error) as caught:
        server.receive(frames.pack(Kind.HEADERS, frames.END_HEADERS, 3, block), 0.0)
    assert caught.value.code is Code.COMPRESSION_ERROR


def test_more_data_than_the_window_is_refused() -> None:
    """An answer waits for the peer's window, so that the peer's own is not given back."""
    server = opened_server()
    for _ in range(20):
        server.send_message(1, bytes(1_000_000))
    message = b"\0" + (1_000_000).to_bytes(4, "big") + bytes(1_000_000)
    with pytest.raises(Http2Error) as caught:
        for _ in range(20):
            server.receive(frames.pack(Kind.DATA, 0, 1, message), 0.0)
    assert caught.value.code is Code.FLOW_CONTROL_ERROR


def test_messages_that_never_end_do_not_pile_up_stream_by_stream() -> None:
    """Each stream may begin a message of 16 MiB, and windows are given back as bytes come."""
    server, client = opened_server(headers=False), Connection(is_client=True)
    for _ in range(limits.MAX_H2_STREAMS):
        client.open(REQUEST)
    server.receive(client.take_output().removeprefix(frames.start_of(is_client=True)), 0.0)
    begun = b"\0" + limits.MAX_MESSAGE_BYTES.to_bytes(4, "big") + bytes(1_000_000)
    with pytest.raises(Http2Error, match="too many unfinished messages") as caught:
        for stream_id in range(1, 2 * limits.MAX_H2_STREAMS, 2):
            server.receive(frames.pack(Kind.DATA, 0, stream_id, begun), 0.0)
            server.take_output()
    assert caught.value.code is Code.ENHANCE_YOUR_CALM


def test_more_streams_than_allowed_are_refused_one_by_one() -> None:
    server = opened_server(headers=False)
    server.take_output()
    client = Connection(is_client=True)
    for _ in range(limits.MAX_H2_STREAMS + 1):
        client.open(REQUEST)
    data = client.take_output()
    seen = server.receive(data[data.index(b"\x01\x04\0\0\0\x01") - 3 :], 0.0)
    assert len(seen) == limits.MAX_H2_STREAMS
    assert server.take_output()[3] == Kind.RST_STREAM
    server.check_integrity()


frame_strategy = st.builds(
    lambda kind, flags, stream_id, body: (
        len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + body
    ),
    st.one_of(st.integers(0, 10), st.integers(0, 255)),
    st.one_of(st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D]), st.integers(0, 255)),
    st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1)),
    st.one_of(
        st.binary(max_size=40),
        st.just(hpack.Encoder().encode(REQUEST)),
        st.builds(lambda n: b"\0" + n.to_bytes(4, "big") + bytes(n), st.integers(0, 30)),
        st.sampled_from([b"", bytes(4), bytes(8), b"\0\0\0\1", b"\x7f\xff\xff\xff"]),
    ),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    is_client=st.booleans(),
    is_started=st.booleans(),
    pieces=st.lists(st.one_of(frame_strategy, st.binary(max_size=60)), max_size=25),
    answers=st.lists(st.integers(0, 200_000), max_size=5),
    step=st.integers(1, 200),
)
def test_whatever_arrives_only_our_own_error_leaves(
    is_client: bool, is_started: bool, pieces: list[bytes], answers: list[int], step: int
) -> None:
    client, server, stream_id = pair()
    end = client if is_client else server
    if not is_started:
        end = Connection(is_client=is_client)
    data = b"".join(pieces)
    try:
        for size in answers:
            end.send_message(stream_id, bytes(size))
        for start in range(0, len(data), step):
            end.receive(data[start : start + step], 0.0)
            end.check_integrity()
            end.take_output()
    except Http2Error as error:
        assert bytes([Kind.GOAWAY]) in end.take_output() and str(error)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.binary(max_size=20), st.binary(max_size=40), max_size=6), st.binary())
def test_whatever_headers_say_they_have_a_status_or_none(
    fields: dict[bytes, bytes], value: bytes
) -> None:
    for name in (b"grpc-status", b"grpc-message", b":status", b":path"):
        fields[name] = value
        grpc_headers.status_of(fields)
        grpc_headers.method_of(fields)
