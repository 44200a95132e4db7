"""The native codec against protobuf's library: the same bytes, the same arrays, or left to it."""

import gc
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal import errors, limits, wire
from shoal.experts.call import ExpertCall
from shoal.quant import Scheme, round_up
from shoal.rows import Rows
from shoal.transport import Wire
from shoal.v1 import expert_pb2 as pb

EDGES = [0, 1, 127, 128, 2**31, 2**32 - 1]
CALL_FIELDS = {
    "call_id": [*EDGES, 2**63, 2**64 - 1],
    "layer": [0, 1, limits.MAX_LAYERS - 1, limits.MAX_LAYERS, 2**32 - 1],
    "deadline_ms": [*EDGES, 2**31 + 1],
    "scheme": [0, 1, 2, 3, 4, -1, 2**31 - 1],
    "num_rows": [0, 1, 2, 3, 512, 513],
    "dim": [0, 1, 32, 33, 40, limits.MAX_MODEL_DIM, limits.MAX_MODEL_DIM + 1],
    "reply_format": [0, 1, 2, -1],
}
REPLY_FIELDS = [field.name for field in pb.Reply.DESCRIPTOR.fields]


@st.composite
def calls(draw: st.DrawFn) -> ExpertCall:
    """Any legal call of a few rows."""
    scheme = draw(st.sampled_from(list(Scheme)))
    num_rows, dim = draw(st.sampled_from([1, 1, 2, 5, 33])), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    padded = round_up(dim, scheme.span)
    values: Any
    if scheme is Scheme.F32:
        values, num_scales = rng.integers(0, 2**32, (num_rows, dim), np.uint32), 0
        values = values.view(np.float32)  # NaN and infinities, too
    else:
        values, num_scales = rng.integers(-127, 128, (num_rows, padded), np.int8), padded
        values[:, dim:], num_scales = 0, padded // scheme.span
    counts = rng.integers(1, draw(st.sampled_from([2, 9, 65])), num_rows)
    num_experts = draw(st.sampled_from([64, 300, limits.MAX_EXPERTS]))
    return ExpertCall(
        draw(st.sampled_from([0, 7, 300, limits.MAX_LAYERS - 1])),
        Rows(scheme, dim, values, rng.random((num_rows, num_scales), np.float32)),
        np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        np.concatenate([rng.permutation(num_experts)[:n] for n in counts]).astype(np.int32),
        rng.random(int(counts.sum()), np.float32),
    )


def arrays_of(call: ExpertCall) -> list[tuple[Any, ...]]:
    rows = call.rows
    arrays = [rows.values, rows.scales, call.row_offsets, call.experts, call.weights]
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def known_to_protobuf(frame: bytes) -> tuple[Any, ...] | None:
    """What the slow path makes of a frame: the oracle. None: no call, or one that is refused."""
    try:
        message = pb.ClientFrame.FromString(frame)
        if message.WhichOneof("frame") != "call":
            return None
        call, form = wire.decode_call(message.call), wire.wire_of(message.call)
    except (DecodeError, errors.MalformedMessage):
        return None
    return message.call.call_id, message.call.deadline_ms, call, form


def assert_read_as_by_protobuf(frame: bytes) -> bool:
    """Compare; return whether native code took the frame."""
    # Cut out of something larger: what is read beyond its ends is no zero, and would show.
    around = memoryview(b"\xff" * 16 + frame + b"\xff" * 16)[16 : 16 + len(frame)]
    view = wire.parse_call(around)
    if view is None:
        return False
    expected = known_to_protobuf(frame)
    assert expected is not None, "native code took what protobuf's path refuses"
    call = wire.call_of(view, around)
    assert (view.call_id, view.deadline_ms, wire.form_of(view)) == (
        expected[0],
        expected[1],
        expected[3],
    )
    assert (call.layer, call.rows.scheme, call.rows.dim) == (
        expected[2].layer,
        expected[2].rows.scheme,
        expected[2].rows.dim,
    )
    assert arrays_of(call) == arrays_of(expected[2])
    return True


