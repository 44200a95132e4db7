"""NodeConfig: what `shoal node` was told, validated in one place, and where it listens."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import limits
from shoal.errors import UsageError
from shoal.experts.options import Backend, Io, Mode, Verify
from shoal.log_options import LogFormat, LogLevel
from shoal.paths import resolve_model, user_folder, user_path
from shoal.sizes import parse_size
from shoal.tls_files import ServerFiles
from shoal.transport import Transport

THERMAL_LIMITS_C = (30.0, 120.0)  # below: every drive is throttled; above: none ever is
MAX_DRAIN_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where a node listens: host and port (0: any), or the path of a Unix socket."""

    host: str
    port: int
    socket_path: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.socket_path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name: it can resolve to anything
            return False

    @property
    def grpc_target(self) -> str:
        """What gRPC binds."""
        return f"unix:{self.socket_path}" if self.socket_path else f"{self._host_text}:{self.port}"

    def endpoint(self, port: int, *, has_tls: bool = False) -> str:
        """Return it as --moe-shards writes it, with the port that was bound."""
        if self.socket_path:
            return f"unix://{self.socket_path}"
        return f"{'grpcs' if has_tls else 'grpc'}://{self._host_text}:{port}"

    @property
    def _host_text(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything a node needs to know. experts, layers: spans as typed; None: all there are.

    cache_bytes: what experts may take in memory; None: everything owned.
    io: None: the best that works. pin_experts: a number, or a file's path, as typed.
    max_read_bandwidth: bytes a second; None: no limit. tls: None: plain text.
    """

    model: Path
    listen: ListenAddress
    experts: str | None = None
    layers: str | None = None
    cache_bytes: int | None = None
    data_dirs: tuple[Path, ...] = ()
    verify: Verify = Verify.FIRST
    io: Backend | None = None
    prefetch: Mode = Mode.AUTO
    warmup: bool = False
    warmup_from: Path | None = None
    record_heat: Path | None = None
    pin_experts: int | Path | None = None
    thermal_limit_c: float = 70.0
    max_read_bandwidth: int | None = None
    metrics_listen: ListenAddress | None = None
    max_queued_calls: int = limits.MAX_QUEUED_CALLS
    threads: int | None = None  # None: as many as this process may use
    tls: ServerFiles | None = None
    insecure: bool = False
    drain_timeout_s: float = limits.DRAIN_TIMEOUT_S
    transport: Transport = Transport.AUTO
    leave_with_stdin: bool = False  # drain when it closes: with the process that started this one
    sysfs: Path = Path("/sys")  # where drives and their temperatures are found
    log_format: LogFormat = LogFormat.CONSOLE
    log_level: LogLevel = LogLevel.INFO

    @property
    def log_calls(self) -> bool:
        """Whether every call that was answered gets a line."""
        return self.log_level is LogLevel.DEBUG

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= limits.MAX_THREADS:
            raise UsageError(f"--threads {self.threads}: must be in 1..{limits.MAX_THREADS}")
        if not 0 <= self.drain_timeout_s <= MAX_DRAIN_TIMEOUT_S:
            raise UsageError(
                f"--drain-timeout {self.drain_timeout_s:g}: must be in 0..{MAX_DRAIN_TIMEOUT_S:g} s"
            )
        if not 1 <= self.max_queued_calls <= limits.MAX_QUEUED_CALLS:
            raise UsageError(
                f"--max-queued-calls {self.max_queued_calls}: must be in "
                f"1..{limits.MAX_QUEUED_CALLS}"
            )
        low, high = THERMAL_LIMITS_C
        if not low <= self.thermal_limit_c <= high:
            raise UsageError(
                f"--nvme-thermal-limit {self.thermal_limit_c:g}: must be in {low:g}..{high:g} "
                "degrees Celsius"
            )
        if self.max_read_bandwidth is not None and self.max_read_bandwidth < limits.MIB:
            raise UsageError(
                f"--max-read-bandwidth {self.max_read_bandwidth}: must be at least 1MiB a second"
            )
        if isinstance(self.pin_experts, int) and self.pin_experts < 1:
            raise UsageError(f"--pin-experts {self.pin_experts}: must be at least 1, or a file")
        self._check_exposure()

    @property
    def exposure(self) -> str:
        """What a stranger on the network could do to the node's port; "": nothing."""
        if self.listen.is_local or (self.tls is not None and self.tls.is_mutual):
            return ""
        if self.tls is None:
            return "no TLS: anybody there could use the node, and read what others send it"
        return "no --tls-client-ca: anybody there could use the node"

    def _check_exposure(self) -> None:
        if self.tls is not None and self.listen.socket_path is not None:
            raise UsageError(
                "--tls-cert: a Unix socket needs no TLS: only this machine reaches it, and the "
                "rights of its folder say who; leave out --tls-cert, or listen on host:port"
            )
        if self.exposure and not self.insecure:
            raise UsageError(
                f"--listen {self.listen.grpc_target} is reachable from other machines, and has "
                f"{self.exposure}. Give --tls-cert, --tls-key and --tls-client-ca, listen on "
                "127.0.0.1 or unix:///path behind a tunnel, or say --insecure on a private network"
            )
        metrics = self.metrics_listen
        if metrics is None:
            return
        if metrics.socket_path is not None:
            raise UsageError("--metrics-listen: write host:port: nothing scrapes a Unix socket")
        if not (metrics.is_local or self.insecure):
            raise UsageError(
                f"--metrics-listen {metrics.grpc_target} is reachable from other machines, and "
                "anybody there could read what this node does: listen on 127.0.0.1, or say "
                "--insecure on a private network"
            )


def node_config(values: Mapping[str, Any]) -> NodeConfig:
    """Return the configuration that the verb's values name (see `expert_node.commands.node`).

    Raises:
        UsageError: naming the flag, its value and what it must look like.
    """
    if not values["model"]:
        raise UsageError("no model: give an artifact's path or name, or set MODEL_PATH")
    cache, bandwidth = values["cache"], values["max_read_bandwidth"]
    metrics = values["metrics_listen"]
    return NodeConfig(
        model=resolve_model(values["model"]),
        listen=parse_listen(values["listen"], values["port"]),
        experts=values["experts"],
        layers=values["layers"],
        cache_bytes=None if cache is None else parse_size(cache, name="--cache"),
        data_dirs=tuple(user_folder(each) for each in values["data_dir"] or ()),
        verify=values["verify"],
        io=Io(values["io"]).backend,
        prefetch=values["prefetch"],
        warmup=values["warmup"],
        warmup_from=_path(values["warmup_from"]),
        record_heat=_path(values["record_heat"]),
        pin_experts=_pins(values["pin_experts"]),
        thermal_limit_c=values["nvme_thermal_limit"],
        max_read_bandwidth=(
            None
            if bandwidth is None
            else parse_size(bandwidth, name="--max-read-bandwidth", suffix="/s")
        ),
        metrics_listen=None if metrics is None else parse_listen(metrics, name="--metrics-listen"),
        max_queued_calls=values["max_queued_calls"],
        threads=values["threads"],
        tls=_tls(values["tls_cert"], values["tls_key"], values["tls_client_ca"]),
        insecure=values["insecure"],
        drain_timeout_s=values["drain_timeout"],
        transport=values["transport"],
        leave_with_stdin=values["leave_with_stdin"],
        sysfs=values["sysfs"],
        log_format=values["log_format"],
        log_level=values["log_level"],
    )


def _path(typed: str | Path | None) -> Path | None:
    return None if typed is None else user_path(typed)


def _tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> ServerFiles | None:
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        given = "--tls-key" if cert is None and key is not None else "--tls-cert"
        given = "--tls-client-ca" if cert is None and key is None else given
        raise UsageError(f"{given} needs --tls-cert and --tls-key: what the node shows of itself")
    return ServerFiles(user_path(cert), user_path(key), _path(client_ca))


def _pins(typed: str | None) -> int | Path | None:
    if typed is None:
        return None
    is_number = typed.isascii() and typed.removeprefix("-").isdigit() and len(typed) < 10
    return int(typed) if is_number else user_path(typed)


def parse_listen(text: str, port: int | None = None, *, name: str = "--listen") -> ListenAddress:
    """Parse `host:port`, `[v6]:port` or `unix:///path`; `port` replaces the port if given.

    Raises:
        UsageError: naming the text and what it must look like.
    """
    if text.startswith("unix:"):
        path = "/" + text.removeprefix("unix:").lstrip("/")
        if not text.startswith(("unix:/",)) or path == "/":
            raise UsageError(f"{name} {text!r}: write unix:///absolute/path")
        if len(path.encode()) > limits.MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"{name} {text!r}: a socket path has at most {limits.MAX_SOCKET_PATH_BYTES} bytes"
            )
        return ListenAddress("", 0, Path(path))
    host, colon, port_text = text.removeprefix("grpc://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    digits = port_text.isascii() and port_text.isdigit() and len(port_text) <= 5
    if not (colon and host and digits and int(port_text) < 65536):
        raise UsageError(f"{name} {text!r}: write host:port (port 0: any) or unix:///path")
    if port is not None and not 0 <= port < 65536:
        raise UsageError(f"--port {port}: must be in 0..65535")
    return ListenAddress(host, int(port_text) if port is None else port)
