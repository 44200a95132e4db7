"""The shipped model: intact, the story that its identity stands for, the same bits on nodes."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.shards import moe_shards
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


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, ...], dict[str, Any]]:
    """What one process tells."""
    return {way: tell(*way) for way in (GREEDY, SAMPLED)}


@pytest.mark.processes
@pytest.mark.parametrize(("name", "way"), [("greedy", GREEDY), ("sampled", SAMPLED)])
def test_its_story_is_the_recorded_one(
    name: str, way: tuple[str, ...], alone: dict[tuple[str, ...], dict[str, Any]]
) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["identity"] == Artifact.open(fables()).identity, "another model: record it anew"
    assert alone[way] == golden[name] | {"identity": golden["identity"]}


@pytest.mark.processes
@pytest.mark.parametrize("split", SPLITS)
def test_nodes_tell_the_same_story_bit_for_bit(
    split: str, alone: dict[tuple[str, ...], dict[str, Any]]
) -> None:
    with Cluster() as cluster:
        ranges = SPLITS[split]
        nodes = cluster.nodes(fables(), [{"experts": experts} for experts in ranges])
        shards = moe_shards(ranges, [node.endpoint for node in nodes])
        for way, story in alone.items():
            assert tell("--moe-shards", shards, *way) == story