@settings(max_examples=80, deadline=None)
@given(
    calls(),
    st.sampled_from(CALL_FIELDS["call_id"]),
    st.sampled_from([1, 2000, 2**31]),
    st.sampled_from(Wire),
)
def test_a_call_is_written_and_read_as_by_protobuf(
    call: ExpertCall, call_id: int, deadline_ms: int, form: Wire
) -> None:
    frame = wire.call_frame(call_id, deadline_ms, call, form)
    assert frame == wire.encode_call(call_id, deadline_ms, call, form).SerializeToString()
    assert assert_read_as_by_protobuf(frame), "a frame that we write ourselves is taken"


@settings(max_examples=250, deadline=None)
@given(call=calls(), name=st.sampled_from(list(CALL_FIELDS)), data=st.data())
def test_a_field_at_its_bounds_is_taken_exactly_where_protobufs_path_takes_it(
    call: ExpertCall, name: str, data: st.DataObject
) -> None:
    frame = wire.encode_call(1, 100, call)
    setattr(frame.call, name, data.draw(st.sampled_from(CALL_FIELDS[name])))
    serialised = frame.SerializeToString()
    is_legal = known_to_protobuf(serialised) is not None
    assert assert_read_as_by_protobuf(serialised) == is_legal


@settings(max_examples=250, deadline=None)
@given(
    call=calls(),
    name=st.sampled_from(["values", "scales", "pairs_per_row", "experts", "weights"]),
    place=st.floats(0, 1, exclude_max=True),
    new=st.sampled_from([b"", b"\0", b"\x80", b"\xff", b"\1\2"]),
)
def test_a_spoilt_array_is_taken_exactly_where_protobufs_path_takes_it(
    call: ExpertCall, name: str, place: float, new: bytes
) -> None:
    frame = wire.encode_call(1, 100, call)
    old = getattr(frame.call, name)
    at = int(place * len(old))
    setattr(frame.call, name, old[:at] + new + old[at + 1 :])
    serialised = frame.SerializeToString()
    is_legal = known_to_protobuf(serialised) is not None
    assert assert_read_as_by_protobuf(serialised) == is_legal


@settings(max_examples=300, deadline=None)
@given(
    call=calls(),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), max_size=3),
    cut=st.integers(0, 3),
)
def test_damaged_frames_are_read_as_by_protobuf_or_left_to_it(
    call: ExpertCall, edits: list[tuple[float, bytes]], cut: int
) -> None:
    data = bytearray(wire.call_frame(2**40, 100, call))
    for place, new in edits:  # most often in the fields before the values, where the form is
        at = int(place**4 * len(data))
        data[at : at + 1] = new
    assert_read_as_by_protobuf(bytes(data[: len(data) - cut]))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
