"""NodeConfig: what `shoal node` was told, validated in one place, and where it listens."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from shoal import limits
from shoal.errors import UsageError
from shoal.transport import Transport


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

    def endpoint(self, port: int) -> str:
        """Return it as --moe-shards writes it, with the port that was bound."""
        return (
            f"unix://{self.socket_path}" if self.socket_path else f"grpc://{self._host_text}:{port}"
        )

    @property
    def _host_text(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything a node needs to start. experts, layers: spans as typed; None: all there are."""

    model: Path
    listen: ListenAddress
    experts: str | None = None
    layers: str | None = None
    warmup: bool = False
    threads: int | None = None  # None: as many as this process may use
    insecure: bool = False
    drain_timeout_s: float = limits.DRAIN_TIMEOUT_S
    transport: Transport = Transport.AUTO
    leave_with_stdin: bool = False  # drain when it closes: with the process that started this one
    log_calls: bool = False  # a debug line for every call that was answered

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= limits.MAX_THREADS:
            raise UsageError(f"--threads {self.threads}: must be in 1..{limits.MAX_THREADS}")
        if not (self.listen.is_local or self.insecure):
            raise UsageError(
                f"--listen {self.listen.grpc_target} is reachable from other machines, and this "
                "version has neither TLS nor tokens: anybody there could use the node. Listen on "
                "127.0.0.1 or unix:///path behind a tunnel, or say --insecure on a private network"
            )


def parse_listen(text: str, port: int | None = None) -> ListenAddress:
    """Parse `host:port`, `[v6]:port` or `unix:///path`; `port` replaces the port if given.

    Raises:
        UsageError: naming the text and what it must look like.
    """
    if text.startswith("unix:"):
        path = "/" + text.removeprefix("unix:").lstrip("/")
        if not text.startswith(("unix:/",)) or path == "/":
            raise UsageError(f"--listen {text!r}: write unix:///absolute/path")
        if len(path.encode()) > limits.MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"--listen {text!r}: a socket path has at most {limits.MAX_SOCKET_PATH_BYTES} bytes"
            )
        return ListenAddress("", 0, Path(path))
    host, colon, port_text = text.removeprefix("grpc://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    digits = port_text.isascii() and port_text.isdigit() and len(port_text) <= 5
    if not (colon and host and digits and int(port_text) < 65536):
        raise UsageError(f"--listen {text!r}: write host:port (port 0: any) or unix:///path")
    if port is not None and not 0 <= port < 65536:
        raise UsageError(f"--port {port}: must be in 0..65535")
    return ListenAddress(host, int(port_text) if port is None else port)
