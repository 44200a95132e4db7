"""What an HTTP/2 connection reports (core)."""

from dataclasses import dataclass


@dataclass(slots=True)
class MessageReceived:
    """One whole gRPC message."""

    stream_id: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class HeadersReceived:
    """A request's or a response's headers, or trailers."""

    stream_id: int
    fields: dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class RemoteEnded:
    """The peer sends nothing more on it. is_torn: it stopped in the middle of a message."""

    stream_id: int
    is_torn: bool


@dataclass(frozen=True, slots=True)
class MessageRefused:
    """A message is compressed or too long; nothing more of this stream will be reported."""

    stream_id: int
    is_compressed: bool
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer broke the stream off, with this error code."""

    stream_id: int
    code: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer takes no new stream on this connection, and says why."""

    code: int
    why: str


@dataclass(frozen=True, slots=True)
class PingAnswered:
    pass


Event = (
    MessageReceived
    | HeadersReceived
    | RemoteEnded
    | MessageRefused
    | StreamReset
    | GoneAway
    | PingAnswered
)
