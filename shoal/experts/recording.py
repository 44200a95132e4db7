"""Recording: which experts a node's calls used, as a heat map and as a routing trace (core).

Every call is counted. For the trace, calls of one stream are put together to passes: a pass visits
the recorded layers in order, the rows of a layer in one call or several. What does not fit (calls
of two requests in turns on one stream, a layer that was split unevenly) is left out and counted.

    on_call(layer 0) -> ... on_call(last layer) -> pass complete -> segment of its stream

A trace says where each row went, all of it: a node that owns only some experts of a layer does not
see that, and records heat alone. Memory is bounded: the oldest segments go.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shoal.experts.call import ExpertCall
from shoal.experts.heat import HeatMap
from shoal.experts.routing_trace import RoutingTrace, TraceSegment
from shoal.limits import MAX_RECORDED_BYTES

SEGMENT_ROWS = 8192  # of one segment: a stream that lives for days still loses only its oldest
U16 = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is recorded: experts per layer, and the experts a row visits in each of them.

    top_k: None: this node sees only a part of each row; there is no trace.
    """

    identity: str
    num_experts: Mapping[int, int]
    top_k: int | None


@dataclass(slots=True)
class _Pass:
    position: int = -1  # in the recorded layers
    layers: list[list[U16]] = field(default_factory=list)  # [layers seen][pieces][rows, top_k]


@dataclass(slots=True)
class _Segment:
    name: str
    parts: list[U16] = field(default_factory=list)  # each [rows, layers, top_k]
    num_rows: int = 0


class Recorder:
    """Counts and keeps. Used by one thread."""

    def __init__(
        self,
        geometry: Geometry,
        before: HeatMap | None = None,
        max_bytes: int = MAX_RECORDED_BYTES,
    ) -> None:
        """Begin with the counts of `before` (of the same model)."""
        self.geometry = geometry
        self._layers = sorted(geometry.num_experts)
        self._position = {layer: at for at, layer in enumerate(self._layers)}
        self._counts = {
            layer: np.zeros(number, np.int64) for layer, number in geometry.num_experts.items()
        }
        self.num_rows = 0
        if before is not None:
            assert before.identity == geometry.identity, "heat of another model"
            self.num_rows = before.num_rows
            for layer, counts in before.counts.items():
                if layer in self._counts and counts.size == self._counts[layer].size:
                    self._counts[layer] += counts
        self._max_rows = max_bytes // (2 * len(self._layers) * (geometry.top_k or 1))
        self._passes: dict[int, _Pass] = {}
        self._open: dict[int, _Segment] = {}
        self._closed: deque[_Segment] = deque()
        self._kept_rows = 0
        self._num_segments = 0
        self.num_dropped = 0  # rows of passes that did not fit together
        self.num_calls = 0

    def on_call(self, stream_id: int, call: ExpertCall) -> None:
        """Learn of a checked call. Layers that are not recorded are left out."""
        counts = self._counts.get(call.layer)
        if counts is None:
            return
        self.num_calls += 1
        num_rows = call.row_offsets.size - 1
        self.num_rows += num_rows
        if num_rows == 1:  # experts of a row are distinct
            counts[call.experts] += 1
        else:
            counts += np.bincount(call.experts, minlength=counts.size)
        if self.geometry.top_k is not None:
            self._trace(stream_id, call, num_rows, self.geometry.top_k)

    def on_stream_end(self, stream_id: int) -> None:
        """Learn that a stream is over."""
        self._drop(stream_id)
        segment = self._open.pop(stream_id, None)
        if segment is not None and segment.num_rows:
            self._closed.append(segment)

    def heat(self) -> HeatMap:
        """Return the counts so far; the caller's own."""
        counts = {layer: counts.copy() for layer, counts in self._counts.items()}
        return HeatMap(self.geometry.identity, self.num_rows, counts)

    def trace(self) -> RoutingTrace | None:
        """Return the passes that are complete; None: this node records none, or saw none yet."""
        segments = [s for s in (*self._closed, *self._open.values()) if s.num_rows]
        top_k = self.geometry.top_k
        if top_k is None or not segments:
            return None
        return RoutingTrace(
            identity=self.geometry.identity,
            num_experts=max(self.geometry.num_experts.values()),
            top_k=top_k,
            moe_layers=tuple(self._layers),
            segments=tuple(TraceSegment(s.name, "node", np.concatenate(s.parts)) for s in segments),
        )

    def check_integrity(self) -> None:
        """Assert what holds between calls."""
        kept = [*self._closed, *self._open.values()]
        assert self._kept_rows == sum(segment.num_rows for segment in kept)
        assert self._kept_rows <= self._max_rows
        assert all(pending.position < len(self._layers) for pending in self._passes.values())

    def _trace(self, stream_id: int, call: ExpertCall, num_rows: int, top_k: int) -> None:
        pending = self._passes.setdefault(stream_id, _Pass())
        position = self._position[call.layer]
        is_next = position in (pending.position, pending.position + 1)
        if position == 0 and not is_next:  # the pass in hand was given up
            self._drop(stream_id)
            pending = self._passes[stream_id] = _Pass()
        elif not is_next or call.experts.size != num_rows * top_k:
            self._drop(stream_id)
            return
        if position != pending.position:
            pending.layers.append([])
            pending.position = position
        rows = call.experts.reshape(num_rows, top_k).astype(np.uint16)
        pending.layers[-1].append(np.sort(rows, axis=1))
        if position == len(self._layers) - 1:
            self._complete(stream_id, pending)

    def _complete(self, stream_id: int, pending: _Pass) -> None:
        # Keep the pass if its last layer has come whole; its other layers then had their chance.
        if _num_rows(pending.layers[-1]) < _num_rows(pending.layers[0]):
            return
        if len({_num_rows(pieces) for pieces in pending.layers}) != 1:
            self._drop(stream_id)
            return
        del self._passes[stream_id]
        self._keep(stream_id, np.stack([np.concatenate(p) for p in pending.layers], axis=1))

    def _drop(self, stream_id: int) -> None:
        pending = self._passes.pop(stream_id, None)
        if pending is not None and pending.layers:
            self.num_dropped += _num_rows(pending.layers[0])

    def _keep(self, stream_id: int, rows: U16) -> None:
        segment = self._open.get(stream_id)
        if segment is None or segment.num_rows + rows.shape[0] > SEGMENT_ROWS:
            if segment is not None and segment.num_rows:
                self._closed.append(segment)
            self._num_segments += 1
            segment = self._open[stream_id] = _Segment(f"{self._num_segments}-{stream_id}")
        segment.parts.append(rows)
        segment.num_rows += rows.shape[0]
        self._kept_rows += rows.shape[0]
        while self._kept_rows > self._max_rows:
            oldest = self._closed.popleft() if self._closed else self._open.pop(min(self._open))
            self._kept_rows -= oldest.num_rows


def _num_rows(pieces: Sequence[U16]) -> int:
    return sum(piece.shape[0] for piece in pieces)


def geometry_of(
    identity: str,
    num_experts: Mapping[int, int],
    top_k: int | None,
    owned: Mapping[int, Sequence[int]],
) -> Geometry:
    """Return what a node with those experts records.

    Args:
        num_experts: of each layer with experts. top_k: experts a row visits; None: it depends on
            the layer. owned: layer -> experts of this node.
    """
    is_whole = all(len(owned[layer]) == num_experts[layer] for layer in owned)
    kept = {layer: num_experts[layer] for layer in owned}
    return Geometry(identity, kept, top_k if is_whole else None)
