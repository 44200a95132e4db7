"""One end of an HTTP/2 connection that carries gRPC messages: bytes in, events out (core).

    receive(bytes) -> events        open, respond, send_message, end, reset, ping -> take_output()

Strict and small: prior knowledge only, no push, no priorities, no dynamic table in what it sends.
What a peer does to a connection raises Http2Error, after which only `take_output` (with the GOAWAY
for the peer) makes sense; what it does to one stream is an event. Windows are given back as
messages are read, but not to a peer that leaves more than MAX_UNREAD_BYTES of answers unread.
"""

import struct
from typing import Final

from shoal import limits
from shoal.http2 import frames
from shoal.http2.events import (
    Event,
    GoneAway,
    HeadersReceived,
    MessageReceived,
    PingAnswered,
    RemoteEnded,
    StreamReset,
)
from shoal.http2.flood import FloodGuard
from shoal.http2.frames import Code, Http2Error, Kind, Setting
from shoal.http2.header_blocks import HeaderBlock, HeaderBlocks, Headers, HeaderWriter
from shoal.http2.stream import GRANT_BYTES, PREFIX_BYTES, Bypass, Stream, Windows

MAX_UNREAD_BYTES: Final = limits.MIB
_MESSAGE_HEAD: Final = struct.Struct(">BHBBIBI")  # a DATA frame's header and the gRPC prefix


