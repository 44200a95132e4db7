"""The headers and trailers of gRPC over HTTP/2 (core).

Source: grpc/grpc doc/PROTOCOL-HTTP2.md.
"""

from enum import IntEnum
from urllib.parse import quote, unquote_to_bytes

from shoal import limits

MAX_MESSAGE_CHARS = 4 * limits.KIB  # of grpc-message, before percent-encoding


class Status(IntEnum):
    """grpc-status; the names are gRPC's."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


RESPONSE = ((":status", "200"), ("content-type", "application/grpc"))


def request(path: str, authority: str) -> list[tuple[str, str]]:
    """Return the headers that start a call of that method."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "shoal"),
    ]


def trailers(status: Status, message: str = "") -> list[tuple[str, str]]:
    """Return what ends a call."""
    fields = [("grpc-status", str(int(status)))]
    if message:
        # Printable ASCII stays, so that other tools show it; RFC 3986 escapes the rest.
        text = quote(message[:MAX_MESSAGE_CHARS], safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")
        fields.append(("grpc-message", text))
    return fields


def status_of(fields: dict[bytes, bytes]) -> tuple[Status, str] | None:
    """Return the status and its message, or None if these are no trailers."""
    text = fields.get(b"grpc-status")
    http = fields.get(b":status", b"200")
    if text is None:
        if http == b"200":
            return None
        return Status.UNKNOWN, f"HTTP status {http[:16].decode('ascii', 'replace')}"
    message = unquote_to_bytes(fields.get(b"grpc-message", b"")).decode("utf-8", "replace")
    code = int(text) if text.isdigit() and len(text) <= 2 else Status.UNKNOWN
    return (Status(code) if code in tuple(Status) else Status.UNKNOWN), message


def method_of(fields: dict[bytes, bytes]) -> str | None:
    """Return the path of a gRPC request; None: it is none."""
    is_grpc = fields.get(b"content-type", b"").startswith(b"application/grpc")
    if fields.get(b":method") != b"POST" or not is_grpc or b":path" not in fields:
        return None
    return fields[b":path"].decode("utf-8", "replace")
