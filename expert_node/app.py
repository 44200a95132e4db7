"""Composition root of `shoal node`: builds the parts in order, takes them down in reverse."""

import asyncio
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from expert_node.config import ListenAddress, NodeConfig
from expert_node.fast_server import FastServer
from expert_node.grpc_server import GrpcServer, Server
from expert_node.lifecycle import Health, StopSignal, WarmUpStopped, drained_too_late, warm_up
from expert_node.service import ExpertService
from expert_node.session import NodeFacts
from expert_node.worker import Worker
from shoal import limits, numerics, ops, wire
from shoal.allocator import keep_freed_memory
from shoal.artifact import Artifact
from shoal.errors import NodeError, UsageError
from shoal.experts.executor import ExpertExecutor
from shoal.experts.ownership import Ownership, format_spans, parse_spans
from shoal.experts.resident import ResidentStore
from shoal.log import get_logger
from shoal.transport import Transport

STREAM_GRACE_S = 2.0  # for streams to send their last frames once the calls are done
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
    model: str
    identity: str
    numerics: str
    quantisation: str
    isa: str
    num_threads: int
    pid: int

    def __str__(self) -> str:
        return (
            f"ready: {self.endpoint} experts {self.experts} layers {self.layers} of {self.model} "
            f"({self.num_experts} experts, {self.expert_bytes / 2**30:.2f} GiB, "
            f"{self.quantisation}, {self.isa}, {self.num_threads} threads)"
        )


def run(
    config: NodeConfig,
    announce: Callable[[Ready], None],
    reread: Callable[[], NodeConfig] | None = None,
) -> None:
    """Serve until told to leave. Raises ShoalError where the node cannot start."""
    keep_freed_memory()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, announce))


async def _serve(config: NodeConfig, announce: Callable[[Ready], None]) -> None:
    node = await Node.start(config, handle_signals=True)
    try:
        if await node.make_ready():
            announce(node.ready)
            await node.stop_signal.wait()
    finally:
        await node.stop()


