"""What a node serves: artifact, owned experts, store, prefetcher; and how they change meanwhile.

A change is planned first: what can be wrong is found before anything is touched. Then it is carried
out; what still fails is undone.

    plan (checks, reads) --> carry_out (rebind, resize, verify, pins, prefetch) --> settle

Streams that were open before a change of ownership may still call what is no longer owned: their
coordinators learned of the old ranges; so may those that open just after it. So these experts are
served on until such streams have ended; Describe names the new ranges at once. `settle` then lets
go of them.
"""

import secrets
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from expert_node.config import NodeConfig
from expert_node.pins import pins_of
from expert_node.session import NodeFacts
from shoal import numerics, ops, wire
from shoal.artifact import Artifact
from shoal.artifact.reader import ExpertLocation
from shoal.errors import NotOwned, UsageError
from shoal.experts.cache.budget import check_size
from shoal.experts.catalogue import Catalogue
from shoal.experts.executor import ExpertExecutor
from shoal.experts.heat import HeatMap
from shoal.experts.local import owned_bytes, prefetcher_for
from shoal.experts.open_store import open_store
from shoal.experts.options import Mode
from shoal.experts.ownership import Ownership, format_spans, parse_spans
from shoal.experts.prefetch.interface import Prefetcher, PrefetchFigures
from shoal.experts.store import ExpertFiles, Key, StoreOptions
from shoal.experts.streaming import StreamingStore
from shoal.limits import MIB, READER_CLOSE_S
from shoal.log import get_logger
from shoal.memory_limit import MemoryLimit, memory_limit
from shoal.sizes import format_size

