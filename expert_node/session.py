"""Session: the protocol of one stream, as bytes in and bytes out, whatever carries them.

The first frame opens the stream and is checked against the node; then calls and cancels, in any
order, many in flight. What is wrong with one call fails that call alone; what breaks the protocol
(bytes that are no frame, a second Open, a call id twice in flight) fails every call of the stream
and ends it. Every call that was read ends in exactly one terminal frame.

    NEW --Open fits--> OPEN --protocol broken, peer gone, drained--> CLOSED
     `--anything else--> refused
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from google.protobuf.message import DecodeError

from expert_node.admission import Lane, Ticket
from expert_node.worker import Job, Worker, failure_frame
from shoal import errors, limits, wire
from shoal.experts.call import ExpertCall
from shoal.experts.ownership import OwnedRange
from shoal.log import get_logger
from shoal.ops.frames import CallView
from shoal.transport import Wire
from shoal.v1 import expert_pb2 as pb

NONCE_BYTES = 16
Observer = Callable[[int, int, Callable[[], ExpertCall]], None]
_log = get_logger("session")


class Ending(Enum):
    """Why a stream is refused or ended; the names are gRPC's."""

    INVALID_ARGUMENT = "the peer broke the protocol"
    FAILED_PRECONDITION = "the peer speaks of another model, numerics or protocol"
    UNAVAILABLE = "the node is leaving"


class StreamEnded(errors.ShoalError):
    """The stream must be ended with this status and message."""

    def __init__(self, ending: Ending, message: str) -> None:
        super().__init__(message)
        self.ending = ending


