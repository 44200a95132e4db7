"""A valid HTTP/2 conversation made hostile: what one seed does to it, as chunks of bytes."""

import random
from collections.abc import Callable

import hpack

from shoal.http2 import frames
from shoal.http2.frames import HEADER_BYTES, PREFACE, Kind
from shoal.v1 import expert_pb2 as pb

_EDGES = [0, 1, 4, 5, 9, 255, 256, 16_384, 65_535, 2**20, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1]
_METHODS = [
    "/shoal.v1.ExpertService/Describe",
    "/shoal.v1.ExpertService/Execute",
    "/shoal.v1.ExpertService/Drain",
    "/shoal.v1.ExpertService/Reload",
    "/shoal.v1.ExpertService/Nothing",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
]


def split(data: bytes) -> list[bytes]:
    """Return the preface, if there is one, and the frames of a conversation's one direction."""
    start = len(PREFACE) if data.startswith(PREFACE) else 0
    parts = [data[:start]] if start else []
    while start < len(data):
        end = start + HEADER_BYTES + frames.unpack_header(data, start)[0]
        parts.append(data[start:end])
        start = end
    return parts


def hostile(random_: random.Random, parts: list[bytes]) -> list[bytes]:
    """Return the conversation spoiled in a few ways, cut into the chunks that arrive."""
    parts = list(parts)
    for _ in range(random_.choice([0, 1, 1, 2, 4, 8])):
        random_.choice(_CHANGES)(random_, parts)
    data = b"".join(parts)
    if random_.random() < 0.3:
        data = _flipped(random_, data, random_.choice([1, 1, 2, 8, 64]))
    if random_.random() < 0.2:
        data = data[: random_.randrange(len(data) + 1)]
    return _cut(random_, data)


def _cut(random_: random.Random, data: bytes) -> list[bytes]:
    size = random_.choice([1, 2, 9, 10, 100, 1000, 16_393, 2**20])
    if size < 10 and len(data) > 20_000:
        size = 257
    return [data[start : start + size] for start in range(0, len(data), size)]


def _flipped(random_: random.Random, data: bytes, times: int) -> bytes:
    spoiled = bytearray(data)
    for _ in range(times if spoiled else 0):
        spoiled[random_.randrange(len(spoiled))] ^= 1 << random_.randrange(8)
    return bytes(spoiled)


def _place(random_: random.Random, parts: list[bytes]) -> int:
    # After the preface and SETTINGS, mostly: before them everything ends soon.
    return random_.randrange(min(2, len(parts)) if random_.random() < 0.9 else 0, len(parts) + 1)


def _drop(random_: random.Random, parts: list[bytes]) -> None:
    if parts:
        del parts[random_.randrange(len(parts))]


def _repeat(random_: random.Random, parts: list[bytes]) -> None:
    if parts:
        at = random_.randrange(len(parts))
        parts[at:at] = [parts[at]] * random_.choice([1, 2, 50])


def _swap(random_: random.Random, parts: list[bytes]) -> None:
    if parts:
        i, j = random_.randrange(len(parts)), random_.randrange(len(parts))
        parts[i], parts[j] = parts[j], parts[i]


def _garble_a_frame(random_: random.Random, parts: list[bytes]) -> None:
    """Spoil one field of a frame's header, or its body behind a header that stays true."""
    at = random_.randrange(len(parts)) if parts else 0
    if not parts or len(parts[at]) < HEADER_BYTES or parts[at].startswith(PREFACE):
        return
    frame = parts[at]
    length, kind, flags, stream_id = frames.unpack_header(frame, 0)
    body = frame[HEADER_BYTES:]
    match random_.randrange(6):
        case 0:
            length = min(random_.choice(_EDGES), 2**24 - 1)
        case 1:
            kind = random_.choice([*Kind, 99])
        case 2:
            flags ^= 1 << random_.randrange(8)
        case 3:
            stream_id = random_.choice([0, 1, 2, 3, stream_id + 2, 2**31 - 1])
        case 4:
            body = _flipped(random_, body, random_.choice([1, 3, 20]))
        case _:
            body = body[: random_.randrange(len(body) + 1)]
            length = len(body)
    parts[at] = frames.header(length, Kind.DATA, flags, stream_id)[:3] + bytes([kind, flags])
    parts[at] += (stream_id & 0xFFFF_FFFF).to_bytes(4, "big") + body


def _garble_a_message(random_: random.Random, parts: list[bytes]) -> None:
    """Spoil the protobuf of a gRPC message, its frame and length prefix staying true."""
    data = [i for i, part in enumerate(parts) if len(part) > 14 and part[3] == Kind.DATA]
    if not data:
        return
    at = random_.choice(data)
    _, _, flags, stream_id = frames.unpack_header(parts[at], 0)
    payload = parts[at][HEADER_BYTES + 5 :]
    if random_.random() < 0.5:
        payload = _flipped(random_, payload, random_.choice([1, 2, 8]))
        payload = payload[: random_.choice([len(payload), random_.randrange(len(payload) + 1)])]
    else:
        payload = _odd_call(random_, payload)
    parts[at] = _data(stream_id, payload, flags)


def _odd_call(random_: random.Random, payload: bytes) -> bytes:
    try:
        frame = pb.ClientFrame.FromString(payload)
    except Exception:  # noqa: BLE001  whatever protobuf says of bytes that were spoiled before
        return payload
    if frame.WhichOneof("frame") != "call":
        return payload
    names = [field.name for field in pb.ExpertCall.DESCRIPTOR.fields]
    for name in random_.sample(names, random_.choice([1, 1, 2])):
        value = getattr(frame.call, name)
        try:
            if isinstance(value, bytes):
                setattr(frame.call, name, _resized(random_, value))
            else:
                setattr(frame.call, name, random_.choice(_EDGES))
        except (ValueError, TypeError, AttributeError):
            continue  # out of the field's own range
    return frame.SerializeToString()


