"""Experts on nodes, and perhaps some in this process: a map becomes connections and calls.

Apart from `expert_dispatch`, whose users without nodes need no network: gRPC, asyncio and protobuf
take 0.2 s to import.
"""

import secrets
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator import call_split
from coordinator.call_maker import CallMaker, max_rows_per_call
from coordinator.call_split import Part
from coordinator.calls_in_flight import Fanout, Hint, OutgoingCall
from coordinator.dispatch_stats import DispatchStats
from coordinator.expert_dispatch import SHARD_WAIT_S, PendingSums
from coordinator.fast_client import FastClient
from coordinator.handshake import Expected, NodeFacts, check_node, check_rows
from coordinator.hinted_experts import HintedExperts
from coordinator.node_client import ExpertClient, NodeClient, Patience
from coordinator.node_health import NodeHealth
from coordinator.node_keeper import Terms
from coordinator.node_link import KEEPALIVE, Greeting, Keepalive
from coordinator.placement import Placement
from coordinator.remote_sums import RemoteSums
from coordinator.route import Route
from coordinator.row_fanout import LayersEnd
from coordinator.tls import settle_transport
from shoal import __version__, errors, numerics, ops, shard_map, wire
from shoal.allocator import keep_freed_memory
from shoal.artifact import Artifact
from shoal.experts.executor import ExpertExecutor
from shoal.experts.local import LocalExperts
from shoal.experts.options import Mode
from shoal.experts.ownership import Ownership
from shoal.experts.store import StoreOptions, WarmUpProgress
from shoal.router import RoutingPlan
from shoal.rows import Rows
from shoal.shard_map import EndpointKind
from shoal.tls_files import ClientFiles
from shoal.transport import Transport, Wire

READY_TIMEOUT_S = 600.0  # warm-up: 500 GB at 1 GB/s


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
    shard_wait_s: float = SHARD_WAIT_S,
    transport: Transport = Transport.AUTO,
    tls: ClientFiles | None = None,
    replies: Wire = Wire.EXACT,
    store: StoreOptions | None = None,
    prefetch: Mode = Mode.AUTO,
    ready_timeout_s: float = READY_TIMEOUT_S,
    keepalive: Keepalive = KEEPALIVE,
    notify: Callable[[str], None] = lambda _: None,
    report_load: Callable[[WarmUpProgress], None] = lambda _: None,
) -> "RemoteDispatch":
    """Connect to the nodes of a map, and read the experts that it keeps `local`.

    A node that is down is no error while every range has another one: it is told, and met later.

    Args:
        moe_shards: the map, or @FILE.toml.
        shard_wait_s: how long a call waits for a node when its range has none.
        tls: what `grpcs://` nodes are met with: by grpcio, which is told.
        replies: the form that nodes send sums in; another than EXACT is told, as it is not.
        store, prefetch: of the `local` experts.
        keepalive: when a node that nobody calls is asked for a sign of life, and given up.
        notify: told in a sentence what is waited for, lost and back. From any thread.
        report_load: told how far the reading of `local` experts is.

    Raises:
        UsageError: the map names no node, or nothing `local`, and what was asked for needs one.
        ShardMapError: the map is wrong for this model.
        NodeError: a range whose nodes are down, hang, or are not what the map and the model need.
        ArtifactError: a `local` expert cannot be read.
    """
    keep_freed_memory()
    placement = Placement(read_shard_map(moe_shards), artifact.spec)
    greeting = Greeting(artifact.identity, numerics.NUMERICS, secrets.token_bytes(16))
    kinds = [endpoint.kind for endpoint in placement.endpoints]
    trust = settle_transport(transport, tls or ClientFiles(), kinds, notify)
    local = None
    if EndpointKind.LOCAL in kinds:
        owned = _local_experts(artifact, placement, kinds.index(EndpointKind.LOCAL))
        local = LocalExperts(artifact, owned, store, prefetch)
        if local.how_read:
            notify(local.how_read)
    elif store not in (None, StoreOptions()):
        raise errors.UsageError(
            "--cache, --data-dir, --verify and --io are of experts in this process, and "
            "--moe-shards names none as `local`: give them to `shoal node`"
        )
    if replies is not Wire.EXACT:
        if set(kinds) == {EndpointKind.LOCAL}:
            raise errors.UsageError(f"--wire {replies}: --moe-shards names no node")
        notify(
            f"--wire {replies} is NOT exact: nodes round their sums, so the text may differ from "
            "that of --wire exact, and from that of another shard map"
        )
    patience = Patience(call_timeout_s, shard_wait_s, keepalive)
    client: ExpertClient
    if transport.is_fast and trust is None:
        client = FastClient(greeting, patience, notify)
    else:
        client = NodeClient(greeting, patience, notify, trust)
    try:
        route = meet_nodes(artifact, placement, client, ready_timeout_s)
        if local is not None:
            local.warm_up(report_load)  # after the nodes: a wrong one is told at once
    except BaseException:
        client.close()
        if local is not None:
            local.close()
        raise
    executor = None if local is None else local.executor
    return RemoteDispatch(artifact, moe_shards, route, client, executor, call_timeout_s, replies)