class _Arrival(NamedTuple):
    call_id: int
    received_s: float
    deadline_ms: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Who a node is, and what it owned when this was made: a reload makes a new one."""

    model_name: str
    identity: str
    numerics: str
    instance_epoch: str
    owned: tuple[OwnedRange, ...]
    quantisation: str
    isa: str
    num_threads: int
    max_rows_per_call: int
    credit_bytes: int = limits.CREDIT_BYTES


class Session:
    """One stream's state. All methods are called on the event loop's thread.

    Args:
        emit: takes a serialised NodeFrame to send, and the credit to give back (`sent`) once it
            has gone out.
        observe: told of every call that was taken in: the stream's id, the call's rows, and what
            makes the call itself for whoever wants it.
    """

    def __init__(
        self,
        stream_id: int,
        facts: NodeFacts,
        worker: Worker,
        emit: Callable[[bytes, int], None],
        clock: Callable[[], float] = time.monotonic,
        observe: Observer = lambda _stream_id, _num_rows, _call: None,
    ) -> None:
        self._stream_id = stream_id
        self._facts = facts
        self._worker = worker
        self._emit = emit
        self._clock = clock
        self._observe = observe
        self._lane: Lane | None = None
        self._held: dict[int, int] = {}  # call id -> request bytes
        self._used_bytes = 0
        self._is_closed = False

    @property
    def has_calls(self) -> bool:
        """Whether a call of this stream still waits for its terminal frame."""
        return bool(self._held)

    @property
    def may_bypass(self) -> bool:
        """Whether calls may be answered beside us: interactive ones, while none is held."""
        is_open = self._lane is Lane.INTERACTIVE and not self._is_closed
        return is_open and not (self._held or self._used_bytes)

    def receive(self, data: bytes | memoryview) -> bool:
        """Act on one ClientFrame, whose bytes never change again.

        Returns whether it was a plain call: answered at once, by one native step.

        Raises:
            StreamEnded: calls in flight have got their terminal frames; end the stream.
        """
        view = None if self._lane is None else wire.parse_call(data)
        if view is not None:
            return self._on_parsed_call(view, data)
        try:
            frame = pb.ClientFrame.FromString(bytes(data))
        except DecodeError:
            raise self._broken("bytes that are no ClientFrame") from None
        kind = frame.WhichOneof("frame")
        if self._lane is None:
            self._open(frame, kind)
        elif kind == "call":
            self._on_call(frame.call, len(data))
        elif kind == "cancel":
            self._worker.cancel((self._stream_id, frame.cancel.call_id))
        elif kind == "hint":
            self._on_hint(frame.hint)
        elif kind == "open":
            raise self._broken("a second Open")
        else:
            raise self._broken("a frame without content")
        return False

    def sent(self, credit_bytes: int) -> None:
        """Note that a frame has gone out, which gives back that much credit."""
        self._used_bytes -= credit_bytes

    def finished(self, call_id: int, frame: bytes) -> None:
        """Send a call's terminal frame (see `worker.Caller`)."""
        num_bytes = self._held.pop(call_id, 0)
        if not self._is_closed:
            self._emit(frame, num_bytes)

    def progressed(self, call_ids: list[int]) -> None:
        """Send a progress frame (see `worker.Caller`)."""
        if not self._is_closed:
            self._emit(_frame(progress=pb.Progress(call_ids=call_ids)), 0)

    def drain(self, reason: str) -> None:
        """Tell the peer that the node is leaving."""
        if self._lane is not None and not self._is_closed:
            self._emit(_frame(draining=pb.Draining(reason=reason)), 0)

    def close(self) -> None:
        """Forget the stream; its calls are dropped. Safe to call again."""
        if not self._is_closed:
            self._is_closed = True
            if self._lane is not None:
                _log.info("stream closed", stream=self._stream_id, calls_dropped=len(self._held))
            self._held.clear()
            self._worker.drop_stream(self._stream_id)

    def _open(self, frame: pb.ClientFrame, kind: str | None) -> None:
        if kind != "open":
            raise StreamEnded(Ending.INVALID_ARGUMENT, "the first frame of a stream must be Open")
        opening, facts = frame.open, self._facts
        wanted = limits.PROTOCOL_VERSION
        if opening.protocol_version != wanted:
            raise _mismatch("protocol version", str(opening.protocol_version), str(wanted))
        if opening.identity != facts.identity:
            name = f"{facts.identity} ({facts.model_name})"
            raise _mismatch("model identity", opening.identity, name)
        if opening.numerics != facts.numerics:
            raise _mismatch("numerics", opening.numerics, facts.numerics)
        if int(opening.lane) not in tuple(Lane) or len(opening.coordinator_nonce) != NONCE_BYTES:
            raise StreamEnded(
                Ending.INVALID_ARGUMENT,
                f"Open: lane {opening.lane} must be 1 or 2, and coordinator_nonce of "
                f"{len(opening.coordinator_nonce)} bytes must have {NONCE_BYTES}",
            )
        if self._worker.is_draining:
            raise StreamEnded(Ending.UNAVAILABLE, "the node is draining: go elsewhere")
        self._lane = Lane(opening.lane)
        _log.info(
            "stream opened",
            stream=self._stream_id,
            lane=self._lane.name.lower(),
            coordinator=opening.coordinator_nonce.hex(),
            epoch=opening.stream_epoch,
        )
        opened = pb.Opened(
            credit_bytes=facts.credit_bytes,
            max_rows_per_call=facts.max_rows_per_call,
            wants_hints=self._worker.wants_hints,
        )
        self._emit(_frame(opened=opened), 0)

    def _on_parsed_call(self, view: CallView, data: bytes | memoryview) -> bool:
        received_s = self._clock()
        num_bytes = len(data)
        if view.call_id not in self._held and self._has_room(num_bytes):
            frame = self._worker.answer_now(view, received_s)
            if frame is not None:
                self._used_bytes += num_bytes
                self._observe(self._stream_id, view.num_rows, lambda: wire.call_of(view, data))
                self._emit(frame, num_bytes)
                return True
        self._take_in(
            _Arrival(view.call_id, received_s, view.deadline_ms, num_bytes),
            lambda: (wire.call_of(view, data), wire.form_of(view)),
        )
        return False

    def _on_call(self, message: pb.ExpertCall, num_bytes: int) -> None:
        self._take_in(
            _Arrival(message.call_id, self._clock(), message.deadline_ms, num_bytes),
            lambda: (wire.decode_call(message), wire.wire_of(message)),
        )

    def _take_in(self, arrival: _Arrival, decode: Callable[[], tuple[ExpertCall, Wire]]) -> None:
        call_id, num_bytes = arrival.call_id, arrival.num_bytes
        assert self._lane is not None
        if call_id in self._held:
            raise self._broken(f"call id {call_id} is in flight already")
        try:
            self._check_size(num_bytes)
            call, form = decode()
            self._worker.check(call)
        except errors.ShoalError as error:
            _log.info("call refused", stream=self._stream_id, call_id=call_id, error=str(error))
            self._emit(failure_frame(call_id, error), 0)
            return
        received_s = arrival.received_s
        deadline_s = received_s + arrival.deadline_ms / 1000
        ticket = Ticket(self._stream_id, call_id, self._lane, received_s, deadline_s)
        self._held[call_id] = num_bytes
        self._used_bytes += num_bytes
        self._observe(self._stream_id, call.rows.num_rows, lambda: call)
        self._worker.submit(Job(ticket, call, self, form))

    def _on_hint(self, message: pb.Hint) -> None:
        try:
            layer, experts = wire.decode_hint(message)
        except errors.MalformedMessage as error:
            raise self._broken(f"a hint that makes no sense: {error}") from error
        self._worker.hint(layer, experts, self._stream_id)

    def _has_room(self, num_bytes: int) -> bool:
        is_long = self._lane is Lane.INTERACTIVE and num_bytes > limits.INTERACTIVE_MESSAGE_BYTES
        return not is_long and self._used_bytes < self._facts.credit_bytes

    def _check_size(self, num_bytes: int) -> None:
        if self._has_room(num_bytes):
            return
        if self._lane is Lane.INTERACTIVE and num_bytes > limits.INTERACTIVE_MESSAGE_BYTES:
            raise errors.MalformedMessage(
                f"a call of {num_bytes} bytes on the interactive lane, whose limit is "
                f"{limits.INTERACTIVE_MESSAGE_BYTES}: send it on the bulk lane"
            )
        # One message may go over: the peer gives a call's credit back when it reads the terminal
        # frame, which can be just before this side learns that the frame has gone out.
        raise errors.NodeBusy(
            f"{self._used_bytes} bytes are in flight on this stream, "
            f"more than its credit of {self._facts.credit_bytes}"
        )

    def _broken(self, what: str) -> StreamEnded:
        # The peer's bug. Its calls end here, so that nobody waits for them.
        error = errors.MalformedMessage(f"the stream broke the protocol: {what}")
        held, self._held = list(self._held), {}
        for call_id in held:
            self._emit(failure_frame(call_id, error), 0)
        self.close()
        _log.warning("stream broken", stream=self._stream_id, error=what, calls_failed=len(held))
        return StreamEnded(Ending.INVALID_ARGUMENT, what)


def _frame(
    *,
    opened: pb.Opened | None = None,
    progress: pb.Progress | None = None,
    draining: pb.Draining | None = None,
) -> bytes:
    return pb.NodeFrame(opened=opened, progress=progress, draining=draining).SerializeToString()


def _mismatch(what: str, theirs: str, ours: str) -> StreamEnded:
    message = f"{what}: you have {theirs[:128] or 'none'}, this node has {ours}"
    return StreamEnded(Ending.FAILED_PRECONDITION, message)