OVERHEAD_BYTES = 200 * MIB  # of a process beside its experts: 150-190 MiB seen under load
_log = get_logger("served")
Signature = tuple[tuple[str, int, int, int], ...]
Former = tuple[Artifact, Ownership]
GRACE = -1  # no stream's id: whoever asked Describe before the change and opens a stream after it


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked change: what will be served, and how."""

    config: NodeConfig
    artifact: Artifact
    signature: Signature
    ownership: Ownership
    pins: tuple[Key, ...]
    prefetcher: Prefetcher | None  # new; None with `keeps_prefetcher`: the one there is
    keeps_prefetcher: bool

    def close(self) -> None:
        """Drop a plan that is not carried out."""
        if self.prefetcher is not None:
            self.prefetcher.close()


class Served:
    """See the module. `plan`, `carry_out` and `settle`: one at a time, from any thread."""

    def __init__(
        self, config: NodeConfig, artifact: Artifact, ownership: Ownership, heat: HeatMap | None
    ) -> None:
        """Open the store; reads nothing yet. Raises UsageError, OSError."""
        self.artifact, self.ownership = artifact, ownership
        self.memory = check_memory(artifact, ownership, config.cache_bytes)
        self._config = config
        self._signature = _checked_files(artifact, ownership, config)
        self._epoch = secrets.token_hex(8)
        self._lingering: dict[int, tuple[Former, ...]] = {}  # by open stream
        self._lock = threading.Lock()  # of what lingers: streams come and go on the event loop
        self._changing = threading.Lock()  # `close` waits for a change that its asker gave up
        self._is_closed = False
        self.store: StreamingStore = open_store(
            artifact,
            ownership,
            StoreOptions(
                cache_bytes=config.cache_bytes,
                verify=config.verify,
                backend=config.io,
                data_dirs=config.data_dirs,
                pins=pins_of(config.pin_experts, artifact, ownership, heat, config.cache_bytes),
            ),
        )
        try:
            self.prefetcher = prefetcher_for(
                config.prefetch, artifact, ownership, config.cache_bytes, self.store
            )
        except BaseException:
            self.store.close()
            raise
        self.executor = ExpertExecutor(artifact, self.store, prefetcher=self.prefetcher)

    @property
    def facts(self) -> NodeFacts:
        """Who this node is, with what it owns now."""
        return self._facts(self.artifact, self.ownership)

    def _facts(self, artifact: Artifact, ownership: Ownership) -> NodeFacts:
        formats = {artifact.expert_layout(layer).gate_up.label for layer in ownership.layers}
        return NodeFacts(
            model_name=artifact.name,
            identity=artifact.identity,
            numerics=numerics.NUMERICS,
            instance_epoch=self._epoch,
            owned=ownership.ranges,
            quantisation="+".join(sorted(formats)),
            isa=ops.isa(),
            num_threads=ops.num_threads(),
            max_rows_per_call=wire.max_rows_per_call(artifact.spec.model_dim),
        )

    def prefetch_figures(self) -> PrefetchFigures:
        """Return the prefetcher's figures; of none: all zero."""
        prefetcher = self.prefetcher
        if prefetcher is None:
            return PrefetchFigures(Mode.OFF, {}, 0, 0, 0, 0, 0.0, "", "", "", 0, 0)
        return prefetcher.figures()

    @property
    def owned_bytes(self) -> int:
        """Bytes of everything owned, in memory or not."""
        return owned_bytes(self.artifact, self.ownership)

    def plan(self, config: NodeConfig, heat: HeatMap | None) -> Plan:
        """Check a new configuration against the model, the machine and what is served.

        Raises:
            UsageError: another model, a wrong range, too much memory, a list that is none.
            ArtifactError: the artifact cannot be opened. Nothing has changed in any case.
        """
        artifact = Artifact.open(config.model)
        if artifact.identity != self.artifact.identity:
            raise UsageError(
                f"{artifact.path} is another model ({artifact.name}, identity "
                f"{artifact.identity[:12]}) than the one served ({self.artifact.name}, "
                f"{self.artifact.identity[:12]}): start another node for it"
            )
        ownership = owned_by(artifact, config)
        check_memory(artifact, ownership, config.cache_bytes)
        self._facts(artifact, ownership)
        signature = _checked_files(artifact, ownership, config)
        is_same = ownership.ranges == self.ownership.ranges and signature == self._signature
        before = self._config
        keeps = is_same and (config.prefetch, config.cache_bytes) == (
            before.prefetch,
            before.cache_bytes,
        )
        pins = pins_of(config.pin_experts, artifact, ownership, heat, config.cache_bytes)
        prefetcher = None
        if not keeps:
            prefetcher = prefetcher_for(
                config.prefetch, artifact, ownership, config.cache_bytes, self.store
            )
        return Plan(config, artifact, signature, ownership, pins, prefetcher, keeps)

    def carry_out(self, plan: Plan, open_streams: Collection[int]) -> list[str]:
        """Put a plan in force; return what changed beside settings.

        Args:
            open_streams: those that know of the ownership before.

        Raises: UsageError, NotOwned, OSError; then what was is in force again.
        """
        with self._changing:
            return self._carry_out(plan, open_streams)

    def _carry_out(self, plan: Plan, open_streams: Collection[int]) -> list[str]:
        old = (self.artifact, self.ownership, self._signature)
        changed: list[str] = []
        try:
            if plan.ownership.ranges != self.ownership.ranges or plan.signature != self._signature:
                changed = self._rebind(plan, open_streams)
            elif plan.config.cache_bytes != self._config.cache_bytes:
                self._serve_all(plan.config)
        except BaseException:
            plan.close()
            self.artifact, self.ownership, self._signature = old
            try:
                self._serve_all(self._config)
            except Exception:  # noqa: BLE001  the first error is the one to tell
                _log.exception("what was served before could not be put in force again whole")
            raise
        self.store.set_verify(plan.config.verify)
        self.store.pin(plan.pins)
        if not plan.keeps_prefetcher:
            before, self.prefetcher = self.prefetcher, plan.prefetcher
            self.executor.use_prefetcher(plan.prefetcher)
            if before is not None:
                before.close()
        self._config = plan.config
        return changed

    def on_stream(self, stream_id: int) -> None:
        """Learn of a new stream."""
        with self._lock:
            if GRACE in self._lingering:
                self._lingering[stream_id] = self._lingering[GRACE]

    def on_stream_end(self, stream_id: int) -> bool:
        """Learn that a stream (or GRACE) is over. True: `settle` may let go of something."""
        with self._lock:
            return self._lingering.pop(stream_id, None) is not None

    @property
    def lingers(self) -> bool:
        """Whether more is served than owned."""
        return bool(self._lingering)

    def settle(self) -> None:
        """Stop to serve what only streams that have ended could call."""
        with self._changing:
            is_settled = self._everything()[1].ranges == self.store.ownership.ranges
            if self._is_closed or is_settled:
                return
            self._serve_all(self._config)
        _log.info("former experts are let go: no stream is left that knew of them")

    def close(self, timeout_s: float = READER_CLOSE_S) -> None:
        """Let go of everything. No call may be under way. Reads get that long to end."""
        with self._changing:
            self._is_closed = True
            if self.prefetcher is not None:
                self.prefetcher.close()
            self.store.close(timeout_s)

    def _rebind(self, plan: Plan, open_streams: Collection[int]) -> list[str]:
        changed = []
        if plan.signature != self._signature:
            folders = ", ".join(map(str, (plan.artifact.path, *plan.config.data_dirs)))
            changed.append(f"artifact: read again from {folders}")
        if plan.ownership.ranges != self.ownership.ranges:
            changed.append(f"owned: {self.ownership} -> {plan.ownership}")
            former = (self.artifact, self.ownership)
            with self._lock:
                for stream_id in (*open_streams, GRACE):
                    known = self._lingering.get(stream_id, ())
                    self._lingering[stream_id] = _with(known, former)
        if plan.signature != self._signature:
            with self._lock:
                for stream_id, formers in self._lingering.items():
                    kept = tuple(_still_there(each, plan.artifact) for each in formers)
                    self._lingering[stream_id] = kept
        self.artifact, self.ownership = plan.artifact, plan.ownership
        self._signature = plan.signature
        self._serve_all(plan.config)
        return changed

    def _everything(self) -> tuple[ExpertFiles, Ownership]:
        # What is owned, and what streams from before may still call.
        files: ExpertFiles = self.artifact
        owned = {layer: set(self.ownership.experts(layer)) for layer in self.ownership.layers}
        with self._lock:
            formers = {id(former): former for each in self._lingering.values() for former in each}
        for former_files, former in formers.values():
            for layer in former.layers:
                owned.setdefault(layer, set()).update(former.experts(layer))
            if former_files is not self.artifact:
                files = EitherFiles(files, former_files)
        return files, Ownership(owned)

    def _serve_all(self, config: NodeConfig) -> None:
        files, everything = self._everything()
        budget = config.cache_bytes
        if budget is None and self._lacks_room(everything):
            # Former experts find room among those that are owned.
            budget = max(
                owned_bytes(self.artifact, self.ownership), 2 * _largest(self.artifact, everything)
            )
        if budget is not None:
            self.store.resize(budget)
        self.store.rebind(files, everything)
        if budget is None:
            self.store.resize(None)

    def _lacks_room(self, everything: Ownership) -> bool:
        needed = owned_bytes(self.artifact, everything) + OVERHEAD_BYTES
        return needed > self.memory.num_bytes


