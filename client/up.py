"""`shoal up`: expert nodes on this machine as child processes, and the map that names them."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from client.examine import usable_cpus
from client.node_process import NodeProcess, stop_all
from client.shards import even_ranges, moe_shards, num_experts
from shoal.errors import NodeError, UsageError

WATCH_INTERVAL_S = 0.05
COMMAND_STOP_TIMEOUT_S = 10.0  # for the command after SIGTERM; then it is killed
MAX_NODES = 64
LOCAL_HOST = "127.0.0.1"
PLACEHOLDER = "{moe_shards}"


@dataclass(frozen=True, slots=True)
class UpConfig:
    """What the command line says; checked here, once.

    threads: of each node; None: the machine's cores, divided. base_port: of the first node; None:
    any free ports. socket_dir: Unix sockets instead. command: run it, then stop; empty: run until
    told to stop.
    """

    model: Path
    num_nodes: int
    threads: int | None
    base_port: int | None
    socket_dir: Path | None
    ready_timeout_s: float
    command: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= MAX_NODES:
            raise UsageError(f"--nodes {self.num_nodes}: must be in 1..{MAX_NODES}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: must be at least 1")
        if self.base_port is not None and self.socket_dir is not None:
            raise UsageError("--base-port and --socket-dir exclude each other: choose one")
        if self.base_port is not None and not 1 <= self.base_port <= 65536 - self.num_nodes:
            raise UsageError(
                f"--base-port {self.base_port}: must be in 1..{65536 - self.num_nodes} "
                f"for {self.num_nodes} nodes"
            )

    def listen(self, node: int) -> str:
        """Return where node number `node` listens."""
        if self.socket_dir is not None:
            return f"unix://{self.socket_dir / f'node-{node}.sock'}"
        port = 0 if self.base_port is None else self.base_port + node
        return f"{LOCAL_HOST}:{port}"


def up(
    model: Annotated[str, typer.Argument(help="name or path of an artifact", show_default=False)],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            help="after --: run this once the nodes are ready, with {moe_shards} replaced, then "
            "stop; its exit status is ours",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="how many; each gets an even range of experts")] = 2,
    threads: Annotated[
        int | None,
        typer.Option(help="of each node; default: the cores, divided", show_default=False),
    ] = None,
    base_port: Annotated[
        int | None,
        typer.Option(
            help="of the first node, then upwards; default: free ones", show_default=False
        ),
    ] = None,
    socket_dir: Annotated[
        Path | None,
        typer.Option(help="listen on Unix sockets in this folder instead", show_default=False),
    ] = None,
    ready_timeout: Annotated[float, typer.Option(help="seconds for the nodes to warm up")] = 600.0,
) -> None:
    """Start expert nodes on this machine and print the --moe-shards that names them.

    Stops them all on Ctrl-C, on SIGTERM, or as soon as one of them dies.
    """
    from shoal.paths import resolve_model

    config = UpConfig(
        resolve_model(model),
        nodes,
        threads,
        base_port,
        socket_dir.resolve() if socket_dir is not None else None,
        ready_timeout,
        tuple(command or ()),
    )
    raise typer.Exit(run_up(config, model))


def run_up(config: UpConfig, typed_model: str) -> int:
    """Start, serve, stop; return the exit status.

    Raises:
        UsageError, ArtifactError: the model or a flag is wrong. NodeError: a node failed.
    """
    ranges = even_ranges(num_experts(config.model), config.num_nodes)
    if config.socket_dir is not None:
        config.socket_dir.mkdir(parents=True, exist_ok=True)
    log_folder = Path(tempfile.mkdtemp(prefix="shoal-up-"))
    try:
        status = _serve(config, typed_model, ranges, log_folder)
    except NodeError:
        raise  # its message names the logs
    except BaseException:
        shutil.rmtree(log_folder)
        raise
    shutil.rmtree(log_folder)
    return status


def _serve(config: UpConfig, typed_model: str, ranges: Sequence[str], log_folder: Path) -> int:
    with _stop_requested() as stopping, _running(config, ranges, log_folder) as nodes:
        for node in nodes:
            if not node.wait_ready(config.ready_timeout_s, stopping.is_set):
                return 0
        shards = moe_shards(ranges, [node.endpoint for node in nodes])
        _announce(typed_model, shards, ranges, nodes)
        if config.command:
            return _run_command(config.command, shards, nodes, stopping)
        _watch(nodes, stopping)
    return 0


@contextmanager
def _running(
    config: UpConfig, ranges: Sequence[str], log_folder: Path
) -> Iterator[list[NodeProcess]]:
    threads = config.threads or max(1, usable_cpus() // config.num_nodes)
    nodes: list[NodeProcess] = []
    try:
        for index, experts in enumerate(ranges):
            arguments = [str(config.model), "--experts", experts, "--warmup"]
            arguments += ["--listen", config.listen(index), "--threads", str(threads)]
            log_path = log_folder / f"node-{index}.log"
            nodes.append(NodeProcess(f"node {index} (experts {experts})", arguments, log_path))
        yield nodes
    finally:
        stop_all(nodes)


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """Turn SIGINT, SIGTERM and SIGHUP (the terminal is gone) into an event while the block runs."""
    stopping = threading.Event()

    def request(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {
        number: signal.signal(number, request)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN  # as nohup asks
    }
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _announce(
    typed_model: str, shards: str, ranges: Sequence[str], nodes: Sequence[NodeProcess]
) -> None:
    lines = [
        f"{node.endpoint}  experts {experts}  pid {node.pid}  log {node.log_path}"
        for node, experts in zip(nodes, ranges, strict=True)
    ]
    prompt = shlex.join(
        ["shoal", "run", typed_model, "The capital of France is", "--moe-shards", shards]
    )
    typer.echo("\n".join(lines), err=True)
    typer.echo(f"--moe-shards {shlex.quote(shards)}")
    typer.echo(f"\nTry:\n  {prompt}\n\nCtrl-C stops the nodes.", err=True)


def _watch(nodes: Sequence[NodeProcess], stopping: threading.Event) -> None:
    while not stopping.wait(WATCH_INTERVAL_S):
        _raise_for_dead(nodes)


def _raise_for_dead(nodes: Sequence[NodeProcess]) -> None:
    for node in nodes:
        if node.exit_status is not None:
            raise NodeError(f"{node.describe_exit()}\nthe other nodes are stopped as well")


def _run_command(
    command: Sequence[str],
    shards: str,
    nodes: Sequence[NodeProcess],
    stopping: threading.Event,
) -> int:
    filled = [word.replace(PLACEHOLDER, shards) for word in command]
    try:
        process = subprocess.Popen(filled, env={**os.environ, "SHOAL_MOE_SHARDS": shards})
    except OSError as error:
        raise UsageError(f"cannot run {filled[0]!r}: {error.strerror}") from error
    try:
        while (status := process.poll()) is None:
            if stopping.wait(WATCH_INTERVAL_S):
                process.terminate()
                status = process.wait(COMMAND_STOP_TIMEOUT_S)
                break
            _raise_for_dead(nodes)
        return status if status >= 0 else 128 - status  # as a shell reports a signal
    except subprocess.TimeoutExpired:
        return 128 + signal.SIGKILL
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
