"""Recorded routing: which experts each token of a text went to, as bytes (core).

    8 bytes   magic "SHOALRT" and the format's version, 1
    4 bytes   n, little-endian unsigned: bytes of the header text
    n bytes   JSON object: identity, num_experts, top_k, moe_layers, segments
    the rest  per segment, in the header's order: uint16 little-endian experts
              [tokens, len(moe_layers), top_k], token-major, the experts of a row ascending

docs/formats/routing-trace.md has an example. A reader needs nothing else to replay caches and
predictors: token t of a segment touches layer moe_layers[0], then moe_layers[1], and so on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.artifact.canonical import MalformedJson, parse_object
from shoal.artifact.fields import Fields
from shoal.errors import CorruptArtifact
from shoal.limits import (
    MAX_EXPERTS,
    MAX_EXPERTS_PER_TOKEN,
    MAX_LAYERS,
    MAX_TRACE_HEADER_BYTES,
)

MAGIC = b"SHOALRT\x01"
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class TraceSegment:
    """One text's routing.

    name: unique in its trace. kind: what sort of text ("fable", "recipe").
    experts: [tokens, layers, top_k] uint16, ascending and distinct along the last axis.
    """

    name: str
    kind: str
    experts: NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """The segments that one model routed.

    identity: of the artifact, hexadecimal. moe_layers: indices of the layers with a router,
    ascending: axis 1 of every segment.
    """

    identity: str
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    segments: tuple[TraceSegment, ...]

    def __post_init__(self) -> None:
        """Raises: ValueError for numbers that do not fit together."""
        _check_geometry(self.num_experts, self.top_k, self.moe_layers)
        names = [segment.name for segment in self.segments]
        if len(set(names)) != len(names):
            raise ValueError("two segments have one name")
        for segment in self.segments:
            _check_segment(segment, self.num_experts, (len(self.moe_layers), self.top_k))


def encode_trace(trace: RoutingTrace) -> bytes:
    """Return the trace as a file's bytes; the same trace gives the same bytes."""
    header = {
        "identity": trace.identity,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "moe_layers": list(trace.moe_layers),
        "segments": [
            {"name": s.name, "kind": s.kind, "tokens": s.experts.shape[0]} for s in trace.segments
        ],
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    assert len(text) <= MAX_TRACE_HEADER_BYTES, "too many segments for one trace"
    parts = [MAGIC, len(text).to_bytes(_LENGTH_BYTES, "little"), text]
    parts += [segment.experts.astype("<u2").tobytes() for segment in trace.segments]
    return b"".join(parts)


def decode_trace(data: bytes, where: str) -> RoutingTrace:
    """Read a file's bytes strictly; `where` names it in messages.

    Raises: CorruptArtifact for anything that `encode_trace` does not write.
    """
    body = len(MAGIC) + _LENGTH_BYTES
    if data[: len(MAGIC)] != MAGIC or len(data) < body:
        raise CorruptArtifact(f"{where}: not a routing trace of version {MAGIC[-1]}")
    length = int.from_bytes(data[len(MAGIC) : body], "little")
    if length > min(MAX_TRACE_HEADER_BYTES, len(data) - body):
        raise CorruptArtifact(f"{where}: truncated, or a header of {length} bytes: damaged")
    try:
        header = Fields(parse_object(data[body : body + length]), f"{where}: header")
        return _decode(header, memoryview(data)[body + length :], where)
    except MalformedJson as error:
        raise CorruptArtifact(f"{where}: header: {error}") from None
    except ValueError as error:
        raise CorruptArtifact(f"{where}: {error}") from None


def _decode(header: Fields, rest: memoryview, where: str) -> RoutingTrace:
    identity = header.hash("identity")
    num_experts = header.integer("num_experts", 1, MAX_EXPERTS)
    top_k = header.integer("top_k", 1, MAX_EXPERTS_PER_TOKEN)
    layers = [
        Fields({"layer": value}, place).integer("layer", 0, MAX_LAYERS - 1)
        for value, place in header.items("moe_layers", MAX_LAYERS)
    ]
    _check_geometry(num_experts, top_k, layers)
    segments: list[TraceSegment] = []
    for value, place in header.items("segments", MAX_TRACE_HEADER_BYTES):
        fields = Fields(value, place)
        name, kind = fields.text("name", 100), fields.text("kind", 100)
        shape = (fields.integer("tokens", 0, 2**40), len(layers), top_k)
        fields.done()
        num_bytes = 2 * shape[0] * shape[1] * shape[2]
        if num_bytes > len(rest):
            raise CorruptArtifact(f"{where}: truncated: segment {name!r} needs {num_bytes} bytes")
        experts = np.frombuffer(rest[:num_bytes], "<u2").reshape(shape)
        segments.append(TraceSegment(name, kind, experts.astype(np.uint16)))
        rest = rest[num_bytes:]
    header.done()
    if rest:
        raise CorruptArtifact(f"{where}: {len(rest)} bytes after the last segment")
    return RoutingTrace(identity, num_experts, top_k, tuple(layers), tuple(segments))


def _check_geometry(num_experts: int, top_k: int, moe_layers: Sequence[int]) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k {top_k} of {num_experts} experts")
    if not moe_layers or list(moe_layers) != sorted(set(moe_layers)):
        raise ValueError("moe_layers must be layer indices, ascending, at least one")


def _check_segment(segment: TraceSegment, num_experts: int, row: tuple[int, int]) -> None:
    experts = segment.experts
    if experts.dtype != np.uint16 or experts.ndim != 3 or experts.shape[1:] != row:
        raise ValueError(f"segment {segment.name!r}: expected uint16 [tokens, {row[0]}, {row[1]}]")
    if experts.size and int(experts.max()) >= num_experts:
        raise ValueError(f"segment {segment.name!r}: an expert beyond {num_experts - 1}")
    if not (experts[..., 1:] > experts[..., :-1]).all():
        raise ValueError(f"segment {segment.name!r}: the experts of a row must ascend")
