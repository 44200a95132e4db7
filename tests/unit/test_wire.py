"""Calls and replies as messages: round trips, one refusal per field, and a fuzz of everything."""

from collections.abc import Callable

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import errors, limits, wire
from shoal.experts.call import ExpertCall
from shoal.quant import Scheme, round_up
from shoal.rows import Rows
from shoal.transport import Wire
from shoal.v1 import expert_pb2 as pb

DIM = 40  # no multiple of any span: rows are padded


def random_rows(rng: np.random.Generator, scheme: Scheme, num_rows: int, dim: int = DIM) -> Rows:
    padded = round_up(dim, scheme.span)
    if scheme is Scheme.F32:
        values = rng.normal(size=(num_rows, dim)).astype(np.float32)
        return Rows(scheme, dim, values, np.empty((num_rows, 0), np.float32))
    quants = rng.integers(-127, 128, (num_rows, padded)).astype(np.int8)
    quants[:, dim:] = 0
    scales = rng.random((num_rows, padded // scheme.span)).astype(np.float32)
    return Rows(scheme, dim, quants, scales)


def random_call(scheme: Scheme, num_rows: int = 3, *, seed: int = 0) -> ExpertCall:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, num_rows)
    return ExpertCall(
        layer=7,
        rows=random_rows(rng, scheme, num_rows),
        row_offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        experts=np.concatenate([rng.permutation(9)[:n] for n in counts]).astype(np.int32),
        weights=rng.random(int(counts.sum())).astype(np.float32),
    )


def arrays_of(call: ExpertCall) -> list[np.ndarray]:
    return [call.rows.values, call.rows.scales, call.row_offsets, call.experts, call.weights]


def through_bytes(frame: pb.ClientFrame) -> pb.ExpertCall:
    return pb.ClientFrame.FromString(frame.SerializeToString()).call


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("num_rows", [1, 2, 33])
def test_a_call_survives_the_wire_bit_for_bit(scheme: Scheme, num_rows: int) -> None:
    call = random_call(scheme, num_rows)
    message = through_bytes(wire.encode_call(2**63 + 5, 1234, call))
    decoded = wire.decode_call(message)
    assert (message.call_id, message.deadline_ms) == (2**63 + 5, 1234)
    assert (decoded.layer, decoded.rows.scheme, decoded.rows.dim) == (7, scheme, DIM)
    for got, sent in zip(arrays_of(decoded), arrays_of(call), strict=True):
        assert (got.dtype, got.shape, got.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())


def test_decoded_rows_are_views_of_the_message() -> None:
    decoded = wire.decode_call(through_bytes(wire.encode_call(1, 1, random_call(Scheme.INT8_32))))
    assert decoded.rows.values.base is not None and not decoded.rows.values.flags.owndata


def minus_128(message: pb.ExpertCall) -> None:
    message.values = b"\x80" + message.values[1:]


def nonzero_padding(message: pb.ExpertCall) -> None:
    message.values = message.values[:-1] + b"\x01"


def repeated_expert(message: pb.ExpertCall) -> None:
    message.pairs_per_row = np.array([2], "<u2").tobytes()
    message.num_rows = 1
    message.experts = np.array([3, 3], "<u2").tobytes()
    message.weights = np.ones(2, "<f4").tobytes()
    message.values = message.values[: len(message.values) // 3]
    message.scales = message.scales[: len(message.scales) // 3]


def repeated_expert_among_rows(message: pb.ExpertCall) -> None:
    message.pairs_per_row = np.array([1, 2, 1], "<u2").tobytes()
    message.experts = np.array([3, 5, 5, 3], "<u2").tobytes()
    message.weights = np.ones(4, "<f4").tobytes()


def set_field(name: str, value: object) -> Callable[[pb.ExpertCall], None]:
    return lambda message: setattr(message, name, value)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (set_field("layer", limits.MAX_LAYERS), "layer = 1024"),
        (set_field("deadline_ms", 0), "deadline_ms = 0"),
        (set_field("dim", 0), "dim = 0"),
        (set_field("dim", limits.MAX_MODEL_DIM + 1), "dim = 65537"),
        (set_field("dim", DIM + 60), "values"),
        (set_field("num_rows", 0), "num_rows = 0"),
        (set_field("num_rows", 513), "num_rows = 513"),
        (set_field("num_rows", 4), "values"),
        (set_field("scheme", 0), "scheme = 0"),
        (set_field("scheme", 99), "scheme = 99"),
        (set_field("scheme", 1), "values"),
        (set_field("values", b""), "values: 0 bytes"),
        (set_field("scales", b"\0" * 5), "scales: 5 bytes"),
        (set_field("pairs_per_row", b"\1"), "pairs_per_row: 1 bytes"),
        (set_field("pairs_per_row", np.array([1, 0, 1], "<u2").tobytes()), "pairs_per_row: 0"),
        (set_field("pairs_per_row", np.array([1, 65, 1], "<u2").tobytes()), "pairs_per_row: 1..65"),
        (set_field("experts", b"\0\0"), "experts: 2 bytes"),
        (set_field("weights", b""), "weights: 0 bytes"),
        (minus_128, "int8 of -128"),
        (nonzero_padding, "padding"),
        (repeated_expert, "one expert twice"),
        (repeated_expert_among_rows, "one expert twice"),
    ],
)
def test_every_illegal_field_is_refused_by_name(
    spoil: Callable[[pb.ExpertCall], None], complaint: str
) -> None:
    message = through_bytes(wire.encode_call(1, 100, random_call(Scheme.INT8_32)))
    wire.decode_call(message)
    spoil(message)
    with pytest.raises(errors.MalformedMessage, match=complaint):
        wire.decode_call(message)


def test_scales_beside_float_rows_are_refused() -> None:
    message = through_bytes(wire.encode_call(1, 100, random_call(Scheme.F32)))
    message.scales = b"\0\0\0\0"
    with pytest.raises(errors.MalformedMessage, match="scales"):
        wire.decode_call(message)


@pytest.mark.parametrize("dim", [1, 64, 2048, 2880, 4096, 7168, limits.MAX_MODEL_DIM])
def test_the_widest_call_and_its_widest_reply_fit_in_a_message(dim: int) -> None:
    num_rows = wire.max_rows_per_call(dim)
    assert 1 <= num_rows <= limits.MAX_ROWS_PER_CALL
    room = limits.MAX_MESSAGE_BYTES - wire.ENVELOPE_BYTES
    assert num_rows * wire.reply_row_bytes(dim) <= room
    for scheme in Scheme:
        assert num_rows * wire.request_row_bytes(dim, scheme, limits.MAX_EXPERTS_PER_TOKEN) <= room


@pytest.mark.parametrize("scheme", Scheme)
def test_sizes_are_predicted_to_the_envelope(scheme: Scheme) -> None:
    call = random_call(scheme, 200)
    size = wire.encode_call(2**64 - 1, 2**31, call).ByteSize()
    most = 200 * wire.request_row_bytes(DIM, scheme, 0) + 6 * call.experts.size
    assert most <= size <= most + wire.ENVELOPE_BYTES


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    try:
        message = pb.ExpertCall.FromString(data)
    except DecodeError:
        return
    with pytest.raises(errors.MalformedMessage):
        wire.decode_call(message)


@settings(max_examples=500, deadline=None)
@given(
    scheme=st.integers(0, 4),
    num_rows=st.integers(0, 3),
    dim=st.integers(0, 33),
    fields=st.fixed_dictionaries(
        {
            name: st.binary(max_size=140)
            for name in ("values", "scales", "pairs_per_row", "experts", "weights")
        }
    ),
)
def test_fields_that_parse_are_accepted_or_refused_and_nothing_else(
    scheme: int, num_rows: int, dim: int, fields: dict[str, bytes]
) -> None:
    message = pb.ExpertCall(call_id=1, deadline_ms=1, num_rows=num_rows, dim=dim)
    for name, value in fields.items():
        setattr(message, name, value)
    message.scheme = scheme  # type: ignore[assignment]
    try:
        call = wire.decode_call(message)
    except errors.MalformedMessage:
        return
    assert call.rows.num_rows == num_rows


@settings(max_examples=400, deadline=None)
@given(
    scheme=st.sampled_from(list(Scheme)),
    seed=st.integers(0, 50),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=4),
)
def test_flipped_bits_are_accepted_or_refused_and_nothing_else(
    scheme: Scheme, seed: int, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(wire.encode_call(1, 100, random_call(scheme, seed=seed)).SerializeToString())
    for place, bit in flips:
        data[int(place * len(data))] ^= 1 << bit
    try:
        wire.decode_call(pb.ClientFrame.FromString(bytes(data)).call)
    except (DecodeError, errors.MalformedMessage):
        return


def random_sums(num_rows: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    bits = np.array([10, 20, 28, 43])[np.arange(num_rows) % 4, None]
    return rng.integers(-(2**bits), 2**bits, (num_rows, DIM), dtype=np.int64)


def test_replies_add_up_wherever_their_rows_belong() -> None:
    sums = random_sums(5)
    frame = wire.encode_reply(9, sums, 13, queue_us=1, compute_us=2, load_us=3)
    reply = pb.NodeFrame.FromString(frame.SerializeToString()).reply
    assert (reply.call_id, reply.queue_us, reply.compute_us, reply.load_us) == (9, 1, 2, 3)
    assert len(set(reply.widths)) == 4, "every width is in use"
    rows = np.array([6, 0, 3, 1, 7], np.int32)
    into = np.ones((8, DIM), np.int64)
    wire.add_reply(reply, rows, 13, into)
    expected = np.ones((8, DIM), np.int64)
    expected[rows] += sums
    assert (into == expected).all()


def shorten_sums(reply: pb.Reply) -> None:
    reply.sums = reply.sums[:-1]


def odd_width(reply: pb.Reply) -> None:
    reply.widths = b"\5" + reply.widths[1:]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: setattr(reply, "num_rows", 4),
        lambda reply: setattr(reply, "dim", DIM - 1),
        lambda reply: setattr(reply, "grid", 12),
        lambda reply: setattr(reply, "widths", reply.widths[:-1]),
        shorten_sums,
        odd_width,
    ],
)
def test_a_reply_that_is_not_the_calls_adds_nothing(spoil: Callable[[pb.Reply], None]) -> None:
    reply = wire.encode_reply(9, random_sums(5), 13).reply
    spoil(reply)
    into = np.zeros((5, DIM), np.int64)
    with pytest.raises(errors.MalformedMessage):
        wire.add_reply(reply, np.arange(5, dtype=np.int32), 13, into)
    assert not into.any()


