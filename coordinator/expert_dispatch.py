"""Where a layer's rows meet their experts: in this process, on nodes, or both.

The forward pass hands over a layer's rows and plan with `start`, does its own share (a shared
expert, a dense branch), then `wait`s for the sums. Sums are integers: whoever computed which part,
and in whatever order the parts came, the bits are the same.
"""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator import call_split
from coordinator.call_split import Part
from coordinator.calls_in_flight import Fanout, OutgoingCall
from coordinator.dispatch import Lane
from coordinator.dispatch_stats import DispatchStats
from coordinator.fast_client import FastClient
from coordinator.handshake import Expected, NodeFacts, check_node
from coordinator.node_client import ExpertClient, NodeClient
from coordinator.node_link import Greeting
from coordinator.placement import Placement
from shoal import __version__, errors, limits, numerics, shard_map, wire
from shoal.allocator import keep_freed_memory
from shoal.artifact import Artifact
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.experts.local import LocalExperts
from shoal.experts.options import Mode
from shoal.experts.ownership import Ownership
from shoal.experts.store import StoreOptions, WarmUpProgress
from shoal.router import RoutingPlan
from shoal.rows import Rows
from shoal.shard_map import EndpointKind
from shoal.transport import Transport

READY_TIMEOUT_S = 600.0  # warm-up: 500 GB at 1 GB/s

# Rows of one message on the bulk connection. A chunk of 512 makes two: the first one's reply
# travels while the node computes the second. Measured on 64 experts of Qwen3-30B-A3B's size, 4 a
# row: 256 rows at a time cost what 512 do, 128 cost 12 % more, 64 45 % (each expert's weights are
# read again for each message).
BULK_ROWS_PER_CALL = 256


class PendingSums(Protocol):
    """Sums on their way. `wait` is called once, on the thread that called `start`."""

    def wait(self) -> NDArray[np.int64]:
        """Return [T, D] int64: per row the sum over its experts of rne(weight * y * 2^grid).

        Raises:
            NodeError: a node is gone, hung or refused. NumericError: naming the rows at fault.
            ArtifactError: an expert of this process cannot be read.
        """
        ...


class ExpertDispatch(Protocol):
    """Sends rows to their experts."""

    @property
    def stats(self) -> DispatchStats: ...
    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums: ...
    def close(self) -> None:
        """Let go of connections and experts. Nothing may be pending."""
        ...


class LocalDispatch:
    """All experts in this process, without a network."""

    def __init__(self, executor: ExpertExecutor) -> None:
        self._executor = executor
        self.stats = DispatchStats()

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        return _LocalSums(self._executor, call_of_plan(layer, rows, plan), self.stats)

    def close(self) -> None:
        self._executor.close()


class _LocalSums:
    def __init__(self, executor: ExpertExecutor, call: ExpertCall, stats: DispatchStats) -> None:
        self._executor, self._call, self._stats = executor, call, stats

    def wait(self) -> NDArray[np.int64]:
        started_s = time.perf_counter()
        sums = self._executor.compute(self._call)
        elapsed_s = time.perf_counter() - started_s
        self._stats.record(elapsed_s, elapsed_s, 0, 0)
        return sums


def call_of_plan(layer: int, rows: Rows, plan: RoutingPlan) -> ExpertCall:
    """Return the call of a layer whose rows all go to one owner."""
    num_rows, per_row = plan.experts.shape
    return ExpertCall(
        layer,
        rows,
        np.arange(0, num_rows * per_row + 1, per_row, dtype=np.int32),
        plan.experts.reshape(-1),
        plan.weights.reshape(-1),
    )


def read_shard_map(argument: str) -> shard_map.ShardMap:
    """Return the map of a `--moe-shards` argument: the map itself, or @FILE.toml.

    Raises ShardMapError: wrong, or the file cannot be read.
    """
    if not argument.startswith("@"):
        return shard_map.parse(argument)
    path = Path(argument[1:])
    try:
        return shard_map.parse_toml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise errors.ShardMapError(
            f"--moe-shards {argument}: cannot read the file: {error}"
        ) from error