def meet_nodes(
    artifact: Artifact, placement: Placement, client: ExpertClient, ready_timeout_s: float
) -> Route:
    """Meet the nodes of a map that are not met yet. Raises NodeError: a range would have none."""
    expected = Expected(artifact.identity, artifact.name, numerics.NUMERICS, __version__)
    names = [str(endpoint) for endpoint in placement.endpoints]
    local = {i for i, e in enumerate(placement.endpoints) if e.kind is EndpointKind.LOCAL}

    def check(name: str, facts: NodeFacts) -> None:
        if name in names:  # else: it is on its way out
            check_node(name, facts, expected, placement.missing(names.index(name), facts.owned))
            check_rows(name, facts, max_rows_per_call(artifact))

    def uncovered(there: set[str]) -> str:
        return placement.uncovered(local | {i for i, name in enumerate(names) if name in there})

    remote = [i for i in range(len(names)) if i not in local]
    endpoints = [placement.endpoints[i] for i in remote]
    nodes = client.meet(endpoints, Terms(check, uncovered, ready_timeout_s))
    node_of = dict(zip(remote, nodes, strict=True))
    candidates = [
        None if slot[0] in local else tuple(node_of[endpoint] for endpoint in slot)
        for slot in placement.slots
    ]
    shards = [placement.range_of(slot) for slot in range(len(placement.slots))]
    return Route(placement, tuple(candidates), tuple(shards), bool(local))


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
        moe_shards: str,
        route: Route,
        client: ExpertClient,
        executor: ExpertExecutor | None,
        call_timeout_s: float,
        replies: Wire = Wire.EXACT,
    ) -> None:
        self.stats = DispatchStats(replies)
        self._replies = replies
        self._hinted = HintedExperts()
        self.route = route
        self._artifact = artifact
        self._moe_shards = moe_shards
        self._client = client
        self._executor = executor
        self._maker = CallMaker(artifact, call_timeout_s, replies, client.next_call_id)

    @property
    def num_layers_on_nodes(self) -> int:
        """Number of layers that have experts on nodes: the round trips of one pass."""
        route = self.route
        owners = [set(route.placement.owners(layer).tolist()) for layer in self._maker.layers]
        return sum(any(route.candidates[slot] is not None for slot in slots) for slots in owners)

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        """Send the rows to the nodes that own their experts; see PendingSums for what may fail."""
        started_s = time.perf_counter()
        route = self.route
        asked = self._maker.asked(layer, rows)
        self._hinted.forget(layer)
        calls: list[OutgoingCall] = []
        local: Part | None = None
        for part in call_split.by_owner(plan, route.owners(layer)):
            if route.candidates[part.slot] is None:
                local = part
            else:
                calls += self._maker.calls(asked, part, route)
        remote: Fanout | None = None
        if calls:
            remote = self._client.submit(calls, np.zeros((rows.num_rows, rows.dim), np.int64))
        return RemoteSums(self, route, (layer, rows, plan), local, remote, started_s)

    def sums(self, layer: int, rows: Rows, plan: RoutingPlan) -> NDArray[np.int64]:
        """As `start` and `wait`: a single row's fan-out may run ahead of the dispatch core."""
        route = self.route
        if not route.has_local:
            ops.rest_threads()  # nodes of this machine need their cores
        if rows.num_rows == 1 and not route.has_local:
            started_s = time.perf_counter()
            try:
                asked = self._maker.asked(layer, rows)
                row = self._client.run_row(asked, plan, route, self._maker)
            except errors.NodeError:
                if self.route is route:
                    raise
                row = None  # by a map that holds no more: the layer is asked for again
            if row is not None:
                self._hinted.forget(layer)
                elapsed_s = time.perf_counter() - started_s
                self.stats.record(elapsed_s, *row.figures())
                return row.sums
        return self.start(layer, rows, plan).wait()

    def run_layers(self, first: int, run: ops.LayerRun) -> ops.RanLayers | None:
        """See AnswersAtOnce: of a single row, whose fan-outs run ahead of the dispatch core."""
        route = self.route
        if run.places.num_rows != 1 or route.has_local:
            return None
        end = self._client.run_layers(first, run, route, self._maker)
        if end is None:
            return None
        ran = end.ran
        for layer, (row, elapsed_s) in enumerate(
            zip(end.rows, ran.expert_seconds, strict=True), first
        ):
            self._hinted.forget(layer)
            self.stats.record(elapsed_s, *row.figures())
        if end.left is None:
            return ran if end.rows or ran.stopped is not None else None
        return self._finish_layer(first + len(end.rows), end, route)

    def _finish_layer(self, layer: int, end: LayersEnd, route: Route) -> ops.RanLayers:
        """Return a run with its last layer, whose fan-out did not go well, done too."""
        left, row, ran = end.left, end.row, end.ran
        assert left is not None
        if isinstance(end.error, errors.NumericError):
            return ran._replace(stopped=end.error)
        if end.error is not None and self.route is route:
            raise end.error
        self._hinted.forget(layer)
        if row is None:  # never sent, or by a map that holds no more
            try:
                sums = self.start(layer, left.rows, left.plan).wait()
            except errors.NumericError as error:
                return ran._replace(stopped=error)
        else:
            sums = row.sums
            self.stats.record(time.monotonic() - row.sent_s, *row.figures())
        grid = self._maker.experts(layer, route).grid
        experts = [*ran.experts, left.plan.experts]
        return ran._replace(sums=ops.Sums(sums, grid), experts=experts)

    def hint(self, layer: int, plan: RoutingPlan) -> None:
        """Tell nodes that read experts ahead that a pass to come will likely be routed like this.

        Each expert is told once between two calls of its layer, to the replica that a call would
        go to now. Any thread.
        """
        route, hints = self.route, list[Hint]()
        for part in call_split.by_owner(plan, route.owners(layer)):
            candidates = route.candidates[part.slot]
            if candidates is None or not any(map(self._client.wants_hints, candidates)):
                continue
            new = self._hinted.take_new(layer, part.experts.tolist())
            if new:
                frame = wire.encode_hint(layer, new).SerializeToString()
                work = self._maker.work(layer, part.experts.size, len(frame))
                hints.append(Hint(candidates, frame, work))
        if hints:
            self._client.hint(hints)

    def reload(self) -> str:
        """Read a map file again and use it from the next layer on; return what it says.

        Calls in flight end where they are. On an error the old map holds.

        Raises:
            ShardMapError: it is wrong for this model, or changes what this process computes.
            NodeError: a range would have no node.
        """
        placement = Placement(read_shard_map(self._moe_shards), self._artifact.spec)
        old = self.route
        if not np.array_equal(_local_cells(placement), _local_cells(old.placement)):
            raise errors.ShardMapError(
                f"{self._moe_shards}: what is `local` cannot change while shoal runs: restart it"
            )
        if _has_tls(placement) and not _has_tls(old.placement):
            raise errors.ShardMapError(
                f"{self._moe_shards}: grpcs:// nodes cannot join a map without any while shoal "
                "runs: another transport carries them: restart it"
            )
        route = meet_nodes(self._artifact, placement, self._client, READY_TIMEOUT_S)
        self.route = route
        self._client.retire(sorted(old.nodes - route.nodes))
        return ", ".join(map(str, placement.endpoints))

    @property
    def farthest_s(self) -> float | None:
        """How long a round trip to the farthest node took when it was met; None: no nodes."""
        known = [self._client.health(node) for node in self.route.nodes]
        return max((health.rtt_s for health in known if health is not None), default=None)

    def health(self, endpoint: str) -> NodeHealth | None:
        """Return what is known of a node's speed, for figures; None: it was never there."""
        names = [str(other) for other in self.route.placement.endpoints]
        for slot, nodes in zip(self.route.placement.slots, self.route.candidates, strict=True):
            for index, node in zip(slot, nodes or (), strict=False):
                if names[index] == endpoint:
                    return self._client.health(node)
        return None

    def close(self) -> None:
        self._client.close()
        if self._executor is not None:
            self._executor.close()

    def compute_local(self, layer: int, rows: Rows, part: Part) -> NDArray[np.int64]:
        """Return [T, D]: the part's sums at its rows, zeros elsewhere."""
        assert self._executor is not None
        try:
            sums = self._executor.compute(part.call(layer, rows))
        except errors.NumericError as error:
            at_fault = tuple(int(part.rows[row]) for row in error.rows)
            raise errors.NumericError(str(error), at_fault) from error
        if part.num_rows == rows.num_rows:
            return sums
        spread = np.zeros((rows.num_rows, rows.dim), np.int64)
        spread[part.rows] = sums
        return spread

    def finish(self, fanout: Fanout) -> NDArray[np.int64]:
        """Wait for a fan-out; return what it brings. Raises what PendingSums.wait does."""
        self._client.wait(fanout)
        return fanout.sums

    def abandon(self, fanout: Fanout) -> None:
        self._client.abandon(fanout)


def _has_tls(placement: Placement) -> bool:
    return any(endpoint.kind is EndpointKind.GRPCS for endpoint in placement.endpoints)


def _local_cells(placement: Placement) -> NDArray[np.bool_]:
    cells = [
        placement.assigned(index)
        for index, endpoint in enumerate(placement.endpoints)
        if endpoint.kind is EndpointKind.LOCAL
    ]
    return cells[0] if cells else np.zeros(0, np.bool_)