@pytest.mark.parametrize(
    "error",
    [
        errors.MalformedMessage("x"),
        errors.NotOwned("x"),
        errors.NodeBusy("x"),
        errors.CallTimeout("x"),
        errors.CallCancelled("x"),
        errors.NumericError("x", (1, 4)),
        errors.ExpertUnavailable("x"),
        errors.NodeDraining("x"),
        errors.NodeError("x"),
    ],
)
def test_errors_keep_their_kind_over_the_wire(error: errors.ShoalError) -> None:
    there = wire.error_of(wire.failure_of(3, error), "grpc://a:1")
    assert type(there) is type(error)
    assert str(there) == "node grpc://a:1: x"
    if isinstance(error, errors.NumericError):
        assert isinstance(there, errors.NumericError) and there.rows == error.rows


def test_damaged_and_unreadable_experts_are_unavailable_and_bugs_internal() -> None:
    for error in (errors.CorruptArtifact("x"), FileNotFoundError("x")):
        assert wire.failure_of(1, error).code == pb.Failure.UNAVAILABLE
    assert wire.failure_of(1, ValueError("x")).code == pb.Failure.INTERNAL


def test_a_failure_code_of_a_later_version_is_a_node_error() -> None:
    failure = pb.Failure(call_id=1, message="x")
    failure.code = 77  # type: ignore[assignment]
    assert type(wire.error_of(failure, "a")) is errors.NodeError


