"""Node: a running expert node, its parts built in order and taken down in reverse."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from expert_node.config import ListenAddress, NodeConfig
from expert_node.fast_server import FastServer
from expert_node.heat_keeper import WRITE_INTERVAL_S, HeatKeeper, read_heat
from expert_node.lent_sockets import LentSockets
from expert_node.lifecycle import Health, StopSignal, WarmUpStopped, drained_too_late, warm_up
from expert_node.pace_keeper import PaceKeeper
from expert_node.pins import pins_of, warm_up_order
from expert_node.reload import Outcome, Reloader
from expert_node.served import GRACE, Served, owned_by
from expert_node.service import ExpertService, Server
from expert_node.worker import Worker
from shoal import limits, log, numerics, ops
from shoal.artifact import Artifact
from shoal.errors import NodeError
from shoal.experts.call import ExpertCall
from shoal.experts.drive_sensors import DriveSensors
from shoal.experts.heat import HeatMap
from shoal.experts.ownership import Ownership, format_spans
from shoal.experts.recording import Geometry, geometry_of
from shoal.log import get_logger
from shoal.sizes import format_size
from shoal.tls import ServerTls
from shoal.transport import Transport

if TYPE_CHECKING:
    from expert_node.metrics import NodeView
    from expert_node.metrics_server import MetricsServer

STREAM_GRACE_S = 4.0  # for streams to send their last frames once the calls are done
FORMER_GRACE_S = 10.0  # after a reload: streams that open know of the ranges before, perhaps
_log = get_logger("app")


@dataclass(frozen=True, slots=True)
class Ready:
    """What a node says once it serves: `str()` for people, `asdict()` for programs."""

    endpoint: str
    experts: str
    layers: str
    owned: str
    num_experts: int
    expert_bytes: int
    cache_bytes: int
    model: str
    identity: str
    numerics: str
    quantisation: str
    isa: str
    num_threads: int
    pid: int
    metrics: str  # where, or ""

    def __str__(self) -> str:
        held = ""
        if self.cache_bytes < self.expert_bytes:
            held = f", {format_size(self.cache_bytes)} of them in memory"
        return (
            f"ready: {self.endpoint} experts {self.experts} layers {self.layers} of {self.model} "
            f"({self.num_experts} experts, {format_size(self.expert_bytes)}{held}, "
            f"{self.quantisation}, {self.isa}, {self.num_threads} threads)"
        )


class Node:
    """A running expert node: one server, what it serves, one worker."""

    def __init__(
        self, config: NodeConfig, served: Served, heat: HeatKeeper, reread: Callable[[], NodeConfig]
    ) -> None:
        """Use `start`."""
        self.stop_signal = StopSignal()
        self.reloader = Reloader(config, reread, self._apply)
        loop = asyncio.get_running_loop()
        self._lent = LentSockets(
            loop, lambda: () if heat.records else served.executor.resident_layers()
        )
        self.worker = Worker(
            served.executor,
            loop,
            max_waiting=config.max_queued_calls,
            log_calls=config.log_calls,
            gate=self._lent,
        )
        self.is_ready = False
        self._served = served
        self._heat = heat
        self._pace = PaceKeeper(
            served.store,
            _sensors(config),
            config.thermal_limit_c,
            config.max_read_bandwidth,
        )
        self._health = Health()
        self._service = ExpertService(served.facts, self.worker, self)
        self._server = _make_server(config, self._service, self._health, self._lent)
        self._metrics: MetricsServer | None = None
        self._port = 0
        self._tls: ServerTls | None = None
        self._changing = asyncio.Lock()  # of what is served
        self._is_settling = asyncio.Event()
        self._grace: asyncio.TimerHandle | None = None

    @classmethod
    async def start(
        cls, config: NodeConfig, reread: Callable[[], NodeConfig], *, handle_signals: bool = False
    ) -> Self:
        """Check everything that can be checked at once, listen, and answer NOT_SERVING.

        Raises:
            NumericsMismatch: the kernels of this build are not the ones the model needs.
            ArtifactError, UsageError: the model or a flag is wrong.
            NodeError: an address cannot be listened on.
        """
        numerics.verify()
        if config.threads is not None:
            ops.set_threads(config.threads)
        artifact = Artifact.open(config.model)
        served, heat = _open_parts(config, artifact)
        try:
            node = cls(config, served, heat, reread)
            loop = asyncio.get_running_loop()
            if handle_signals:
                node.stop_signal.install(loop)
                node.stop_signal.install_reload(loop, node.start_reload)
            if config.leave_with_stdin:
                node.stop_signal.install_on_stdin(loop)
            await node._listen(config)
        except BaseException:
            served.close()
            raise
        return node

    @property
    def config(self) -> NodeConfig:
        """What is in force."""
        return self.reloader.config

    @property
    def endpoint(self) -> str:
        """Where it listens, as --moe-shards writes it."""
        return self.config.listen.endpoint(self._port, has_tls=self.config.tls is not None)

    @property
    def ready(self) -> Ready:
        """What to announce."""
        facts, ownership = self._service.facts, self._served.ownership
        experts = {index for layer in ownership.layers for index in ownership.experts(layer)}
        return Ready(
            endpoint=self.endpoint,
            experts=format_spans(sorted(experts)),
            layers=format_spans(ownership.layers),
            owned=str(ownership),
            num_experts=ownership.num_experts,
            expert_bytes=self._served.owned_bytes,
            cache_bytes=self._served.store.figures().budget_bytes,
            model=facts.model_name,
            identity=facts.identity,
            numerics=facts.numerics,
            quantisation=facts.quantisation,
            isa=facts.isa,
            num_threads=facts.num_threads,
            pid=os.getpid(),
            metrics="" if self._metrics is None else self._metrics.url,
        )

    async def make_ready(self) -> bool:
        """Warm up if asked, then answer SERVING. False: told to leave before that."""
        config, served = self.config, self._served
        if config.warmup or config.warmup_from is not None:
            heat = _warm_heat(config, served.artifact)
            try:
                await warm_up(served.store, self.stop_signal, warm_up_order(served.ownership, heat))
            except WarmUpStopped:
                return False
        self.is_ready = True
        await self._health.set_serving(True)
        reader = served.store.figures().reader
        if reader is not None:
            fallbacks = dict(reader.fallbacks)
            _log.info("reads", backend=reader.backend, why=reader.why, fallbacks=fallbacks)
        _log.info("ready", **asdict(self.ready))
        return True

    def background(self) -> list[Coroutine[Any, Any, None]]:
        """Return what runs beside the server and the reloader, until it is cancelled."""
        return [self._pace.run(), self._follow_heat(), self._settle()]

    # What the service asks

    def start_drain(self, reason: str) -> None:
        """See `service.Host`."""
        self.stop_signal.set(reason)

    def start_reload(self) -> "asyncio.Future[Outcome]":
        """See `service.Host`."""
        return self.reloader.request()

    def on_stream(self, stream_id: int) -> None:
        """See `service.Host`."""
        self._served.on_stream(stream_id)

    def on_stream_end(self, stream_id: int) -> None:
        """See `service.Host`."""
        self._heat.on_stream_end(stream_id)
        if self._served.on_stream_end(stream_id):
            self._is_settling.set()

    def on_call(self, stream_id: int, num_rows: int, call: Callable[[], ExpertCall]) -> None:
        """See `service.Host`."""
        self._heat.on_call(stream_id, num_rows, call)

    async def stop(self) -> None:
        """Drain within the configured time and take everything down."""
        reason = self.stop_signal.reason or "stopped"
        self.stop_signal.set(reason)
        _log.info("draining", reason=reason, calls_in_flight=self.worker.num_held)
        self.is_ready = False
        await self._health.set_serving(False)
        self.worker.drain()
        self._service.announce_drain(reason)
        drain_timeout_s = self.config.drain_timeout_s
        until_s = time.monotonic() + drain_timeout_s
        try:
            async with asyncio.timeout(drain_timeout_s):
                await self.worker.wait_idle()
        except TimeoutError:
            _log.warning("drain timed out", calls_in_flight=self.worker.num_held)
            self.worker.abandon(drained_too_late(drain_timeout_s))
        self._service.end_streams()
        await self._server.stop(STREAM_GRACE_S)
        self._lent.close()
        self.worker.close()
        await self._heat.write()
        if self._metrics is not None:
            self._metrics.close()
        self._pace.close()
        left_s = max(limits.LAST_READS_S, until_s - time.monotonic())
        await asyncio.to_thread(self._served.close, min(left_s, limits.READER_CLOSE_S))
        if self._served.store.leaves_reads:
            _log.warning("leaving without reads that do not end: does the drive answer?")
        if (path := self.config.listen.socket_path) is not None:
            path.unlink(missing_ok=True)
        _log.info("stopped", reason=reason)

    async def _apply(self, old: NodeConfig, new: NodeConfig) -> list[str]:
        """Go from one configuration to another (see `Reloader`)."""
        sensors = await asyncio.to_thread(_sensors, new)
        tls = None if new.tls is None else await asyncio.to_thread(ServerTls.read, new.tls)
        async with self._changing:
            changed = await self._serve_anew(new)
        # Nothing below can fail: what is served is the new configuration's.
        if (new.log_format, new.log_level) != (old.log_format, old.log_level):
            log.configure(new.log_format, new.log_level)
        self.worker.configure(max_waiting=new.max_queued_calls, log_calls=new.log_calls)

        def pace() -> None:
            self._pace.use_sensors(sensors)
            self._pace.configure(new.thermal_limit_c, new.max_read_bandwidth)

        await asyncio.to_thread(pace)
        if tls is not None and not tls.shows_the_same(self._tls):
            changed.append(f"TLS: {tls}")
            self._use_tls(tls)
            self._server.use_tls(tls)
        return changed

    def _use_tls(self, tls: ServerTls) -> None:
        self._tls = tls
        if tls.is_expired:
            _log.error("the certificate has expired: no coordinator will take it", tls=str(tls))
        else:
            _log.info("TLS", tls=str(tls), asks_clients=tls.files.is_mutual)

    async def _serve_anew(self, new: NodeConfig) -> list[str]:
        served = self._served
        plan = await asyncio.to_thread(served.plan, new, self._pins_heat(new))
        try:
            geometry = _geometry(new, plan.artifact, plan.ownership)
            prepared = await asyncio.to_thread(
                self._heat.prepare, geometry, new.record_heat, counts=_follows_heat(new)
            )
        except BaseException:
            plan.close()
            raise
        before, former = self._service.stream_ids, served.ownership
        changed = await asyncio.to_thread(served.carry_out, plan, before)
        for stream_id in before - self._service.stream_ids:  # ended meanwhile
            served.on_stream_end(stream_id)
        for stream_id in self._service.stream_ids - before:  # opened meanwhile
            served.on_stream(stream_id)
        self._service.facts = served.facts
        if former is not served.ownership and served.lingers:
            if self._grace is not None:
                self._grace.cancel()
            loop = asyncio.get_running_loop()
            self._grace = loop.call_later(FORMER_GRACE_S, self.on_stream_end, GRACE)
        await self._heat.write()
        self._heat.rebind(prepared)
        self._lent.take_all_back()
        return changed

    async def _settle(self) -> None:
        """Let go of former experts whenever nobody can call them any more."""
        while True:
            await self._is_settling.wait()
            self._is_settling.clear()
            async with self._changing:
                await asyncio.to_thread(self._served.settle)

    def _pins_heat(self, config: NodeConfig) -> HeatMap | None:
        return self._heat.heat() if _follows_heat(config) else None

    async def _follow_heat(self) -> None:
        """Write what was recorded, and pin what is hottest now."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            await self._heat.write()
            config, served = self.config, self._served
            if _follows_heat(config):
                heat = self._heat.heat()
                served.store.pin(
                    pins_of(
                        config.pin_experts,
                        served.artifact,
                        served.ownership,
                        heat,
                        config.cache_bytes,
                    )
                )

    def _view(self) -> "NodeView":
        from expert_node.metrics import NodeView

        served, heat = self._served, self._heat.figures()
        return NodeView(
            facts=self._service.facts,
            is_ready=self.is_ready,
            is_draining=self.worker.is_draining,
            calls_held=self.worker.num_held + self._lent.num_held,
            num_calls=heat.num_calls + self._lent.num_calls,
            num_rows=heat.num_rows + self._lent.num_rows,
            owned_experts=served.ownership.num_experts,
            owned_bytes=served.owned_bytes,
            memory_limit_bytes=served.memory.num_bytes,
            tls_expires_s=0.0 if self._tls is None else self._tls.expires_s,
        )

    def _serve_metrics(self, listen: ListenAddress) -> "MetricsServer":
        from expert_node.metrics import Sources, make_registry  # prometheus_client: 0.05 s
        from expert_node.metrics_server import MetricsServer

        sources = Sources(
            node=self._view,
            store=self._served.store.figures,
            pace=lambda: self._pace.view,
            prefetch=self._served.prefetch_figures,
            reloads=lambda: self.reloader.figures,
            heat=self._heat.figures,
        )
        registry = make_registry(sources)
        return MetricsServer(listen, registry, lambda: self.is_ready)

    async def _listen(self, config: NodeConfig) -> None:
        listen = config.listen
        if config.exposure:
            _log.warning(f"INSECURE: {config.exposure}", listen=listen.grpc_target)
        if config.tls is not None:
            self._use_tls(ServerTls.read(config.tls))
        if listen.socket_path is not None:
            _refuse_live_socket(listen.socket_path)
        await self._health.set_serving(False)
        if config.metrics_listen is not None:
            self._metrics = self._serve_metrics(config.metrics_listen)
        try:
            self._port = await self._server.start(listen, self._tls)
        except (RuntimeError, OSError):  # gRPC's, and sockets' own
            if self._metrics is not None:
                self._metrics.close()
            raise NodeError(
                f"cannot listen on {listen.grpc_target}: the address is in use, is not this "
                "machine's, or needs more rights; choose another with --listen (port 0: any free)"
            ) from None