class Node:
    """A running expert node: one server, one store, one worker."""

    def __init__(
        self, config: NodeConfig, artifact: Artifact, store: ResidentStore, facts: NodeFacts
    ) -> None:
        """Use `start`."""
        self.config = config
        self.stop_signal = StopSignal()
        self.worker = Worker(
            ExpertExecutor(artifact, store),
            asyncio.get_running_loop(),
            log_calls=config.log_calls,
        )
        self._store = store
        self._facts = facts
        self._health = Health()
        self._is_ready = False
        self._service = ExpertService(
            facts, self.worker, is_ready=lambda: self._is_ready, start_drain=self.stop_signal.set
        )
        make_server = FastServer if config.transport is not Transport.GRPCIO else GrpcServer
        self._server: Server = make_server(self._service, self._health)
        self._port = 0

    @classmethod
    async def start(cls, config: NodeConfig, *, handle_signals: bool = False) -> Self:
        """Check everything that can be checked at once, listen, and answer NOT_SERVING.

        Raises:
            NumericsMismatch: the kernels of this build are not the ones the model needs.
            ArtifactError, UsageError: the model or a flag is wrong.
            NodeError: the address cannot be listened on.
        """
        numerics.verify()
        if config.threads is not None:
            ops.set_threads(config.threads)
        artifact = Artifact.open(config.model)
        ownership = owned_by(artifact, config)
        _check_memory(artifact, ownership)
        store = ResidentStore(artifact, ownership)
        node = cls(config, artifact, store, _facts(artifact, ownership))
        if handle_signals:
            node.stop_signal.install(asyncio.get_running_loop())
        if config.leave_with_stdin:
            node.stop_signal.install_on_stdin(asyncio.get_running_loop())
        if not config.listen.is_local:
            _log.warning(
                "INSECURE: no TLS, no token: whoever reaches this address can use the node",
                listen=config.listen.grpc_target,
            )
        await node._listen(config.listen)
        return node

    @property
    def endpoint(self) -> str:
        """Where it listens, as --moe-shards writes it."""
        return self.config.listen.endpoint(self._port)

    @property
    def ready(self) -> Ready:
        """What to announce."""
        facts, ownership = self._facts, self._store.ownership
        experts = {index for layer in ownership.layers for index in ownership.experts(layer)}
        return Ready(
            endpoint=self.endpoint,
            experts=format_spans(sorted(experts)),
            layers=format_spans(ownership.layers),
            owned=str(ownership),
            num_experts=ownership.num_experts,
            expert_bytes=self._store.num_bytes,
            model=facts.model_name,
            identity=facts.identity,
            numerics=facts.numerics,
            quantisation=facts.quantisation,
            isa=facts.isa,
            num_threads=facts.num_threads,
            pid=os.getpid(),
        )

    async def make_ready(self) -> bool:
        """Warm up if asked, then answer SERVING. False: told to leave before that."""
        if self.config.warmup:
            try:
                await warm_up(self._store, self.stop_signal)
            except WarmUpStopped:
                return False
        self._is_ready = True
        await self._health.set_serving(True)
        _log.info("ready", **asdict(self.ready))
        return True

    async def stop(self) -> None:
        """Drain within the configured time and take everything down."""
        reason = self.stop_signal.reason or "stopped"
        self.stop_signal.set(reason)
        _log.info("draining", reason=reason, calls_in_flight=self.worker.num_held)
        self._is_ready = False
        await self._health.set_serving(False)
        self.worker.drain()
        self._service.announce_drain(reason)
        drain_timeout_s = self.config.drain_timeout_s
        try:
            async with asyncio.timeout(drain_timeout_s):
                await self.worker.wait_idle()
        except TimeoutError:
            _log.warning("drain timed out", calls_in_flight=self.worker.num_held)
            self.worker.abandon(drained_too_late(drain_timeout_s))
        self._service.end_streams()
        await self._server.stop(STREAM_GRACE_S)
        self.worker.close()
        self._store.close()
        if (path := self.config.listen.socket_path) is not None:
            path.unlink(missing_ok=True)
        _log.info("stopped", reason=reason)

    async def _listen(self, listen: ListenAddress) -> None:
        if listen.socket_path is not None:
            _refuse_live_socket(listen.socket_path)
        await self._health.set_serving(False)
        try:
            self._port = await self._server.start(listen)
        except (RuntimeError, OSError):  # gRPC's, and sockets' own
            raise NodeError(
                f"cannot listen on {listen.grpc_target}: the address is in use, is not this "
                "machine's, or needs more rights; choose another with --listen (port 0: any free)"
            ) from None


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
    return Ownership(wanted)


def _facts(artifact: Artifact, ownership: Ownership) -> NodeFacts:
    formats = {artifact.expert_layout(layer).gate_up.label for layer in ownership.layers}
    return NodeFacts(
        model_name=artifact.name,
        identity=artifact.identity,
        numerics=numerics.NUMERICS,
        instance_epoch=secrets.token_hex(8),
        owned=ownership.ranges,
        quantisation="+".join(sorted(formats)),
        isa=ops.isa(),
        num_threads=ops.num_threads(),
        max_rows_per_call=wire.max_rows_per_call(artifact.spec.model_dim),
    )


def _check_memory(artifact: Artifact, ownership: Ownership) -> None:
    needed = sum(
        artifact.expert_location(layer, index).num_bytes
        for layer in ownership.layers
        for index in ownership.experts(layer)
    )
    installed = psutil.virtual_memory().total
    if needed > installed:
        raise UsageError(
            f"the {ownership.num_experts} experts take {needed / 2**30:.1f} GiB, this machine has "
            f"{installed / 2**30:.1f} GiB of memory: own fewer with --experts or --layers"
        )


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


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


assert limits.DRAIN_TIMEOUT_S + STREAM_GRACE_S < 30, "Kubernetes kills 30 s after SIGTERM"