def bf16_reply(sums: np.ndarray, grid: int = 13) -> pb.Reply:
    frame = wire.encode_reply(9, sums, grid, Wire.BF16)
    return pb.NodeFrame.FromString(frame.SerializeToString()).reply


def test_a_call_says_in_which_form_it_wants_its_reply() -> None:
    call = random_call(Scheme.INT8_32)
    assert wire.wire_of(through_bytes(wire.encode_call(1, 1, call))) is Wire.EXACT
    message = through_bytes(wire.encode_call(1, 1, call, Wire.BF16))
    assert wire.wire_of(message) is Wire.BF16
    message.reply_format = 2  # type: ignore[assignment]
    with pytest.raises(errors.MalformedMessage, match="reply_format = 2"):
        wire.wire_of(message)


def test_a_bf16_reply_is_near_and_half_as_long() -> None:
    sums = np.random.default_rng(0).integers(-(2**28), 2**28, (3, DIM))
    reply, exact = bf16_reply(sums), wire.encode_reply(9, sums, 13).reply
    assert len(reply.sums) == 2 * sums.size == len(exact.sums) // 2 and reply.widths == b""
    into = np.zeros((4, DIM), np.int64)
    wire.add_reply(reply, np.array([3, 0, 1], np.int32), 13, into, Wire.BF16)
    assert (into[[3, 0, 1]] != sums).any() and not into[2].any()
    assert (abs(into[[3, 0, 1]] - sums) <= abs(sums) / 256).all(), "half a unit of eight digits"


