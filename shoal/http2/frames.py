"""HTTP/2 frames: layout, kinds, error codes and the settings' ranges, of RFC 9113 (core)."""

import struct
from enum import IntEnum
from typing import Final

from shoal import errors, limits

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES: Final = 9
DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME_BYTES: Final = 16_384
MAX_WINDOW: Final = 2**31 - 1
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
_HEADER = struct.Struct(">BHBBI")
_SETTING = struct.Struct(">HI")


class Kind(IntEnum):
    """Frame types."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Code(IntEnum):
    """Error codes."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Setting(IntEnum):
    """Settings that mean something here; others are ignored, as the RFC says."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class Http2Error(errors.MalformedMessage):
    """The peer broke HTTP/2: the connection ends. `code`: what GOAWAY says."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(f"HTTP/2 {code.name}: {message}")
        self.code = code


def pack(kind: Kind, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    """Return a frame."""
    return header(len(body), kind, flags, stream_id) + body


def header(length: int, kind: Kind, flags: int, stream_id: int) -> bytes:
    """Return the nine bytes before a frame's body."""
    return _HEADER.pack(length >> 16, length & 0xFFFF, kind, flags, stream_id)


def unpack_header(data: bytes | bytearray | memoryview, offset: int) -> tuple[int, int, int, int]:
    """Return (length, kind, flags, stream id). The kind may be one that we do not know."""
    high, low, kind, flags, stream_id = _HEADER.unpack_from(data, offset)
    return (high << 16) | low, kind, flags, stream_id & 0x7FFF_FFFF


def pack_settings(settings: dict[Setting, int]) -> bytes:
    """Return a SETTINGS frame."""
    body = b"".join(_SETTING.pack(name, value) for name, value in settings.items())
    return pack(Kind.SETTINGS, 0, 0, body)


def unpack_settings(body: memoryview) -> list[tuple[int, int]]:
    """Return a peer's settings in order. Raises Http2Error: a size or a value is out of range."""
    if len(body) % _SETTING.size:
        raise Http2Error(Code.FRAME_SIZE_ERROR, f"SETTINGS of {len(body)} bytes")
    if len(body) > limits.MAX_H2_SETTINGS * _SETTING.size:
        raise Http2Error(Code.ENHANCE_YOUR_CALM, f"SETTINGS of {len(body)} bytes")
    pairs = list(_SETTING.iter_unpack(body))
    for name, value in pairs:
        if name == Setting.INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise Http2Error(Code.FLOW_CONTROL_ERROR, f"an initial window of {value}")
        if name == Setting.MAX_FRAME_SIZE and not DEFAULT_FRAME_BYTES <= value < 2**24:
            raise Http2Error(Code.PROTOCOL_ERROR, f"a maximal frame size of {value}")
        if name == Setting.ENABLE_PUSH and value > 1:
            raise Http2Error(Code.PROTOCOL_ERROR, f"ENABLE_PUSH of {value}")
    return pairs


def without_padding(body: memoryview, flags: int) -> memoryview:
    """Return the body of DATA or HEADERS less its padding. Raises Http2Error."""
    if not flags & PADDED:
        return body
    if not body or body[0] >= len(body):
        raise Http2Error(Code.PROTOCOL_ERROR, "more padding than frame")
    return body[1 : len(body) - body[0]]


def unpack_u32(kind: Kind, body: memoryview) -> int:
    """Return the number that a RST_STREAM or WINDOW_UPDATE holds. Raises Http2Error."""
    if len(body) != 4:
        raise Http2Error(Code.FRAME_SIZE_ERROR, f"{kind.name} of {len(body)} bytes")
    return int.from_bytes(body, "big")


def window_update(stream_id: int, num_bytes: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return pack(Kind.WINDOW_UPDATE, 0, stream_id, num_bytes.to_bytes(4, "big"))


def grown(window: int, change: int) -> int:
    """Return a window after a peer's change. Raises Http2Error: beyond what one may be."""
    if window + change > MAX_WINDOW:
        raise Http2Error(Code.FLOW_CONTROL_ERROR, "a window beyond 2^31 - 1")
    return window + change


def start_of(*, is_client: bool) -> bytes:
    """Return what an end says first: its preface, settings, and the connection's window."""
    settings = {
        Setting.ENABLE_PUSH: 0,
        Setting.MAX_CONCURRENT_STREAMS: 0 if is_client else limits.MAX_H2_STREAMS,
        Setting.INITIAL_WINDOW_SIZE: limits.H2_WINDOW_BYTES,
        Setting.MAX_FRAME_SIZE: limits.H2_FRAME_BYTES,
        Setting.MAX_HEADER_LIST_SIZE: limits.H2_HEADER_BYTES,
    }
    more = window_update(0, limits.H2_WINDOW_BYTES - DEFAULT_WINDOW)
    return (PREFACE if is_client else b"") + pack_settings(settings) + more
