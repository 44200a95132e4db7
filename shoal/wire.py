"""Arrays to messages and back: every size, range and value that a peer sends is checked here.

Decoded arrays are views of the message's bytes where the machine's byte order is the wire's
(little-endian) and their type is the same. Whatever a stranger sends, only MalformedMessage leaves
this file.

Calls and replies, which a decode step sends by the hundred, are written and read by native code
(`call_frame`, `parse_call`, `reply_frame`, `parse_reply`) in a microsecond or two: the same bytes
and the same arrays as protobuf's messages give. What native code does not take (another frame, an
unusual form, anything that is wrong) it leaves to these, whose errors name the field.

What a call needs of the model (its layer exists, its width and scheme are the layer's) is checked
by `ExpertExecutor.check`, for remote and local calls alike.
"""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal import errors, limits, ops
from shoal.experts.call import ExpertCall
from shoal.ops import frames
from shoal.ops.frames import CallView, ReplyView
from shoal.quant import Scheme, round_up
from shoal.rows import Rows
from shoal.transport import Wire
from shoal.v1 import expert_pb2 as pb

# Protobuf framing and the fields of a message that do not grow with its rows. The largest is
# pairs: at most MAX_EXPERTS_PER_TOKEN a row, counted with the row.
ENVELOPE_BYTES: Final = 256
_PAIR_BYTES = 2 + 4  # expert index, routing weight
_T = TypeVar("_T", bound=np.generic)


