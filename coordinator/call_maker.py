"""Expert calls made of a layer's rows: their lane, size and work."""

from collections.abc import Callable

from coordinator import call_split
from coordinator.call_split import Part
from coordinator.calls_in_flight import Asked, OutgoingCall
from coordinator.dispatch_events import Lane, NewCall
from coordinator.expert_dispatch import BULK_ROWS_PER_CALL
from coordinator.route import Route
from shoal import limits, ops, wire
from shoal.artifact import Artifact
from shoal.ops.fanout import RowWires
from shoal.quant import Scheme
from shoal.router import RoutingPlan
from shoal.rows import Rows
from shoal.transport import Wire

# What a call's work is reckoned with. Only the ratio matters: a node's own speed is learned.
MEMORY_BYTES_PER_US = 10_000
WIRE_BYTES_PER_US = 100
MANY_EXPERTS = 128  # a call of more pairs than that repeats experts


class CallMaker:
    """Makes the calls of one model.

    Args:
        call_timeout_s: how long a node may work on one.
        replies: the form that nodes send sums in.
        next_call_id: returns an id that no other call has.

    max_row_bytes: of a call of a single row, at most.
    """

    def __init__(
        self,
        artifact: Artifact,
        call_timeout_s: float,
        replies: Wire,
        next_call_id: Callable[[], int],
    ) -> None:
        self.layers = tuple(
            i for i, layer in enumerate(artifact.spec.layers) if layer.router is not None
        )
        self._deadline_ms = max(1, int(call_timeout_s * 1000))
        self._replies = replies
        self._next_call_id = next_call_id
        self._grids = {layer: artifact.grid(layer) for layer in self.layers}
        self._expert_us = {layer: _expert_us(artifact, layer) for layer in self.layers}
        self._max_rows = max_rows_per_call(artifact)
        room = limits.INTERACTIVE_MESSAGE_BYTES - wire.ENVELOPE_BYTES
        dim = artifact.spec.model_dim
        self._interactive_reply_rows = room // wire.reply_row_bytes(dim)
        most = limits.MAX_EXPERTS_PER_TOKEN
        self.max_row_bytes = wire.ENVELOPE_BYTES + wire.request_row_bytes(dim, Scheme.F32, most)

    @property
    def sends_rows_interactively(self) -> bool:
        """Whether every call of a single row travels on the interactive lane, and so its reply."""
        fits = self.max_row_bytes <= limits.INTERACTIVE_MESSAGE_BYTES
        return fits and self._interactive_reply_rows > 0

    def asked(self, layer: int, rows: Rows) -> Asked:
        """Return what all calls for these rows of a layer have in common."""
        return Asked(layer, rows, self._grids[layer], self._deadline_ms, self._replies)

    def experts(self, layer: int, route: Route) -> ops.WiredExperts:
        """Return a layer's experts as a native run asks nodes for them."""
        return ops.WiredExperts(layer, route.owners(layer), self._grids[layer])

    def run_of(
        self, wires: RowWires, first_id: int, num_ids: int, patience_s: float, max_seconds: float
    ) -> ops.WiredRun:
        """Return how a native run asks nodes: see WiredRun."""
        replies, deadline_ms = self._replies, self._deadline_ms
        form, is_bf16 = wire.reply_format(replies), replies is Wire.BF16
        return ops.WiredRun(
            wires, first_id, num_ids, deadline_ms, form, is_bf16, patience_s, max_seconds
        )

    def calls(self, asked: Asked, part: Part, route: Route) -> list[OutgoingCall]:
        """Return the calls of one slot's part, none too large."""
        pieces = call_split.by_size(part, self._max_rows)
        return [self._call(asked, piece, route, self._next_call_id()) for piece in pieces]

    def calls_of_row(
        self, asked: Asked, plan: RoutingPlan, route: Route, first_id: int
    ) -> list[OutgoingCall]:
        """Return the calls of a single row that nodes have all the experts of.

        Their ids count from `first_id`; the order is that of `call_split.split_row`.
        """
        parts = call_split.by_owner(plan, route.owners(asked.layer))
        return [self._call(asked, part, route, first_id + i) for i, part in enumerate(parts)]

    def row_call(
        self, asked: Asked, candidates: tuple[int, ...], num_pairs: int, call_id: int
    ) -> NewCall:
        """Return a call of a single row as the dispatch core sees it."""
        num_bytes = wire.call_bytes(1, num_pairs, asked.rows)
        work = self.work(asked.layer, num_pairs, num_bytes)
        return NewCall(call_id, candidates, Lane.INTERACTIVE, num_bytes, work)

    def work(self, layer: int, num_pairs: int, num_bytes: int) -> float:
        """Return about how long a call takes a node, see NewCall."""
        # Each expert is read once, whatever its rows; the wire carries them there and back.
        num_experts = min(num_pairs, MANY_EXPERTS)
        compute_us = (num_experts + 0.1 * num_pairs) * self._expert_us[layer]
        return compute_us + num_bytes / WIRE_BYTES_PER_US

    def _call(self, asked: Asked, part: Part, route: Route, call_id: int) -> OutgoingCall:
        num_rows, num_pairs = part.num_rows, part.experts.size
        num_bytes = wire.call_bytes(num_rows, num_pairs, asked.rows)
        is_small = (
            num_rows <= self._interactive_reply_rows
            and num_bytes <= limits.INTERACTIVE_MESSAGE_BYTES
        )
        lane = Lane.INTERACTIVE if is_small else Lane.BULK
        candidates = route.candidates[part.slot]
        assert candidates is not None, "a call of a slot that is local"
        work = self.work(asked.layer, num_pairs, num_bytes)
        shard = route.shards[part.slot]
        return OutgoingCall(call_id, candidates, lane, num_bytes, work, asked, part, shard)


def max_rows_per_call(artifact: Artifact) -> int:
    """Return the most rows that a call has."""
    return min(wire.max_rows_per_call(artifact.spec.model_dim), BULK_ROWS_PER_CALL)


def _expert_us(artifact: Artifact, layer: int) -> float:
    entry = artifact.manifest.expert_layer(layer)
    assert entry is not None, f"layer {layer} has no experts"
    return entry.expert_bytes / MEMORY_BYTES_PER_US
