"""One stream of a connection: its windows, and frames' content put together to messages (core)."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from shoal import limits
from shoal.http2.events import MessageReceived, MessageRefused

PREFIX_BYTES: Final = 5  # of a gRPC message: compressed or not, length
GRANT_BYTES: Final = limits.H2_WINDOW_BYTES // 4  # so much is given back at once


class Bypass(NamedTuple):
    """How messages of one stream may be exchanged beside a connection: bytes with their prefixes.

    may_receive: until windows have to be given back. may_send: until the peer gives some back.
    """

    may_receive: int
    may_send: int
    max_frame_bytes: int


@dataclass(slots=True)
class Windows:
    """What may be sent and received, on a stream or on all of them together.

    consumed: received, and not given back yet.
    """

    send: int
    receive: int = limits.H2_WINDOW_BYTES
    consumed: int = 0

    def take_in(self, num_bytes: int) -> None:
        """Count what was received; `receive` below zero: it was more than allowed."""
        self.receive -= num_bytes
        self.consumed += num_bytes

    def give_back(self) -> int:
        """Return by how much the peer's window may grow now, 0: not yet."""
        if self.consumed < GRANT_BYTES:
            return 0
        granted, self.consumed = self.consumed, 0
        self.receive += granted
        return granted

    def bypass(self, whole: "Windows", max_frame_bytes: int) -> Bypass:
        """Return what may be exchanged within a stream's windows and those of its connection."""
        may_receive = GRANT_BYTES - max(self.consumed, whole.consumed)
        return Bypass(may_receive, min(self.send, whole.send), max_frame_bytes)


@dataclass(slots=True)
class Stream:
    """partial: of a message that is not whole yet. outbox: messages that wait for window.

    ending: the frames that end our half, once the outbox is empty.
    is_refused: what it still sends is thrown away.
    """

    windows: Windows
    partial: bytearray = field(default_factory=bytearray)
    outbox: deque[memoryview] = field(default_factory=deque)
    ending: bytes | None = None
    has_headers: bool = False
    is_refused: bool = False
    is_local_open: bool = True
    is_remote_open: bool = True

    @property
    def may_send(self) -> bool:
        """Whether our half is open, and not about to end."""
        return self.is_local_open and self.ending is None

    @property
    def is_between_messages(self) -> bool:
        """Whether a message may begin now."""
        is_open = self.has_headers and self.is_remote_open
        return is_open and not (self.partial or self.is_refused)

    def assemble(
        self, stream_id: int, body: memoryview, max_message_bytes: int
    ) -> Iterator[MessageReceived | MessageRefused]:
        """Take the content of a DATA frame; yield the messages that end in it.

        One that is compressed or too long is refused, and all that follows it.
        """
        partial = self.partial
        if not partial and len(body) >= PREFIX_BYTES and body[0] == 0:
            length = int.from_bytes(body[1:PREFIX_BYTES], "big")
            if len(body) == PREFIX_BYTES + length <= max_message_bytes:
                yield MessageReceived(stream_id, bytes(body[PREFIX_BYTES:]))
                return
        partial += body
        start = 0
        while len(partial) - start >= PREFIX_BYTES:
            length = int.from_bytes(partial[start + 1 : start + PREFIX_BYTES], "big")
            if partial[start] or length > max_message_bytes:
                yield MessageRefused(stream_id, partial[start] != 0, length)
                self.is_refused = True
                start = len(partial)
                break
            end = start + PREFIX_BYTES + length
            if len(partial) < end:
                break
            with memoryview(partial) as view:
                payload = bytes(view[start + PREFIX_BYTES : end])
            yield MessageReceived(stream_id, payload)
            start = end
        del partial[:start]