def request_row_bytes(dim: int, scheme: Scheme, experts_per_token: int) -> int:
    """Return the bytes that one row adds to a call's message, at most."""
    padded = round_up(dim, scheme.span)
    rows = 4 * dim if scheme is Scheme.F32 else padded + 4 * (padded // scheme.span)
    return rows + 2 + experts_per_token * _PAIR_BYTES


def call_bytes(num_rows: int, num_pairs: int, rows: Rows) -> int:
    """Return the bytes of a call's message, at most.

    Args: rows: whose first `num_rows` are those of the call, as far as sizes go.
    """
    per_row: int = rows.values.itemsize * rows.values.shape[1] + 4 * rows.scales.shape[1] + 2
    return ENVELOPE_BYTES + num_rows * per_row + num_pairs * _PAIR_BYTES


def reply_row_bytes(dim: int, width: int = 8) -> int:
    """Return the bytes that one row adds to a reply's message at that width; 8 is the widest."""
    return width * dim + 1


@cache
def max_rows_per_call(dim: int) -> int:
    """Return the most rows of a call of that width whose widest reply fits in one message.

    A request row is never larger than the widest reply row, so this bounds both directions.
    """
    room = limits.MAX_MESSAGE_BYTES - ENVELOPE_BYTES
    largest_row = max(
        reply_row_bytes(dim),
        *(request_row_bytes(dim, scheme, limits.MAX_EXPERTS_PER_TOKEN) for scheme in Scheme),
    )
    return max(1, min(limits.MAX_ROWS_PER_CALL, room // largest_row))


def encode_call(
    call_id: int, deadline_ms: int, call: ExpertCall, wire: Wire = Wire.EXACT
) -> pb.ClientFrame:
    """Return the frame of a call. Args: deadline_ms: > 0, from receipt; wire: of its reply."""
    scheme = call.rows.scheme
    fields = {  # a mapping fills the frame's own message: a message would be copied into it
        "call_id": call_id,
        "layer": call.layer,
        "deadline_ms": deadline_ms,
        "scheme": _WIRE_SCHEME[scheme],
        "num_rows": call.rows.num_rows,
        "dim": call.rows.dim,
        "values": _little_endian(call.rows.values),
        "scales": b"" if scheme is Scheme.F32 else _little_endian(call.rows.scales),
        "pairs_per_row": _pairs_per_row(call.row_offsets),
        "experts": call.experts.astype(_WIRE_TYPES["<u2"]).tobytes(),
        "weights": _little_endian(call.weights),
        "reply_format": _FORMAT_OF_WIRE[wire],
    }
    return pb.ClientFrame(call=fields)


def call_frame(call_id: int, deadline_ms: int, call: ExpertCall, wire: Wire = Wire.EXACT) -> bytes:
    """Return the frame of a call (see `encode_call`), serialised."""
    if not IS_WIRE_ORDER:
        return encode_call(call_id, deadline_ms, call, wire).SerializeToString()
    rows = call.rows
    return frames.call_frame(
        call_id,
        call.layer,
        deadline_ms,
        rows.scheme + 1,
        rows.dim,
        wire is not Wire.EXACT,
        rows.values,
        rows.scales,
        call.row_offsets,
        call.experts,
        call.weights,
    )


def parse_call(frame: bytes | memoryview) -> CallView | None:
    """Return the call in a serialised ClientFrame, as a view of it: it must not change meanwhile.

    Everything that `decode_call` and `wire_of` check is then legal. None: it is no call, or these
    must look at it.
    """
    return frames.read_call(frame) if IS_WIRE_ORDER else None


def call_of(view: CallView, frame: bytes | memoryview) -> ExpertCall:
    """Return the call in a frame as arrays; its values are the frame's where they are aligned."""
    num_rows, dim, num_pairs = view.num_rows, view.dim, view.num_pairs
    numbers, is_copied, values_at = view.numbers()
    scheme = _SCHEME_OF_WIRE[view.scheme]
    dtype: np.dtype[np.float32] | np.dtype[np.int8]
    padded, num_scales, dtype = dim, 0, _F32
    if scheme is not Scheme.F32:
        num_scales = -(-dim // scheme.span)
        padded, dtype = num_scales * scheme.span, _I8
    experts_at = 4 * num_rows + 4
    weights_at = experts_at + 4 * num_pairs
    row_offsets = np.ndarray((num_rows + 1,), _I32, numbers)
    experts = np.ndarray((num_pairs,), _I32, numbers, experts_at)
    weights = np.ndarray((num_pairs,), _F32, numbers, weights_at)
    scales = np.ndarray((num_rows, num_scales), _F32, numbers, weights_at + 4 * num_pairs)
    values = np.ndarray((num_rows, padded), dtype, numbers if is_copied else frame, values_at)
    return ExpertCall(view.layer, Rows(scheme, dim, values, scales), row_offsets, experts, weights)


def form_of(view: CallView) -> Wire:
    """Return the form that a call wants its reply in."""
    return _FORMS[view.reply_format]


def decode_call(message: pb.ExpertCall) -> ExpertCall:
    """Return the call in a message, all of whose sizes, ranges and indices are then legal.

    Floats may be anything: what is not finite in a row or its weights makes that row's sums so, and
    the kernels that compute them test for it and name the row.

    Raises:
        MalformedMessage: naming the field, what it is and what it must be.
    """
    layer, num_rows, dim = message.layer, message.num_rows, message.dim
    _check_range("layer", layer, 0, limits.MAX_LAYERS - 1)
    _check_range("deadline_ms", message.deadline_ms, 1, 2**31)
    _check_range("dim", dim, 1, limits.MAX_MODEL_DIM)
    _check_range("num_rows", num_rows, 1, max_rows_per_call(dim))
    _check_range("scheme", message.scheme, 1, len(Scheme))
    rows = _decode_rows(message, Scheme(message.scheme - 1), num_rows, dim)
    row_offsets, experts, weights = _decode_pairs(message, num_rows)
    return ExpertCall(layer, rows, row_offsets, experts, weights)


def reply_format(wire: Wire) -> int:
    """Return the number that a call asks for that form of its reply with."""
    return int(_FORMAT_OF_WIRE[wire])


def encode_hint(layer: int, experts: Sequence[int]) -> pb.ClientFrame:
    """Return the frame that names experts which a layer's calls will likely need."""
    data = _little_endian(np.array(experts, np.uint16))
    return pb.ClientFrame(hint=pb.Hint(layer=layer, experts=data))


def decode_hint(message: pb.Hint) -> tuple[int, list[int]]:
    """Return a hint's layer and experts. Raises MalformedMessage."""
    _check_range("layer", message.layer, 0, limits.MAX_LAYERS - 1)
    size = len(message.experts) // 2
    _check_range("experts", size, 1, limits.MAX_EXPERTS)
    experts = _array("experts", message.experts, "<u2", size, np.int32).tolist()
    if max(experts) >= limits.MAX_EXPERTS or len(set(experts)) != size:
        raise errors.MalformedMessage(f"experts: twice the same, or beyond {limits.MAX_EXPERTS}")
    return message.layer, experts


def wire_of(message: pb.ExpertCall) -> Wire:
    """Return the form that a call wants its reply in. Raises MalformedMessage: an unknown one."""
    _check_range("reply_format", message.reply_format, 0, len(Wire) - 1)
    return _WIRE_OF_FORMAT[message.reply_format]


def _decode_rows(message: pb.ExpertCall, scheme: Scheme, num_rows: int, dim: int) -> Rows:
    if scheme is Scheme.F32:
        values = _array("values", message.values, "<f4", num_rows * dim, np.float32)
        if message.scales:
            raise errors.MalformedMessage("scales: must be empty for float32 rows")
        return Rows(scheme, dim, values.reshape(num_rows, dim), _NO_SCALES[:num_rows])
    padded = round_up(dim, scheme.span)
    num_scales = padded // scheme.span
    data = message.values
    quants = _array("values", data, "i1", num_rows * padded, np.int8).reshape(num_rows, padded)
    if b"\x80" in data:
        raise errors.MalformedMessage("values: an int8 of -128; they must be in -127..127")
    if padded != dim and quants[:, dim:].any():
        raise errors.MalformedMessage(f"values: padding beyond dim = {dim} must be zero")
    scales = _array("scales", message.scales, "<f4", num_rows * num_scales, np.float32)
    return Rows(scheme, dim, quants, scales.reshape(num_rows, num_scales))


def _decode_pairs(
    message: pb.ExpertCall, num_rows: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    counts = _array("pairs_per_row", message.pairs_per_row, "<u2", num_rows, np.int32)
    row_offsets = np.zeros(num_rows + 1, np.int32)
    if num_rows == 1:  # decode, where every microsecond is paid once a layer
        fewest = most = row_offsets[1] = counts[0]
    else:
        fewest, most = counts.min(), counts.max()
        counts.cumsum(out=row_offsets[1:])
    if fewest < 1 or most > limits.MAX_EXPERTS_PER_TOKEN:
        raise errors.MalformedMessage(
            f"pairs_per_row: {fewest}..{most}: every row must have "
            f"1..{limits.MAX_EXPERTS_PER_TOKEN}"
        )
    num_pairs = int(row_offsets[-1])
    experts = _array("experts", message.experts, "<u2", num_pairs, np.int32)
    weights = _array("weights", message.weights, "<f4", num_pairs, np.float32)
    if num_rows == 1:
        in_row = experts.tolist()
        highest, distinct = max(in_row), len(set(in_row)) == num_pairs
    else:
        highest = experts.max()
        keys = np.repeat(np.arange(num_rows, dtype=np.int32) << 16, counts) | experts
        keys.sort()
        distinct = bool((keys[1:] != keys[:-1]).all())
    if not distinct:
        raise errors.MalformedMessage("experts: a row names one expert twice")
    if highest >= limits.MAX_EXPERTS:
        raise errors.MalformedMessage(f"experts: {highest} is beyond {limits.MAX_EXPERTS}")
    return row_offsets, experts, weights


def encode_reply(
    call_id: int,
    sums: NDArray[np.int64],
    grid: int,
    wire: Wire = Wire.EXACT,
    *,
    queue_us: int = 0,
    compute_us: int = 0,
    load_us: int = 0,
) -> pb.NodeFrame:
    """Return the frame that carries sums [T, D], each row at the smallest width that holds it."""
    if wire is Wire.EXACT:
        widths, data = ops.pack_sums(sums)
    else:
        widths, data = _NO_WIDTHS, ops.pack_bf16(sums, grid)
    fields = {
        "format": _FORMAT_OF_WIRE[wire],
        "call_id": call_id,
        "num_rows": sums.shape[0],
        "dim": sums.shape[1],
        "grid": grid,
        "widths": widths.tobytes(),
        "sums": data.tobytes(),
        "queue_us": queue_us,
        "compute_us": compute_us,
        "load_us": load_us,
    }
    return pb.NodeFrame(reply=fields)


def reply_frame(
    call_id: int,
    sums: NDArray[np.int64],
    grid: int,
    wire: Wire = Wire.EXACT,
    *,
    queue_us: int = 0,
    compute_us: int = 0,
    load_us: int = 0,
) -> bytes:
    """Return the frame that carries sums [T, D] (see `encode_reply`), serialised."""
    if IS_WIRE_ORDER:
        is_bf16 = wire is not Wire.EXACT
        return frames.reply_frame(call_id, sums, grid, is_bf16, queue_us, compute_us, load_us)
    message = encode_reply(
        call_id, sums, grid, wire, queue_us=queue_us, compute_us=compute_us, load_us=load_us
    )
    return message.SerializeToString()


def parse_reply(frame: bytes | memoryview) -> ReplyView | None:
    """Return the reply in a serialised NodeFrame, as a view of it: it must not change meanwhile.

    Has the fields of a `pb.Reply`. None: it is no reply, or protobuf must look at it.
    """
    return frames.read_reply(frame) if IS_WIRE_ORDER else None


def add_reply(
    message: pb.Reply | ReplyView,
    rows: NDArray[np.int32],
    grid: int,
    into: NDArray[np.int64],
    wire: Wire = Wire.EXACT,
) -> None:
    """Add a reply's sums to rows `rows` of `into` [T, D]. Nothing is added when it raises.

    Args:
        rows: [T'] int32, the row of `into` for each row of the call that is answered; distinct.
        grid: the layer's, as the coordinator's artifact has it.
        wire: what was asked for; an exact reply is always welcome.

    Raises:
        MalformedMessage: naming the field; the shape, grid or sizes are not the call's.
    """
    if isinstance(message, ReplyView) and frames.add_reply(
        message, rows, grid, into, wire is Wire.BF16
    ):
        return
    is_rounded = message.format != pb.REPLY_FORMAT_EXACT
    if is_rounded and message.format != _FORMAT_OF_WIRE[wire]:
        raise errors.MalformedMessage(f"reply's format: {message.format}, which nobody asked for")
    for name, got, wanted in (
        ("num_rows", message.num_rows, rows.size),
        ("dim", message.dim, into.shape[1]),
        ("grid", message.grid, grid),
        ("widths", len(message.widths), 0 if is_rounded else rows.size),
    ):
        if got != wanted:
            raise errors.MalformedMessage(f"reply's {name}: {got}, must be {wanted}")
    widths = np.frombuffer(message.widths, np.uint8)
    data = np.frombuffer(message.sums, np.uint8)
    try:
        if is_rounded:
            ops.unpack_add_bf16(data, grid, rows, into)
        else:
            ops.unpack_add_sums(widths, data, rows, into)
    except ValueError as error:
        raise errors.MalformedMessage(f"reply's sums: {error}") from error


_WIRE_OF_FORMAT = {pb.REPLY_FORMAT_EXACT: Wire.EXACT, pb.REPLY_FORMAT_BF16: Wire.BF16}
_FORMS = tuple(_WIRE_OF_FORMAT.values())  # by ReplyFormat
_FORMAT_OF_WIRE = {wire: number for number, wire in _WIRE_OF_FORMAT.items()}
_NO_WIDTHS = np.empty(0, np.uint8)
IS_WIRE_ORDER: Final = sys.byteorder == "little"  # else native code leaves frames to protobuf
_I8, _I32, _F32 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.float32)
_WIRE_TYPES = {name: np.dtype(name) for name in ("i1", "<u2", "<f4")}
_WIRE_SCHEME = {
    Scheme.F32: pb.SCHEME_F32,
    Scheme.INT8_32: pb.SCHEME_INT8_32,
    Scheme.INT8_256: pb.SCHEME_INT8_256,
}
_SCHEME_OF_WIRE = {int(number): scheme for scheme, number in _WIRE_SCHEME.items()}
_ERROR_OF_CODE: dict[pb.Failure.Code, type[errors.ShoalError]] = {
    pb.Failure.MALFORMED: errors.MalformedMessage,
    pb.Failure.NOT_OWNED: errors.NotOwned,
    pb.Failure.OVERLOADED: errors.NodeBusy,
    pb.Failure.DEADLINE: errors.CallTimeout,
    pb.Failure.CANCELLED: errors.CallCancelled,
    pb.Failure.NON_FINITE: errors.NumericError,
    pb.Failure.UNAVAILABLE: errors.ExpertUnavailable,
    pb.Failure.DRAINING: errors.NodeDraining,
    pb.Failure.INTERNAL: errors.NodeError,
}
_CODE_OF_ERROR: dict[type[BaseException], pb.Failure.Code] = {
    **{error: code for code, error in _ERROR_OF_CODE.items()},
    errors.ArtifactError: pb.Failure.UNAVAILABLE,
    OSError: pb.Failure.UNAVAILABLE,
    MemoryError: pb.Failure.OVERLOADED,
}


def failure_of(call_id: int, error: BaseException) -> pb.Failure:
    """Return the terminal frame that tells a coordinator of that error."""
    codes = (_CODE_OF_ERROR[kind] for kind in type(error).__mro__ if kind in _CODE_OF_ERROR)
    code = next(codes, pb.Failure.INTERNAL)
    rows = error.rows if isinstance(error, errors.NumericError) else ()
    return pb.Failure(call_id=call_id, code=code, message=str(error), rows=rows)


def error_of(failure: pb.Failure, node: str) -> errors.ShoalError:
    """Return the error that a failure stands for; its message names the node.

    A code that this version does not know becomes a plain NodeError.
    """
    message = f"node {node}: {failure.message}"
    kind = _ERROR_OF_CODE.get(failure.code, errors.NodeError)
    if kind is errors.NumericError:
        return errors.NumericError(message, tuple(failure.rows))
    return kind(message)


_NO_SCALES = np.empty((limits.MAX_ROWS_PER_CALL, 0), np.float32)


def _array(name: str, data: bytes, wire_type: str, size: int, host_type: type[_T]) -> NDArray[_T]:
    wire = _WIRE_TYPES[wire_type]
    if len(data) != size * wire.itemsize:
        raise errors.MalformedMessage(
            f"{name}: {len(data)} bytes, must be {size} x {wire.itemsize} = {size * wire.itemsize}"
        )
    return np.frombuffer(data, wire).astype(host_type, copy=False)


def _little_endian(array: NDArray[np.generic]) -> bytes:
    if IS_WIRE_ORDER and array.dtype.isnative:  # ten times a layer: NumPy's calls cost
        return array.tobytes()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _pairs_per_row(row_offsets: NDArray[np.int32]) -> bytes:
    if row_offsets.size == 2:  # decode: np.diff would cost more than all fields together
        return int(row_offsets[1] - row_offsets[0]).to_bytes(2, "little")
    return np.diff(row_offsets).astype(_WIRE_TYPES["<u2"]).tobytes()


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise errors.MalformedMessage(f"{name} = {value}: must be in {low}..{high}")