def test_a_rounded_reply_is_taken_by_nobody_who_did_not_ask_for_it() -> None:
    reply, rows = bf16_reply(np.ones((1, DIM), np.int64)), np.zeros(1, np.int32)
    into = np.zeros((1, DIM), np.int64)
    with pytest.raises(errors.MalformedMessage, match="nobody asked for"):
        wire.add_reply(reply, rows, 13, into)
    reply.widths = b"\2"
    with pytest.raises(errors.MalformedMessage, match="widths: 1, must be 0"):
        wire.add_reply(reply, rows, 13, into, Wire.BF16)
    exact = wire.encode_reply(9, np.ones((1, DIM), np.int64), 13).reply
    assert not into.any()
    wire.add_reply(exact, rows, 13, into, Wire.BF16)
    assert (into == 1).all(), "of a node that knows nothing else"


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=2 * DIM, max_size=2 * DIM))
def test_any_bf16_is_taken_or_refused(data: bytes) -> None:
    reply, into = bf16_reply(np.ones((1, DIM), np.int64)), np.zeros((1, DIM), np.int64)
    reply.sums = data
    try:
        wire.add_reply(reply, np.zeros(1, np.int32), 13, into, Wire.BF16)
    except errors.MalformedMessage:
        assert not into.any()


def test_a_hint_survives_the_wire_in_its_order() -> None:
    data = wire.encode_hint(7, [300, 2, 9]).SerializeToString()
    assert wire.decode_hint(pb.ClientFrame.FromString(data).hint) == (7, [300, 2, 9])


@pytest.mark.parametrize(
    ("layer", "experts", "field"),
    [
        (limits.MAX_LAYERS, b"\1\0", "layer"),
        (0, b"", "experts"),
        (0, b"\1", "experts"),
        (0, b"\1\0\2", "experts"),
        (0, b"\1\0\1\0", "twice"),
        (0, b"\0\x10", "beyond 4096"),
        (0, b"\1\0" * (limits.MAX_EXPERTS + 1), "experts"),
    ],
)
def test_a_hint_that_makes_no_sense_is_refused(layer: int, experts: bytes, field: str) -> None:
    with pytest.raises(errors.MalformedMessage, match=field):
        wire.decode_hint(pb.Hint(layer=layer, experts=experts))