class EitherFiles:
    """The experts of one artifact, and from another of the same identity those that it lacks."""

    def __init__(self, first: ExpertFiles, second: ExpertFiles) -> None:
        self._first, self._second = first, second

    @property
    def path(self) -> Path:
        return self._first.path

    @property
    def identity(self) -> str:
        return self._first.identity

    def expert_layout(self, layer: int) -> ops.ExpertLayout:
        """See `Artifact.expert_layout`: the manifest of a slice has every layer."""
        return self._first.expert_layout(layer)

    def expert_location(self, layer: int, index: int) -> ExpertLocation:
        """See `Artifact.expert_location`."""
        try:
            return self._first.expert_location(layer, index)
        except NotOwned:
            return self._second.expert_location(layer, index)


def owned_by(artifact: Artifact, config: NodeConfig) -> Ownership:
    """Return what the node owns: all that the artifact holds, or what --experts and --layers say.

    Raises:
        UsageError: a flag is wrong, or names experts that this slice does not hold.
    """
    held = artifact.owned_experts
    if not held:
        raise UsageError(f"{artifact.path} holds no experts: it is a coordinator's slice")
    num_experts = max(
        layer.router.num_experts for layer in artifact.spec.layers if layer.router is not None
    )
    layers: tuple[int, ...] = tuple(held)
    if config.layers is not None:
        layers = parse_spans(config.layers, name="--layers", limit=artifact.spec.num_layers)
    experts: tuple[int, ...] | None = None
    if config.experts is not None:
        experts = parse_spans(config.experts, name="--experts", limit=num_experts)
    wanted: dict[int, tuple[int, ...]] = {}
    for layer in layers:
        router = artifact.spec.layers[layer].router
        if router is None:  # a dense layer within the span: it is the coordinator's
            continue
        wanted[layer] = tuple(
            index for index in (experts or held.get(layer, ())) if index < router.num_experts
        )
        if missing := sorted(set(wanted[layer]) - set(held.get(layer, ()))):
            raise UsageError(
                f"{artifact.path} does not hold expert {format_spans(missing)} of layer {layer}, "
                f"which --experts and --layers name: it has {Ownership(held)}"
            )
    if not any(wanted.values()):
        raise UsageError(
            f"--experts and --layers leave no expert to own: {artifact.path} has {Ownership(held)}"
        )
    return Ownership(wanted)


