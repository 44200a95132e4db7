"""Real `shoal node` processes for tests: started, waited for by their ready line, always ended.

with Cluster() as cluster:
    node = cluster.node(artifact, experts="0-7")     # returns once it serves
    a, b = cluster.nodes(artifact)                   # two of them, started side by side
    ... f"0-7={node.endpoint},8-15=local" ...
    freeze(node); kill(node)
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypedDict, Unpack

from client.node_process import NodeProcess, stop_all
from shoal.transport import Transport

READY_TIMEOUT_S = 60.0  # a busy machine; a node that fails ends the wait at once


class Flags(TypedDict, total=False):
    """How a node of a test is started.

    listen: default: a free port of 127.0.0.1, or with is_unix a new socket.
    isa: what SHOAL_ISA forces its kernels to; default: the best this machine has.
    is_warm: whether it reads what it owns before it serves; default: it does.
    """

    experts: str | None
    layers: str | None
    is_unix: bool
    listen: str | None
    isa: str | None
    threads: int
    is_warm: bool
    extra: tuple[str, ...]


class Cluster:
    """Nodes of one test. Leaving the `with` block ends them, whatever state they are in."""

    def __init__(self, transport: Transport = Transport.AUTO) -> None:
        self._transport = transport
        # Not pytest's folder: the path of a Unix socket has at most 103 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="shoal-"))
        self._nodes: list[NodeProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            if node.exit_status is None:
                node.send(signal.SIGCONT)
        stop_all(self._nodes)
        shutil.rmtree(self.folder)

    def node(self, model: Path, **flags: Unpack[Flags]) -> NodeProcess:
        """Start a node and return it once it serves; `node.endpoint` is what a map takes."""
        node = self._start(model, **flags)
        node.wait_ready(READY_TIMEOUT_S)
        return node

    def nodes(
        self, model: Path, each: Sequence[Flags] = ({}, {}), **common: Unpack[Flags]
    ) -> list[NodeProcess]:
        """Start nodes side by side, which takes less time; return them once all serve."""
        nodes = [self._start(model, **(common | flags)) for flags in each]
        for node in nodes:
            node.wait_ready(READY_TIMEOUT_S)
        return nodes

    def _start(self, model: Path, **flags: Unpack[Flags]) -> NodeProcess:
        number = len(self._nodes)
        listen = flags.get("listen")
        if listen is None:
            socket_path = self.folder / f"{number}.sock"
            listen = f"unix://{socket_path}" if flags.get("is_unix") else "127.0.0.1:0"
        arguments = [str(model), "--listen", listen, "--threads", str(flags.get("threads", 1))]
        arguments += ["--warmup"] if flags.get("is_warm", True) else []
        experts, layers, isa = flags.get("experts"), flags.get("layers"), flags.get("isa")
        arguments += ["--experts", experts] if experts is not None else []
        arguments += ["--layers", layers] if layers is not None else []
        arguments += ["--transport", self._transport, *flags.get("extra", ())]
        node = NodeProcess(
            f"test node {number}",
            arguments,
            self.folder / f"{number}.log",
            {} if isa is None else {"SHOAL_ISA": isa},
        )
        self._nodes.append(node)
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