def open_remote_dispatch(
    artifact: Artifact,
    moe_shards: str,
    call_timeout_s: float = 10.0,
    *,
    transport: Transport = Transport.AUTO,
    store: StoreOptions | None = None,
    prefetch: Mode = Mode.AUTO,
    ready_timeout_s: float = READY_TIMEOUT_S,
    notify: Callable[[str], None] = lambda _: None,
    report_load: Callable[[WarmUpProgress], None] = lambda _: None,
) -> "RemoteDispatch":
    """Connect to every node of a map, and read the experts that it keeps `local`.

    Args:
        moe_shards: the map, or @FILE.toml.
        store, prefetch: of the `local` experts.
        notify: told in a sentence what is waited for.
        report_load: told how far the reading of `local` experts is.

    Raises:
        ShardMapError: the map is wrong for this model.
        NodeError: a node is down, hangs, or is not what the map and the model need.
        ArtifactError: a `local` expert cannot be read.
    """
    keep_freed_memory()
    placement = Placement(read_shard_map(moe_shards), artifact.spec)
    kinds = [endpoint.kind for endpoint in placement.endpoints]
    nodes = [i for i, kind in enumerate(kinds) if kind is not EndpointKind.LOCAL]
    expected = Expected(artifact.identity, artifact.name, numerics.NUMERICS, __version__)
    greeting = Greeting(artifact.identity, numerics.NUMERICS, secrets.token_bytes(16))

    def check(node: int, facts: NodeFacts) -> None:
        endpoint = nodes[node]
        missing = placement.missing(endpoint, facts.owned)
        check_node(str(placement.endpoints[endpoint]), facts, expected, missing)

    local = None
    if EndpointKind.LOCAL in kinds:
        owned = _local_experts(artifact, placement, kinds.index(EndpointKind.LOCAL))
        local = LocalExperts(artifact, owned, store, prefetch)
    elif store not in (None, StoreOptions()):
        raise errors.UsageError(
            "--cache, --data-dir, --verify and --io are of experts in this process, and "
            "--moe-shards names none as `local`: give them to `shoal node`"
        )
    make_client = FastClient if transport.is_fast else NodeClient
    client: ExpertClient = make_client(
        [placement.endpoints[i] for i in nodes], greeting, call_timeout_s, notify
    )
    try:
        facts = client.connect(check, ready_timeout_s)
        if local is not None:
            local.warm_up(report_load)  # after the nodes: a wrong one is told at once
    except BaseException:
        client.close()
        if local is not None:
            local.close()
        raise
    max_rows = min([fact.max_rows_per_call for fact in facts], default=limits.MAX_ROWS_PER_CALL)
    executor = None if local is None else local.executor
    return RemoteDispatch(artifact, placement, client, executor, call_timeout_s, max_rows)


def _local_experts(artifact: Artifact, placement: Placement, local: int) -> Ownership:
    assigned = placement.assigned(local)
    wanted = {layer: np.flatnonzero(row).tolist() for layer, row in enumerate(assigned)}
    held = artifact.owned_experts
    for layer, experts in wanted.items():
        if lacking := sorted(set(experts) - set(held.get(layer, ()))):
            missing = shard_map.show_spans(shard_map.spans_of(np.array(lacking)))
            raise errors.ShardMapError(
                f"--moe-shards: {artifact.path} is a slice without experts {missing} of layer "
                f"{layer}, which the map computes `local`: name a node that has them"
            )
    return Ownership(wanted)


