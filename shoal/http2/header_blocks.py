"""Header blocks: put together from their frames, bounded, and decompressed (core)."""

from collections.abc import Sequence
from dataclasses import dataclass

import hpack

from shoal import limits
from shoal.http2 import frames
from shoal.http2.frames import Code, Http2Error, Kind

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class HeaderBlock:
    """A whole one. A name that comes twice has its last value: gRPC's own never do."""

    stream_id: int
    ends_stream: bool
    fields: dict[bytes, bytes]


class HeaderBlocks:
    """The receiving half of HPACK: every block must pass through it, in order."""

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=limits.H2_HEADER_BYTES)
        self._block = bytearray()
        self._num_frames = 0
        self._ends_stream = False
        self.stream_id: int | None = None  # of the block that is not complete

    def start(self, stream_id: int, flags: int, body: memoryview) -> HeaderBlock | None:
        """Take the content of a HEADERS frame; returns the block if that is all of it."""
        self.stream_id, self._num_frames = stream_id, 0
        self._ends_stream = bool(flags & frames.END_STREAM)
        return self.go_on(flags, body)

    def go_on(self, flags: int, body: memoryview) -> HeaderBlock | None:
        """Take a CONTINUATION frame. Raises Http2Error, as `start` does: too long, or broken."""
        if self.stream_id is None:
            raise Http2Error(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        if len(self._block) + len(body) > limits.H2_HEADER_BYTES:
            raise Http2Error(Code.ENHANCE_YOUR_CALM, "a header block of too many bytes")
        if self._num_frames > limits.MAX_H2_CONTINUATIONS:
            raise Http2Error(Code.ENHANCE_YOUR_CALM, "a header block of too many frames")
        self._num_frames += 1
        self._block += body
        if not flags & frames.END_HEADERS:
            return None
        block, stream_id = bytes(self._block), self.stream_id
        self._block.clear()
        self.stream_id = None
        return HeaderBlock(stream_id, self._ends_stream, self._decode(block))

    def _decode(self, block: bytes) -> dict[bytes, bytes]:
        try:
            pairs = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise Http2Error(Code.COMPRESSION_ERROR, f"a header block: {error!r}") from error
        return {bytes(name): bytes(value) for name, value in pairs}


class HeaderWriter:
    """The sending half of HPACK: stateless, which is legal whatever the peer's table is."""

    def __init__(self) -> None:
        self._encoder = hpack.Encoder()
        self._encoder.header_table_size = 0

    def frame(self, stream_id: int, headers: Headers, flags: int = 0) -> bytes:
        """Return the HEADERS frame of a whole block."""
        block: bytes = self._encoder.encode(list(headers), huffman=False)
        assert len(block) <= frames.DEFAULT_FRAME_BYTES, "our own headers are short"
        return frames.pack(Kind.HEADERS, flags | frames.END_HEADERS, stream_id, block)
