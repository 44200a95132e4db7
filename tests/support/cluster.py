"""Real `shoal node` processes for tests: started, waited for by their ready line, always ended.

with Cluster() as cluster:
    node = cluster.node(artifact, experts="0-7")     # returns once it serves
    ... f"0-7={node.endpoint},8-15=local" ...
    freeze(node); kill(node)
"""

import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from client.node_process import NodeProcess, stop_all
from shoal.transport import Transport

READY_TIMEOUT_S = 60.0  # a busy machine; a node that fails ends the wait at once


class Cluster:
    """Nodes of one test. Leaving the `with` block ends them, whatever state they are in."""

    def __init__(self, transport: Transport = Transport.AUTO) -> None:
        self._transport = transport
        # Not pytest's folder: the path of a Unix socket has at most 103 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="shoal-"))
        self._nodes: list[NodeProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for node in self._nodes:
            if node.exit_status is None:
                node.send(signal.SIGCONT)
        stop_all(self._nodes)
        shutil.rmtree(self.folder)

    def node(
        self,
        model: Path,
        *,
        experts: str | None = None,
        layers: str | None = None,
        is_unix: bool = False,
        listen: str | None = None,
        isa: str | None = None,
        threads: int = 1,
        is_warm: bool = True,
        extra: tuple[str, ...] = (),
    ) -> NodeProcess:
        """Start a node and return it once it serves; `node.endpoint` is what a map takes.

        Args:
            isa: what SHOAL_ISA forces its kernels to; None: the best this machine has.
            listen: None: a free port of 127.0.0.1, or with is_unix a new socket.
            is_warm: whether it reads what it owns before it serves.
        """
        number = len(self._nodes)
        if listen is None:
            socket_path = self.folder / f"{number}.sock"
            listen = f"unix://{socket_path}" if is_unix else "127.0.0.1:0"
        arguments = [str(model), "--listen", listen, "--threads", str(threads)]
        arguments += ["--warmup"] if is_warm else []
        arguments += ["--experts", experts] if experts is not None else []
        arguments += ["--layers", layers] if layers is not None else []
        arguments += ["--transport", self._transport]
        environment = {} if isa is None else {"SHOAL_ISA": isa}
        node = NodeProcess(
            f"test node {number}",
            [*arguments, *extra],
            self.folder / f"{number}.log",
            environment,
        )
        self._nodes.append(node)
        node.wait_ready(READY_TIMEOUT_S)
        return node


def freeze(node: NodeProcess) -> None:
    """Stop a node in its tracks (SIGSTOP); returns once it has stopped."""
    node.send(signal.SIGSTOP)
    os.waitpid(node.pid, os.WUNTRACED)


def thaw(node: NodeProcess) -> None:
    """Let a frozen node go on."""
    node.send(signal.SIGCONT)


def kill(node: NodeProcess) -> None:
    """End a node without a word (SIGKILL); returns once it is gone."""
    node.send(signal.SIGKILL)
    node.wait()