def _make_server(
    config: NodeConfig, service: ExpertService, health: Health, lent: LentSockets
) -> Server:
    if config.transport is not Transport.GRPCIO:
        return FastServer(service, health, lent)
    from expert_node.grpc_server import GrpcServer

    return GrpcServer(service, health)


def _open_parts(config: NodeConfig, artifact: Artifact) -> tuple[Served, HeatKeeper]:
    ownership = owned_by(artifact, config)
    geometry = _geometry(config, artifact, ownership)
    heat = HeatKeeper(geometry, config.record_heat, counts=_follows_heat(config))
    known = _warm_heat(config, artifact)
    return Served(config, artifact, ownership, known or heat.heat()), heat


def _warm_heat(config: NodeConfig, artifact: Artifact) -> HeatMap | None:
    path = config.warmup_from
    return None if path is None else read_heat(path, artifact.identity, "--warmup-from")


def _follows_heat(config: NodeConfig) -> bool:
    return isinstance(config.pin_experts, int)


def _geometry(config: NodeConfig, artifact: Artifact, ownership: Ownership) -> Geometry:
    routers = {
        index: layer.router
        for index, layer in enumerate(artifact.spec.layers)
        if layer.router is not None and ownership.experts(index)
    }
    per_token = {router.experts_per_token for router in routers.values()}
    return geometry_of(
        artifact.identity,
        {index: router.num_experts for index, router in routers.items()},
        per_token.pop() if len(per_token) == 1 and config.record_heat is not None else None,
        {index: ownership.experts(index) for index in routers},
    )


def _sensors(config: NodeConfig) -> DriveSensors:
    return DriveSensors([config.model / "experts", *config.data_dirs], config.sysfs)


def _refuse_live_socket(path: Path) -> None:
    # gRPC replaces an existing socket file without asking, and would cut off a live node.
    if not path.is_socket():
        if path.exists():
            raise NodeError(f"cannot listen on unix://{path}: a file of that name exists")
        if not path.parent.is_dir():
            raise NodeError(f"cannot listen on unix://{path}: there is no folder {path.parent}")
        return
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise NodeError(f"cannot listen on unix://{path}: another process does")
