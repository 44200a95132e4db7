"""`shoal cluster`: nodes on a real Ray cluster give the same tokens, come back, and go away."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from support.command import assert_refused, shoal
from support.ray_machines import running_machines

pytestmark = pytest.mark.processes

RUN = ["--prompt-ids", "5,6,7", "--ignore-eos", "--max-tokens", "8", "--json"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_machines() as address:
        yield address


def status(address: str) -> dict[str, Any]:
    ended = shoal("cluster", "status", "--address", address, "--json")
    fields: dict[str, Any] = json.loads(ended.out)
    return fields


def token_ids(path: Path, *flags: str) -> list[int]:
    ended = shoal("run", path, *RUN, *flags)
    assert ended.status == 0, ended
    ids: list[int] = json.loads(ended.out)["token_ids"]
    return ids


def test_nodes_on_ray_give_the_same_tokens_come_back_and_go_away(path: Path, address: str) -> None:
    to = ("--address", address)
    up = ("cluster", "up", path, *to, "--base-port", "41051", "--insecure")
    started = shoal(*up)
    assert started.status == 0, started
    shards = started.out.decode().split()[1].strip("'")
    assert [entry.partition("=")[0] for entry in shards.split(",")] == ["0-7", "8-15"]
    alone = token_ids(path)
    assert token_ids(path, "--moe-shards", shards) == alone

    assert_refused(shoal(*up), 2, "runs already", "shoal cluster down")

    first = status(address)["nodes"][0]["pid"]
    os.kill(first, signal.SIGKILL)
    while (now := status(address))["moe_shards"] is None or now["nodes"][0]["pid"] == first:
        pass  # each look is a process of its own; a node that never comes back is a timeout
    assert now["moe_shards"] == shards
    assert token_ids(path, "--moe-shards", shards) == alone

    nodes = [psutil.Process(node["pid"]) for node in now["nodes"]]
    stopped = shoal("cluster", "down", *to)
    assert "stopped 2 nodes" in stopped.err
    _, alive = psutil.wait_procs(nodes, timeout=20)
    assert not alive
    assert_refused(shoal("cluster", "status", *to), 2, "there are no nodes named 'default'")


def test_more_nodes_than_machines_are_refused_and_leave_nothing(path: Path, address: str) -> None:
    ended = shoal("cluster", "up", path, "--address", address, "--nodes", "3")
    assert_refused(ended, 2, "no room for 3 nodes", "2 machines", "--strategy")


def test_a_node_that_cannot_start_says_why_and_leaves_nothing(path: Path, address: str) -> None:
    ended = shoal("cluster", "up", path, "--address", address, "--threads", "100000")
    assert ended.status == 4 and "--threads 100000" in ended.err, ended  # the end of its log
    assert_refused(shoal("cluster", "status", "--address", address), 2, "there are no nodes")


def test_no_ray_at_the_address_is_told(path: Path) -> None:
    ended = shoal("cluster", "status", "--address", "127.0.0.1:1")
    assert_refused(ended, 2, "no Ray cluster answers there", "ray start --head")