class Connection:
    """One end. `receive` is the only way in, `take_output` the only way out."""

    def __init__(self, *, is_client: bool, max_message_bytes: int = limits.MAX_MESSAGE_BYTES):
        self._is_client = is_client
        self._max_message_bytes = max_message_bytes
        self._max_whole_bytes = min(max_message_bytes + PREFIX_BYTES, limits.H2_FRAME_BYTES)
        self._blocks = HeaderBlocks()
        self._headers = HeaderWriter()
        self._streams: dict[int, Stream] = {}
        self._next_stream_id = 1
        self._last_remote_id = 0
        self._windows = Windows(frames.DEFAULT_WINDOW)
        self._peer_window = frames.DEFAULT_WINDOW
        self._peer_frame_bytes = frames.DEFAULT_FRAME_BYTES
        self._peer_streams = limits.MAX_H2_STREAMS
        self._buffer = bytearray()
        self._preface = b"" if is_client else frames.PREFACE
        self._has_settings = False
        self._flood = FloodGuard()
        self._output: list[bytes] = []
        self._unread_bytes = 0  # of messages in outboxes
        self._num_queued = 0
        self._output.append(frames.start_of(is_client=is_client))

    # What the shell asks for.

    @property
    def has_output(self) -> bool:
        """Whether `take_output` has something to give."""
        return bool(self._output)

    def take_output(self) -> bytes:
        """Return the bytes to write, once."""
        output, self._output = self._output, []
        return output[0] if len(output) == 1 else b"".join(output)

    def open(self, headers: Headers) -> int:
        """Start a stream; returns its id."""
        stream_id, self._next_stream_id = self._next_stream_id, self._next_stream_id + 2
        self._streams[stream_id] = Stream(Windows(self._peer_window))
        self._output.append(self._headers.frame(stream_id, headers))
        return stream_id

    def respond(self, stream_id: int, headers: Headers) -> None:
        """Send a response's first headers. A stream that is gone: nothing happens."""
        if self.is_open(stream_id):
            self._output.append(self._headers.frame(stream_id, headers))

    def is_open(self, stream_id: int) -> bool:
        """Whether this end may still send on it."""
        return stream_id in self._streams and self._streams[stream_id].may_send

    def send_message(self, stream_id: int, payload: bytes) -> None:
        """Send one gRPC message, or as much as the peer's windows allow; the rest follows.

        A stream that is gone: nothing happens. Raises Http2Error: the peer reads nothing at all.
        """
        stream = self._streams.get(stream_id)
        if stream is None or not stream.may_send:
            return
        self._flood.on_message(len(payload))
        length = len(payload)
        size = length + PREFIX_BYTES
        room = self._room(stream)
        if size <= room and not stream.outbox:
            head = _MESSAGE_HEAD.pack(size >> 16, size & 0xFFFF, 0, 0, stream_id, 0, length)
            self._output.append(head + payload)
            self._count_sent(stream, size)
            return
        # Only a node's answers can pile up so: what a coordinator sends is bounded by its credit.
        if self._num_queued >= limits.MAX_H2_QUEUED_FRAMES and not self._is_client:
            self.go_away(Code.ENHANCE_YOUR_CALM, "the peer does not read its answers")
            raise Http2Error(Code.ENHANCE_YOUR_CALM, "the peer does not read its answers")
        self._num_queued += 1
        self._unread_bytes += size
        stream.outbox.append(memoryview(b"\0" + length.to_bytes(4, "big") + payload))
        self._drain_outbox(stream_id, stream)

    # What native code sends and receives beside this object, in whole messages of one frame.

    def may_bypass(self, stream_id: int, num_bytes: int, count: int = 1) -> bool:
        """Whether `count` messages of that many bytes may be sent beside us, and others received.

        From now on, until we are told of them.
        """
        stream = self._streams.get(stream_id)
        if stream is None or not (stream.is_between_messages and stream.may_send):
            return False
        is_busy = (
            self._output or self._buffer or stream.outbox or self._blocks.stream_id is not None
        )
        size = num_bytes + PREFIX_BYTES
        has_room = count * size <= min(self._windows.send, stream.windows.send)
        return not is_busy and has_room and size <= self._peer_frame_bytes

    def bypass(self, stream_id: int) -> Bypass | None:
        """Return how messages may go beside us if that is the only stream; None: not now."""
        if len(self._streams) != 1 or not self.may_bypass(stream_id, 0):
            return None
        stream = self._streams[stream_id]
        return stream.windows.bypass(self._windows, self._peer_frame_bytes)

    def exchanged_beside(
        self, stream_id: int, num_messages: int, received_bytes: int, sent_bytes: int
    ) -> None:
        """Count so many messages, with their prefixes, that were received, or sent, or both."""
        stream = self._streams[stream_id]
        self._windows.take_in(received_bytes)
        stream.windows.take_in(received_bytes)
        self._count_sent(stream, sent_bytes)
        self._flood.on_message(received_bytes + sent_bytes, 2 * num_messages)
        self._grant(stream_id, stream)

    @property
    def has_unsent(self) -> bool:
        """Whether a message waits for the peer's windows."""
        return self._num_queued > 0

    def num_unsent(self, stream_id: int) -> int:
        """Return how many messages have not wholly become output yet."""
        return len(self._streams[stream_id].outbox) if stream_id in self._streams else 0

    def end(self, stream_id: int, trailers: Headers = ()) -> None:
        """End our half after what is queued, with trailers if there are any."""
        if not self.is_open(stream_id):
            return
        if trailers:
            ending = self._headers.frame(stream_id, trailers, frames.END_STREAM)
        else:
            ending = frames.pack(Kind.DATA, frames.END_STREAM, stream_id)
        stream = self._streams[stream_id]
        stream.ending = ending
        self._drain_outbox(stream_id, stream)

    def reset(self, stream_id: int, code: Code) -> None:
        """Break a stream off."""
        if stream_id in self._streams:
            self._forget(stream_id)
            body = int(code).to_bytes(4, "big")
            self._output.append(frames.pack(Kind.RST_STREAM, 0, stream_id, body))

    def ping(self) -> None:
        """Ask for a PingAnswered."""
        self._output.append(frames.pack(Kind.PING, 0, 0, bytes(8)))

    def go_away(self, code: Code = Code.NO_ERROR, why: str = "") -> None:
        """Tell the peer that this connection ends."""
        body = self._last_remote_id.to_bytes(4, "big") + int(code).to_bytes(4, "big")
        self._output.append(frames.pack(Kind.GOAWAY, 0, 0, body + why.encode()[:512]))

    # What the peer does.

    def take_message(self, data: bytes | memoryview) -> tuple[int, memoryview] | None:
        """Take data that is one whole frame with one whole message, as almost all of it is.

        Returns:
            (stream id, payload, a view of the data); None: it is anything else, or more has to be
            done about it, and nothing has changed: `receive` it.
        """
        num_bytes = len(data)
        if num_bytes < _MESSAGE_HEAD.size or self._buffer or self._preface:
            return None
        high, low, kind, flags, stream_id, is_compressed, length = _MESSAGE_HEAD.unpack_from(data)
        size = length + PREFIX_BYTES
        if kind or flags or is_compressed or (high << 16) | low != size:
            return None
        stream = self._streams.get(stream_id)
        if stream is None or not stream.is_between_messages or self._blocks.stream_id is not None:
            return None
        if num_bytes != frames.HEADER_BYTES + size or size > self._max_whole_bytes:
            return None
        if max(stream.windows.consumed, self._windows.consumed) + size >= GRANT_BYTES:
            return None  # windows are to be given back, or run out
        stream.windows.take_in(size)
        self._windows.take_in(size)
        self._flood.on_message(length)
        return stream_id, memoryview(data)[_MESSAGE_HEAD.size :]

    def receive(self, data: bytes | memoryview, now_s: float) -> list[Event]:
        """Take what arrived; return what it means, in order.

        Raises:
            Http2Error: the peer broke the protocol or a limit; the GOAWAY is in the output.
        """
        self._flood.at(now_s)
        events: list[Event] = []
        source: bytes | bytearray | memoryview = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        try:
            with memoryview(source) as view:
                used = self._read_frames(source, view, events)
        except Http2Error as error:
            self.go_away(error.code, str(error))
            raise
        if source is self._buffer:
            del self._buffer[:used]
        elif used < len(data):
            self._buffer += data[used:]
        return events

    def _read_frames(
        self, source: bytes | bytearray | memoryview, view: memoryview, events: list[Event]
    ) -> int:
        start, size = 0, len(source)
        if self._preface:
            start = min(size, len(self._preface))
            if source[:start] != self._preface[:start]:
                raise Http2Error(Code.PROTOCOL_ERROR, "no HTTP/2 preface")
            self._preface = self._preface[start:]
        while size - start >= frames.HEADER_BYTES:
            length, kind, flags, stream_id = frames.unpack_header(source, start)
            if length > limits.H2_FRAME_BYTES:
                raise Http2Error(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            body = start + frames.HEADER_BYTES
            if size < body + length:
                self._check_order(kind, stream_id)
                break
            self._check_order(kind, stream_id)
            start = body + length
            if kind == Kind.DATA:
                self._on_data(stream_id, flags, view[body:start], events)
            else:
                self._on_other(kind, stream_id, flags, view[body:start], events)
        return start

    def _check_order(self, kind: int, stream_id: int) -> None:
        if not self._has_settings and kind != Kind.SETTINGS:
            raise Http2Error(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        unfinished = self._blocks.stream_id
        if unfinished is not None and (kind != Kind.CONTINUATION or stream_id != unfinished):
            raise Http2Error(Code.PROTOCOL_ERROR, "a header block was interrupted")

    def _on_data(self, stream_id: int, flags: int, body: memoryview, events: list[Event]) -> None:
        size = len(body)
        self._windows.take_in(size)
        if self._windows.receive < 0:
            raise Http2Error(Code.FLOW_CONTROL_ERROR, "more data than the connection's window")
        stream = self._streams.get(stream_id)
        if stream is None or not stream.is_remote_open:
            self._check_was_open(stream_id, "DATA")
            self._flood.on_control("DATA of a closed stream")
            self._grant(0, None)
            return
        if not stream.has_headers:
            raise Http2Error(Code.PROTOCOL_ERROR, "DATA before HEADERS")
        stream.windows.take_in(size)
        if stream.windows.receive < 0:
            raise Http2Error(Code.FLOW_CONTROL_ERROR, "more data than the stream's window")
        if not size and not flags & frames.END_STREAM:
            self._flood.on_control("empty DATA")
        if not stream.is_refused:
            content = frames.without_padding(body, flags)
            for event in stream.assemble(stream_id, content, self._max_message_bytes):
                if isinstance(event, MessageReceived):
                    self._flood.on_message(len(event.payload))
                events.append(event)
            if stream.partial:
                unfinished_bytes = sum(len(each.partial) for each in self._streams.values())
                if unfinished_bytes > limits.MAX_H2_UNFINISHED_BYTES:
                    raise Http2Error(Code.ENHANCE_YOUR_CALM, "too many unfinished messages")
        if flags & frames.END_STREAM:
            self._end_remote(stream_id, stream, events)
        self._grant(stream_id, stream)

    def _end_remote(self, stream_id: int, stream: Stream, events: list[Event]) -> None:
        stream.is_remote_open = False
        is_torn = bool(stream.partial)  # the stream ends in the middle of a message
        if not stream.is_local_open:
            self._forget(stream_id)
        events.append(RemoteEnded(stream_id, is_torn))

    def _on_other(
        self, kind: int, stream_id: int, flags: int, body: memoryview, events: list[Event]
    ) -> None:
        match kind:
            case Kind.WINDOW_UPDATE:
                self._on_window_update(stream_id, frames.unpack_u32(Kind.WINDOW_UPDATE, body))
            case Kind.PING:
                self._on_ping(stream_id, flags, body, events)
            case Kind.SETTINGS:
                self._on_settings(stream_id, flags, body)
            case Kind.HEADERS:
                self._on_headers(stream_id, flags, body, events)
            case Kind.CONTINUATION:
                self._on_continuation(flags, body, events)
            case Kind.RST_STREAM:
                self._flood.on_control("RST_STREAM")
                self._check_was_open(stream_id, "RST_STREAM")
                code = frames.unpack_u32(Kind.RST_STREAM, body)
                if self._forget(stream_id):
                    events.append(StreamReset(stream_id, code))
            case Kind.GOAWAY:
                self._flood.on_control("GOAWAY")
                if stream_id or len(body) < 8:
                    raise Http2Error(Code.PROTOCOL_ERROR, "a GOAWAY without its content")
                why = bytes(body[8:520]).decode("utf-8", "replace")
                events.append(GoneAway(int.from_bytes(body[4:8], "big"), why))
            case Kind.PUSH_PROMISE:
                raise Http2Error(Code.PROTOCOL_ERROR, "PUSH_PROMISE")
            case _:  # PRIORITY, and what later standards add
                self._flood.on_control(f"of kind {kind}")

    def _on_window_update(self, stream_id: int, increment: int) -> None:
        increment &= 0x7FFF_FFFF
        self._flood.on_control("WINDOW_UPDATE")
        if not increment:
            raise Http2Error(Code.PROTOCOL_ERROR, "a WINDOW_UPDATE of 0")
        if stream_id:
            self._check_was_open(stream_id, "WINDOW_UPDATE")
            stream = self._streams.get(stream_id)
            if stream is not None:
                stream.windows.send = frames.grown(stream.windows.send, increment)
                self._drain_outbox(stream_id, stream)
            return
        self._windows.send = frames.grown(self._windows.send, increment)
        self._drain_all()

    def _on_ping(self, stream_id: int, flags: int, body: memoryview, events: list[Event]) -> None:
        self._flood.on_control("PING")
        if stream_id or len(body) != 8:
            raise Http2Error(Code.FRAME_SIZE_ERROR, f"a PING of {len(body)} bytes")
        if flags & frames.ACK:
            events.append(PingAnswered())
        else:
            self._output.append(frames.pack(Kind.PING, frames.ACK, 0, bytes(body)))

    def _on_settings(self, stream_id: int, flags: int, body: memoryview) -> None:
        self._flood.on_control("SETTINGS")
        if stream_id or (flags & frames.ACK and body):
            raise Http2Error(Code.PROTOCOL_ERROR, "SETTINGS of a stream, or an ACK with content")
        self._has_settings = True
        if flags & frames.ACK:
            return
        for name, value in frames.unpack_settings(body):
            if name == Setting.MAX_FRAME_SIZE:
                self._peer_frame_bytes = value
            elif name == Setting.INITIAL_WINDOW_SIZE:
                change, self._peer_window = value - self._peer_window, value
                for stream in self._streams.values():
                    stream.windows.send = frames.grown(stream.windows.send, change)
        self._output.append(frames.pack(Kind.SETTINGS, frames.ACK, 0))
        self._drain_all()

    def _on_headers(
        self, stream_id: int, flags: int, body: memoryview, events: list[Event]
    ) -> None:
        self._flood.on_control("HEADERS")
        if not stream_id:
            raise Http2Error(Code.PROTOCOL_ERROR, "HEADERS of stream 0")
        block = frames.without_padding(body, flags)
        if flags & frames.PRIORITY_FLAG:
            if len(block) < 5:
                raise Http2Error(Code.FRAME_SIZE_ERROR, "HEADERS without its priority")
            block = block[5:]
        self._on_block(self._blocks.start(stream_id, flags, block), events)

    def _on_continuation(self, flags: int, body: memoryview, events: list[Event]) -> None:
        self._flood.on_control("CONTINUATION")
        self._on_block(self._blocks.go_on(flags, body), events)

    def _on_block(self, block: HeaderBlock | None, events: list[Event]) -> None:
        if block is None:
            return
        stream_id, ends, fields = block.stream_id, block.ends_stream, block.fields
        stream = self._streams.get(stream_id)
        if stream is None:
            stream = self._accept(stream_id)
        if stream is None or not stream.is_remote_open:
            return  # refused, or on its way when we ended the stream
        if stream.has_headers and not ends and b":status" not in fields:
            raise Http2Error(Code.PROTOCOL_ERROR, "a second HEADERS that does not end the stream")
        stream.has_headers = True
        events.append(HeadersReceived(stream_id, fields))
        if ends:
            self._end_remote(stream_id, stream, events)

    def _accept(self, stream_id: int) -> Stream | None:
        if self._is_client or stream_id <= self._last_remote_id:
            self._check_was_open(stream_id, "HEADERS")
            return None
        if stream_id % 2 == 0:
            raise Http2Error(Code.PROTOCOL_ERROR, f"a client opened stream {stream_id}")
        self._last_remote_id = stream_id
        if len(self._streams) >= limits.MAX_H2_STREAMS:
            body = int(Code.REFUSED_STREAM).to_bytes(4, "big")
            self._output.append(frames.pack(Kind.RST_STREAM, 0, stream_id, body))
            return None
        stream = self._streams[stream_id] = Stream(Windows(self._peer_window))
        return stream

    def _check_was_open(self, stream_id: int, what: str) -> None:
        if self._is_client:
            was_open = stream_id % 2 == 1 and stream_id < self._next_stream_id
        else:
            was_open = stream_id % 2 == 1 and stream_id <= self._last_remote_id
        if not was_open:
            raise Http2Error(Code.PROTOCOL_ERROR, f"{what} of stream {stream_id}, which is idle")

    # What goes out.

    def _drain_all(self) -> None:
        for stream_id, stream in list(self._streams.items()):
            self._drain_outbox(stream_id, stream)

    def _drain_outbox(self, stream_id: int, stream: Stream) -> None:
        while stream.outbox:
            message = stream.outbox[0]
            size = min(len(message), self._room(stream))
            if size <= 0:
                return
            self._output.append(frames.header(size, Kind.DATA, 0, stream_id))
            self._output.append(bytes(message[:size]))
            self._count_sent(stream, size)
            self._unread_bytes -= size
            if size == len(message):
                stream.outbox.popleft()
                self._num_queued -= 1
            else:
                stream.outbox[0] = message[size:]
        if stream.ending is not None and stream.is_local_open:
            self._output.append(stream.ending)
            stream.is_local_open = False
            if not stream.is_remote_open:
                self._forget(stream_id)
        if stream.is_remote_open:
            self._grant(stream_id, stream)

    def _grant(self, stream_id: int, stream: Stream | None) -> None:
        if self._unread_bytes > MAX_UNREAD_BYTES and not self._is_client:
            return  # a client must read before it asks for more; both waiting would be for ever
        if granted := self._windows.give_back():
            self._output.append(frames.window_update(0, granted))
        if stream is not None and stream.is_remote_open and (granted := stream.windows.give_back()):
            self._output.append(frames.window_update(stream_id, granted))

    def _room(self, stream: Stream) -> int:
        return min(self._windows.send, stream.windows.send, self._peer_frame_bytes)

    def _count_sent(self, stream: Stream, num_bytes: int) -> None:
        self._windows.send -= num_bytes
        stream.windows.send -= num_bytes

    def _forget(self, stream_id: int) -> bool:
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return False
        self._num_queued -= len(stream.outbox)
        self._unread_bytes -= sum(map(len, stream.outbox))
        return True

    def check_integrity(self) -> None:
        """Assert what holds between calls."""
        queued = [message for stream in self._streams.values() for message in stream.outbox]
        assert self._num_queued == len(queued)
        assert self._unread_bytes == sum(map(len, queued))
        assert self._windows.receive + self._windows.consumed == limits.H2_WINDOW_BYTES
        for stream_id, stream in self._streams.items():
            assert stream.is_local_open or stream.is_remote_open, f"stream {stream_id} is over"
            windows = stream.windows
            assert windows.receive + windows.consumed == limits.H2_WINDOW_BYTES