@example(b"")
@example(b"\x12")
@example(b"\x12\x00")
@example(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x12\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02")  # 65 bits
def test_any_bytes_are_read_as_by_protobuf_or_left_to_it(data: bytes) -> None:
    for frame in (data, b"\x12" + bytes([len(data)]) + data):
        assert_read_as_by_protobuf(frame)
        view = wire.parse_reply(frame)
        if view is not None:
            assert fields_of(view) == fields_of(pb.NodeFrame.FromString(frame).reply)


def other_form(frame: bytes, form: str) -> bytes:
    message = pb.ClientFrame.FromString(frame).call
    body = message.SerializeToString()
    match form:
        case "unknown field":
            body += b"\x78\x01"  # field 15
        case "field twice":
            body += b"\x10" + bytes([message.layer])
        case "another order":
            rest = pb.ExpertCall.FromString(body)
            rest.ClearField("call_id")
            body = rest.SerializeToString() + b"\x08\x05"
        case "a long varint":
            assert body[:2] == b"\x08\x05"
            body = b"\x08\x85\x00" + body[2:]
        case "two calls":
            return frame + frame
    size = len(body)
    length = bytearray()
    while size >= 128:
        length.append(size & 127 | 128)
        size >>= 7
    return b"\x12" + bytes(length) + bytes([size]) + body


@pytest.mark.parametrize(
    "form", ["unknown field", "field twice", "another order", "a long varint", "two calls"]
)
def test_an_unusual_form_is_left_to_protobuf_which_takes_it(form: str) -> None:
    call = a_call()
    frame = other_form(wire.call_frame(5, 100, call), form)
    assert wire.parse_call(frame) is None
    known = known_to_protobuf(frame)
    assert known is not None and arrays_of(known[2]) == arrays_of(call)


def a_call(scheme: Scheme = Scheme.INT8_32, dim: int = 64) -> ExpertCall:
    scales = np.ones((1, 0 if scheme is Scheme.F32 else dim // scheme.span), np.float32)
    values = np.arange(dim, dtype=np.int8)[None]
    rows = Rows(scheme, dim, values.astype(np.float32) if scheme is Scheme.F32 else values, scales)
    return ExpertCall(
        7, rows, np.array([0, 2], np.int32), np.array([9, 4], np.int32), np.ones(2, np.float32)
    )


def test_values_are_a_view_of_a_frame_that_has_them_aligned_and_aligned_in_any() -> None:
    num_views = 0
    for shift in range(16):
        around = memoryview(bytes(shift) + wire.call_frame(1, 100, a_call(Scheme.F32)))
        call = read(around[shift:])
        rows = call.rows
        assert rows.values.ctypes.data % 4 == 0 and rows.scales.ctypes.data % 4 == 0
        assert arrays_of(call) == arrays_of(a_call(Scheme.F32))
        start = np.frombuffer(around, np.uint8).ctypes.data
        num_views += start <= rows.values.ctypes.data < start + len(around)
    assert num_views == 4


def read(frame: bytes | memoryview) -> ExpertCall:
    view = wire.parse_call(frame)
    assert view is not None
    return wire.call_of(view, frame)


def test_a_calls_arrays_outlive_the_frame_that_it_was_read_from() -> None:
    call = read(memoryview(bytearray(wire.call_frame(1, 100, a_call()))))
    gc.collect()
    assert arrays_of(call) == arrays_of(a_call())


@pytest.mark.parametrize("dim", [32, 4064, 4096, 8192, 8193, 18432, limits.MAX_MODEL_DIM])
def test_a_call_may_have_the_rows_whose_widest_reply_fits_in_a_message(dim: int) -> None:
    most = wire.max_rows_per_call(dim)
    for num_rows in (most, most + 1):
        padded = round_up(dim, 32)
        values = np.zeros((num_rows, padded), np.int8)
        rows = Rows(Scheme.INT8_32, dim, values, np.zeros((num_rows, padded // 32), np.float32))
        offsets = np.arange(num_rows + 1, dtype=np.int32)
        pairs = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.float32)
        frame = wire.call_frame(1, 100, ExpertCall(0, rows, offsets, *pairs))
        assert (wire.parse_call(frame) is not None) == (num_rows == most)
        assert (known_to_protobuf(frame) is not None) == (num_rows == most)


def test_arrays_that_do_not_belong_together_make_no_frame() -> None:
    call = a_call()
    for bad in (
        ExpertCall(7, call.rows, np.array([0, 3], np.int32), call.experts, call.weights),
        ExpertCall(7, call.rows, np.array([1, 2], np.int32), call.experts, call.weights),
        ExpertCall(7, call.rows, np.array([0, 1, 2], np.int32), call.experts, call.weights),
        ExpertCall(7, call.rows, call.row_offsets, call.experts, call.weights[:1]),
    ):
        with pytest.raises(ValueError, match="call_frame"):
            wire.call_frame(1, 100, bad)


def fields_of(reply: Any) -> tuple[Any, ...]:
    return tuple(getattr(reply, name) for name in REPLY_FIELDS)


@st.composite
def sums(draw: st.DrawFn) -> np.ndarray:
    """Sums of a few rows, at the edges of every width."""
    num_rows, dim = draw(st.sampled_from([1, 2, 5])), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = rng.choice([8, 15, 16, 23, 24, 31, 32, 55], (num_rows, 1))
    values = rng.integers(-(2**bits), 2**bits, (num_rows, dim))
    values[:, 0] = (2 ** bits[:, 0]) - 1
    return values


@settings(max_examples=200, deadline=None)
@given(
    values=sums(),
    grid=st.integers(limits.MIN_GRID, limits.MAX_GRID),
    form=st.sampled_from(Wire),
    numbers=st.tuples(*[st.sampled_from(EDGES[:4] + EDGES[5:])] * 4),
)
def test_a_reply_is_written_and_read_as_by_protobuf(
    values: np.ndarray, grid: int, form: Wire, numbers: tuple[int, ...]
) -> None:
    call_id, queue_us, compute_us, load_us = numbers
    times = {"queue_us": queue_us, "compute_us": compute_us, "load_us": load_us}
    frame = wire.reply_frame(call_id, values, grid, form, **times)
    assert frame == wire.encode_reply(call_id, values, grid, form, **times).SerializeToString()
    view, reply = wire.parse_reply(frame), pb.NodeFrame.FromString(frame).reply
    assert view is not None and fields_of(view) == fields_of(reply)
    rows = np.arange(len(values), dtype=np.int32)[::-1].copy()
    got, expected = np.ones_like(values), np.ones_like(values)
    wire.add_reply(view, rows, grid, got, form)
    wire.add_reply(reply, rows, grid, expected, form)
    assert got.tobytes() == expected.tobytes()


@settings(max_examples=250, deadline=None)
@given(
    values=sums(),
    form=st.sampled_from(Wire),
    asked=st.sampled_from(Wire),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), max_size=3),
    wanted=st.sampled_from(["grid", "rows", "dim", ""]),
)
def test_a_damaged_or_unasked_reply_adds_what_protobufs_path_adds(
    values: np.ndarray, form: Wire, asked: Wire, edits: list[tuple[float, bytes]], wanted: str
) -> None:
    data = bytearray(wire.reply_frame(1, values, 13, form))
    for place, new in edits:
        at = int(place**3 * len(data))
        data[at : at + 1] = new
    frame = bytes(data)
    view = wire.parse_reply(memoryview(b"\xff" + frame + b"\xff")[1:-1])
    if view is None:
        return
    reply = pb.NodeFrame.FromString(frame).reply
    assert fields_of(view) == fields_of(reply)
    num_rows, dim = values.shape
    rows = np.arange(num_rows + (wanted == "rows"), dtype=np.int32)
    results = []
    for message in (view, reply):
        into = np.ones((num_rows + 2, dim + (wanted == "dim")), np.int64)
        error = ""
        try:
            wire.add_reply(message, rows, 13 + (wanted == "grid"), into, asked)
        except errors.MalformedMessage as refused:
            error = str(refused)
            assert (into == 1).all(), "nothing is added when it raises"
        results.append((error, into.tobytes()))
    assert results[0] == results[1]


def test_other_frames_are_no_reply() -> None:
    for frame in (
        pb.NodeFrame(opened=pb.Opened(credit_bytes=7)),
        pb.NodeFrame(failure=pb.Failure(call_id=7, message="x")),
        pb.NodeFrame(progress=pb.Progress(call_ids=[7])),
        pb.NodeFrame(reply=pb.Reply()),
        pb.NodeFrame(),
    ):
        assert wire.parse_reply(frame.SerializeToString()) is None


def test_a_reply_view_keeps_the_bytes_that_it_shows() -> None:
    data = bytearray(wire.reply_frame(1, np.arange(6).reshape(2, 3), 13))
    view = wire.parse_reply(memoryview(data))
    assert view is not None and view.num_rows == 2
    with pytest.raises(BufferError):
        data.append(0)
    del view
    data.append(0)


def test_reading_a_frame_needs_contiguous_bytes() -> None:
    for parse in (wire.parse_call, wire.parse_reply):
        with pytest.raises(BufferError):
            parse(memoryview(bytes(8))[::2])
        with pytest.raises(TypeError):
            parse("text")  # type: ignore[arg-type]