def check_memory(
    artifact: Artifact,
    ownership: Ownership,
    cache_bytes: int | None,
    limit: MemoryLimit | None = None,
) -> MemoryLimit:
    """Refuse what cannot fit; return the limit.

    Args:
        limit: None: this process's own.

    Raises: UsageError naming what is needed and what there is.
    """
    limit = limit or memory_limit()
    owned = owned_bytes(artifact, ownership)
    arena = owned if cache_bytes is None else min(cache_bytes, owned)
    if arena + OVERHEAD_BYTES <= limit.num_bytes:
        return limit
    what = (
        f"the {ownership.num_experts} experts take {format_size(owned)}"
        if cache_bytes is None
        else f"--cache takes {format_size(arena)}"
    )
    room = max(0, limit.num_bytes - OVERHEAD_BYTES)
    raise UsageError(
        f"{what}, and about {format_size(OVERHEAD_BYTES)} are needed beside: {limit.source} is "
        f"{format_size(limit.num_bytes)}; keep fewer in memory with --cache (at most "
        f"{format_size(room)}), or own fewer with --experts or --layers"
    )


def _checked_files(artifact: Artifact, ownership: Ownership, config: NodeConfig) -> Signature:
    """Return what tells whether a file that is served was written or replaced.

    Files of the artifact, and the copies in data directories that experts are read from.

    Raises: OSError. UsageError: the cache is too small for them; a data directory has none.
        CorruptArtifact: a copy is too short.
    """
    catalogue = Catalogue(artifact, ownership, config.data_dirs)
    if config.cache_bytes is not None:
        check_size(config.cache_bytes, catalogue.sizes)
    own = [artifact.path / name for name in ("manifest.json", *artifact.file_sizes())]
    stats = [(str(path), path.stat()) for path in dict.fromkeys((*own, *catalogue.paths))]
    found = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return ((str(artifact.path), 0, 0, 0), *found)


def _with(formers: tuple[Former, ...], former: Former) -> tuple[Former, ...]:
    # A storm of reloads between two configurations is two formers, not one a reload.
    known = {(artifact.path, ownership.ranges) for artifact, ownership in formers}
    is_new = (former[0].path, former[1].ranges) not in known
    return (*formers, former) if is_new else formers


def _still_there(former: Former, artifact: Artifact) -> Former:
    # Files that were replaced no longer have what the new ones lack.
    files, ownership = former
    if files.path != artifact.path:
        return former
    held = artifact.owned_experts
    experts = {
        layer: set(ownership.experts(layer)) & set(held.get(layer, ()))
        for layer in ownership.layers
    }
    return artifact, Ownership(experts)


def _largest(artifact: Artifact, ownership: Ownership) -> int:
    return max(artifact.expert_layer(layer).expert_bytes for layer in ownership.layers)
