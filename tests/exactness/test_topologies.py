"""The promise of the project: `shoal run` says the same bits wherever its experts are.

Real processes on real weights. Every way of serving one prompt, greedy and sampled, prints the same
token ids, and hashes the same logits bit for bit, as one process on one thread.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.shards import moe_shards
from shoal import ops
from support.cluster import Cluster, Flags
from support.command import end_of, running_shoal

pytestmark = [pytest.mark.processes, pytest.mark.weights]

# 43 tokens of prompt: several chunks of 7, and more rows than any kernel's tile.
PROMPT = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid."
    " In the year 1789 the people of Paris, tired of hunger and of kings,"
)
GREEDY = ("--max-tokens", "12")
SAMPLED = (*GREEDY, "--temperature", "0.9", "--top-p", "0.95", "--seed", "7")
FAST_ISAS = [isa for isa in ops.available_isas() if isa != "scalar"]


Answer = dict[str, Any]


def run_json(model: Path, *arguments: str, isa: str | None = None) -> Answer:
    """Run `shoal run MODEL PROMPT --json` and return what must not depend on how it is served."""
    return run_side_by_side(model, [arguments], isa)[0]


def run_side_by_side(
    model: Path, runs: Sequence[tuple[str, ...]], isa: str | None = None
) -> list[Answer]:
    """Do what `run_json` does, for several runs at the same time: they take less of it."""
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        for arguments in runs:
            prompt = () if "--prompt-ids" in arguments else (PROMPT,)
            flags = ("--json", "--top-logprobs", "4", *arguments)
            env = {} if isa is None else {"SHOAL_ISA": isa}
            processes.append(
                stack.enter_context(running_shoal("run", model, *prompt, *flags, env=env))
            )
        return [_answer(process) for process in processes]


def _answer(process: "subprocess.Popen[bytes]") -> Answer:
    ended = end_of(process)
    assert ended.status == 0, ended
    report: Answer = json.loads(ended.out)
    kept = ("prompt_ids", "token_ids", "text", "logprobs", "logits_digest", "finish_reason")
    return {key: report[key] for key in (*kept, "identity", "numerics")}


@pytest.fixture(scope="module")
def alone(smollm2: Path) -> dict[tuple[str, ...], Answer]:
    """What one thread of one process says, greedy and sampled."""
    ways = (GREEDY, SAMPLED)
    runs = [("--threads", "1", *way) for way in ways]
    greedy, sampled = run_side_by_side(smollm2, runs)
    assert greedy["token_ids"] != sampled["token_ids"], "sampling changes nothing: a blunt test"
    assert len(greedy["logprobs"]) == len(greedy["token_ids"]) == 12
    return dict(zip(ways, (greedy, sampled), strict=True))


@dataclass(frozen=True)
class Topology:
    """ranges: experts of each node; none: in process."""

    ranges: Sequence[str]
    is_unix: bool = False
    isas: Sequence[str | None] = (None,)
    arguments: Sequence[str] = field(default=("--threads", "2"))

    def shards(self, cluster: Cluster, model: Path) -> str:
        """Start the nodes; return the value of --moe-shards."""
        isas = itertools.cycle(self.isas)
        flags: list[Flags] = [
            {"experts": experts, "is_unix": self.is_unix, "isa": isa}
            for experts, isa in zip(self.ranges, isas, strict=False)
        ]
        nodes = cluster.nodes(model, flags) if flags else []
        return moe_shards(self.ranges, [node.endpoint for node in nodes])


TOPOLOGIES = {
    "in process, two threads": Topology([]),
    "in process, prefill in chunks of 1": Topology([], arguments=("--prefill-chunk", "1")),
    "in process, prefill in chunks of 7": Topology([], arguments=("--prefill-chunk", "7")),
    "one node over TCP": Topology(["0-15"]),
    "two nodes over TCP": Topology(["0-7", "8-15"]),
    "two uneven nodes over unix sockets": Topology(["0-2", "3-15"], is_unix=True),
    "three uneven nodes": Topology(["0", "1-10", "11-15"]),
    "two nodes, prefill in chunks of 7": Topology(
        ["0-4", "5-15"], arguments=("--prefill-chunk", "7", "--threads", "1")
    ),
    "nodes of mixed instruction sets": Topology(
        ["0-3", "4-7", "8-15"], isas=["scalar", *FAST_ISAS]
    ),
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_says_the_same_bits(
    name: str,
    cluster: Cluster,
    smollm2: Path,
    alone: dict[tuple[str, ...], Answer],
) -> None:
    topology = TOPOLOGIES[name]
    shards = topology.shards(cluster, smollm2)
    where = ("--moe-shards", shards) if shards else ()
    runs = [(*where, *topology.arguments, *way) for way in alone]
    assert run_side_by_side(smollm2, runs) == list(alone.values())


@pytest.mark.parametrize("isa", FAST_ISAS)
def test_every_instruction_set_of_the_coordinator_says_the_same_bits(
    isa: str, smollm2: Path, alone: dict[tuple[str, ...], Answer]
) -> None:
    assert run_json(smollm2, *SAMPLED, isa=isa) == alone[SAMPLED]


def test_the_scalar_kernels_say_the_same_bits(smollm2: Path) -> None:
    """Scalar code is some hundred times slower: fewer tokens, against as few of the fast ones."""
    few = ("--prompt-ids", "504,3575,282,4649,314", "--max-tokens", "2", "--ignore-eos")
    fast, scalar = run_json(smollm2, *few), run_json(smollm2, *few, isa="scalar")
    assert scalar == fast


def test_slices_say_the_same_bits_as_the_whole(
    cluster: Cluster,
    smollm2: Path,
    tmp_path: Path,
    alone: dict[tuple[str, ...], Answer],
) -> None:
    def cut(name: str, *arguments: str) -> Path:
        out = tmp_path / f"{name}.shoal"
        command = [sys.executable, "-P", "-m", "client", "slice", str(smollm2), str(out)]
        subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=120)
        return out

    front = cut("front", "--preset", "coordinator")
    low = cut("low", "--preset", "expert-node", "--experts", "0-5")
    high = cut("high", "--preset", "expert-node", "--experts", "6-15")
    nodes = {"0-5": cluster.node(low), "6-15": cluster.node(high)}
    shards = ",".join(f"{experts}={node.endpoint}" for experts, node in nodes.items())
    assert run_json(front, "--moe-shards", shards, *SAMPLED) == alone[SAMPLED]