class RemoteDispatch:
    """Experts on nodes, and perhaps some in this process (`local`). Use `open_remote_dispatch`.

    The calling thread splits and encodes, then computes the local part while the nodes compute
    theirs, then adds up.
    """

    def __init__(
        self,
        artifact: Artifact,
        placement: Placement,
        client: ExpertClient,
        executor: ExpertExecutor | None,
        call_timeout_s: float,
        max_rows: int,
    ) -> None:
        self.stats = DispatchStats()
        self._placement = placement
        self._client = client
        self._executor = executor
        self._deadline_ms = max(1, int(call_timeout_s * 1000))
        self._names = [str(e) for e in placement.endpoints if e.kind is not EndpointKind.LOCAL]
        self._node_of_endpoint = [
            None if e.kind is EndpointKind.LOCAL else self._names.index(str(e))
            for e in placement.endpoints
        ]
        layers = [i for i, layer in enumerate(artifact.spec.layers) if layer.router is not None]
        self._grids = {layer: artifact.grid(layer) for layer in layers}
        dim = artifact.spec.model_dim
        self._max_rows = min(max_rows, wire.max_rows_per_call(dim), BULK_ROWS_PER_CALL)
        room = limits.INTERACTIVE_MESSAGE_BYTES - wire.ENVELOPE_BYTES
        self._interactive_reply_rows = room // wire.reply_row_bytes(dim)

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        """Send the rows to the nodes that own their experts; see PendingSums for what may fail."""
        started_s = time.perf_counter()
        calls: list[OutgoingCall] = []
        local: Part | None = None
        for part in call_split.by_owner(plan, self._placement.owners(layer)):
            node = self._node_of_endpoint[part.endpoint]
            if node is None:
                local = part
            else:
                pieces = call_split.by_size(part, self._max_rows)
                calls += [self._encode(layer, rows, piece, node) for piece in pieces]
        fanout = self._client.submit(calls) if calls else None
        return _RemoteSums(self, layer, rows, local, fanout, started_s)

    def close(self) -> None:
        self._client.close()
        if self._executor is not None:
            self._executor.close()

    def _encode(self, layer: int, rows: Rows, part: Part, node: int) -> OutgoingCall:
        call_id = self._client.next_call_id()
        call = _call_of_part(layer, rows, part)
        frame = wire.encode_call(call_id, self._deadline_ms, call).SerializeToString()
        is_small = (
            part.num_rows <= self._interactive_reply_rows
            and len(frame) <= limits.INTERACTIVE_MESSAGE_BYTES
        )
        return OutgoingCall(
            call_id, node, Lane.INTERACTIVE if is_small else Lane.BULK, frame, part.rows
        )

    def compute_local(self, layer: int, rows: Rows, part: Part) -> NDArray[np.int64]:
        """Return [T, D]: the part's sums at its rows, zeros elsewhere."""
        assert self._executor is not None
        try:
            sums = self._executor.compute(_call_of_part(layer, rows, part))
        except errors.NumericError as error:
            at_fault = tuple(int(part.rows[row]) for row in error.rows)
            raise errors.NumericError(str(error), at_fault) from error
        if part.num_rows == rows.num_rows:
            return sums
        spread = np.zeros((rows.num_rows, rows.dim), np.int64)
        spread[part.rows] = sums
        return spread

    def add_replies(self, layer: int, fanout: Fanout, into: NDArray[np.int64]) -> None:
        """Wait for a fan-out and add what it brings. Raises what PendingSums.wait does."""
        self._client.wait(fanout)
        for call in fanout.calls:
            try:
                wire.add_reply(fanout.replies[call.call_id], call.rows, self._grids[layer], into)
            except errors.MalformedMessage as error:
                raise errors.MalformedMessage(f"node {self._names[call.node]}: {error}") from error

    def abandon(self, fanout: Fanout) -> None:
        self._client.abandon(fanout)


class _RemoteSums:
    def __init__(
        self,
        dispatch: RemoteDispatch,
        layer: int,
        rows: Rows,
        local: Part | None,
        fanout: Fanout | None,
        started_s: float,
    ) -> None:
        self._dispatch, self._layer, self._rows = dispatch, layer, rows
        self._local, self._fanout, self._started_s = local, fanout, started_s

    def wait(self) -> NDArray[np.int64]:
        dispatch, fanout = self._dispatch, self._fanout
        compute_s = 0.0
        try:
            if self._local is None:
                sums = np.zeros((self._rows.num_rows, self._rows.dim), np.int64)
            else:
                began_s = time.perf_counter()
                sums = dispatch.compute_local(self._layer, self._rows, self._local)
                compute_s = time.perf_counter() - began_s
            if fanout is not None:
                dispatch.add_replies(self._layer, fanout, sums)
        except BaseException:
            if fanout is not None:
                dispatch.abandon(fanout)
            raise
        bytes_up = bytes_down = 0
        if fanout is not None:
            bytes_up = sum(len(call.frame) for call in fanout.calls)
            bytes_down = fanout.bytes_down
            compute_s = max(compute_s, _slowest_node_s(fanout))
        elapsed_s = time.perf_counter() - self._started_s
        dispatch.stats.record(elapsed_s, compute_s, bytes_up, bytes_down)
        return sums


def _slowest_node_s(fanout: Fanout) -> float:
    # A node computes one call at a time: what it spent on this fan-out is the sum of its calls.
    micros: dict[int, int] = {}
    for call in fanout.calls:
        reply = fanout.replies[call.call_id]
        micros[call.node] = micros.get(call.node, 0) + reply.compute_us
    return max(micros.values()) / 1e6


def _call_of_part(layer: int, rows: Rows, part: Part) -> ExpertCall:
    own = rows if part.num_rows == rows.num_rows else rows.take(part.rows.astype(np.intp))
    return ExpertCall(layer, own, part.row_offsets, part.experts, part.weights)