def _resized(random_: random.Random, value: bytes) -> bytes:
    options = [b"", value[:-1], value + b"\0", value * 3, bytes(len(value)), b"\xff" * len(value)]
    return random_.choice(options)


def _data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frames.pack(
        Kind.DATA, flags, stream_id, b"\0" + len(payload).to_bytes(4, "big") + payload
    )


def _stream(random_: random.Random) -> int:
    return random_.choice([0, 1, 1, 1, 3, 5, 7, 9, 11, 2, 101, 2**31 - 1])


def _insert(random_: random.Random, parts: list[bytes]) -> None:
    at = _place(random_, parts)
    parts[at:at] = [random_.choice(_FRAMES)(random_)]


def _new_stream(random_: random.Random) -> bytes:
    headers = [
        (":method", random_.choice(["POST", "POST", "POST", "GET"])),
        (":path", random_.choice(_METHODS)),
        ("content-type", random_.choice(["application/grpc", "application/grpc+proto", "text"])),
    ]
    block = hpack.Encoder().encode(headers)
    flags = random_.choice([frames.END_HEADERS, frames.END_HEADERS | frames.END_STREAM, 0])
    stream_id = random_.choice([13, 15, 101, 1001, 2, 0])
    opening = frames.pack(Kind.HEADERS, flags, stream_id, block)
    if random_.random() < 0.5:
        return opening
    return opening + _data(stream_id, random_.randbytes(random_.choice([0, 3, 40])))


def _header_bomb(random_: random.Random) -> bytes:
    entry = hpack.Encoder().encode([("bomb", "x" * random_.choice([100, 3000]))], huffman=False)
    block = entry + b"\xbe" * random_.choice([1, 10, 1000, 12_000])
    return frames.pack(Kind.HEADERS, frames.END_HEADERS, random_.choice([13, 1]), block[:16_000])


def _continuations(random_: random.Random) -> bytes:
    stream_id, times = random_.choice([13, 15]), random_.choice([1, 15, 16, 17, 100])
    opening = frames.pack(Kind.HEADERS, 0, stream_id, b"\x83")
    more = frames.pack(Kind.CONTINUATION, 0, stream_id, bytes(random_.choice([0, 1, 2000])))
    return opening + more * times + frames.pack(Kind.CONTINUATION, frames.END_HEADERS, stream_id)


def _flood(random_: random.Random) -> bytes:
    stream_id = random_.choice([0, 1])
    one = random_.choice(
        [
            frames.pack(Kind.PING, 0, 0, bytes(8)),
            frames.pack(Kind.SETTINGS, 0, 0),
            frames.pack(Kind.DATA, 0, 1),
            frames.window_update(stream_id, 1),
            frames.pack(Kind.PRIORITY, 0, 1, bytes(5)),
            frames.pack(Kind.RST_STREAM, 0, 1, bytes(4)),
            _data(1, b""),
        ]
    )
    return one * random_.choice([10, 500, 2500])


def _settings(random_: random.Random) -> bytes:
    pairs = [
        random_.choice([*range(8), 99]).to_bytes(2, "big")
        + random_.choice(_EDGES).to_bytes(4, "big")
        for _ in range(random_.choice([1, 2, 64, 65]))
    ]
    return frames.pack(Kind.SETTINGS, random_.choice([0, 0, 1]), 0, b"".join(pairs))


def _padded(random_: random.Random) -> bytes:
    body = bytes([random_.choice([0, 1, 4, 200, 255])]) + random_.randbytes(random_.choice([0, 9]))
    kind = random_.choice([Kind.DATA, Kind.HEADERS])
    return frames.pack(kind, frames.PADDED | random_.choice([0, 4, 0x24]), _stream(random_), body)


def _any(random_: random.Random) -> bytes:
    body = random_.randbytes(random_.choice([0, 1, 4, 5, 8, 40]))
    return frames.pack(random_.choice(list(Kind)), random_.randrange(256), _stream(random_), body)


_CHANGES: list[Callable[[random.Random, list[bytes]], None]] = [
    _drop, _repeat, _swap, _garble_a_frame, _garble_a_frame, _garble_a_message, _garble_a_message,
    _insert, _insert, _insert,
]  # fmt: skip
_FRAMES: list[Callable[[random.Random], bytes]] = [
    _new_stream, _new_stream, _header_bomb, _continuations, _flood, _settings, _padded, _any,
    lambda random_: frames.window_update(
        random_.choice([0, 1, 3]), random_.choice([0, 1, 65_536, 2**31 - 1])
    ),
    lambda random_: frames.pack(Kind.RST_STREAM, 0, _stream(random_), random_.randbytes(4)),
    lambda random_: frames.pack(Kind.GOAWAY, 0, 0, random_.randbytes(random_.choice([0, 8, 900]))),
    lambda random_: frames.pack(
        Kind.DATA, 0, 1, b"\0" + random_.choice(_EDGES).to_bytes(4, "big") + b"few"
    ),
    lambda random_: frames.pack(Kind.DATA, 0, 1, b"\1\0\0\0\1x"),
    lambda random_: frames.pack(Kind.PUSH_PROMISE, 4, 1, bytes(4)),
    lambda random_: random_.randbytes(random_.choice([1, 9, 30])),
]  # fmt: skip
