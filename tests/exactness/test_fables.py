"""The shipped model: intact, the story that its identity stands for, the same bits on nodes."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.artifact import Artifact
from support.cluster import Cluster
from support.command import shoal
from support.fables import PROMPT, fables

GOLDEN = Path(__file__).resolve().parents[1] / "goldens" / "fables.json"
GREEDY = ("--temperature", "0")
SAMPLED = ("--seed", "7")  # temperature and the rest are the model's own
SPLITS = {
    "two nodes": ("0-15", "16-31"),
    "three uneven nodes": ("0", "1-20", "21-31"),
}


def tell(*arguments: str) -> dict[str, Any]:
    """Return what `shoal run` reports and no topology may change."""
    ended = shoal("run", PROMPT, "--json", "--max-tokens", "120", *arguments)
    assert ended.status == 0, ended.err
    report: dict[str, Any] = json.loads(ended.out)
    kept = ("prompt_ids", "token_ids", "text", "logits_digest", "finish_reason", "identity")
    return {key: report[key] for key in kept}


@pytest.mark.processes
def test_it_is_intact() -> None:
    ended = shoal("verify", "fables")
    assert ended.status == 0, ended.err


@pytest.mark.processes
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_its_story_is_the_recorded_one(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["identity"] == Artifact.open(fables()).identity, "another model: record it anew"
    told = tell(*(SAMPLED if name == "sampled" else GREEDY))
    assert told == golden[name] | {"identity": golden["identity"]}


@pytest.mark.processes
@pytest.mark.parametrize("split", SPLITS)
def test_nodes_tell_the_same_story_bit_for_bit(split: str) -> None:
    with Cluster() as cluster:
        shards = ",".join(
            f"{experts}={cluster.node(fables(), experts=experts).endpoint}"
            for experts in SPLITS[split]
        )
        for way in (GREEDY, SAMPLED):
            assert tell("--moe-shards", shards, *way) == tell(*way)
