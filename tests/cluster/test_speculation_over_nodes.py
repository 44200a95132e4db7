"""Speculation as somebody types it, where it pays: experts on nodes that are milliseconds away."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from client.cli import main
from support.chaos_proxy import ChaosProxy, Weather, steady
from support.cluster import Cluster
from support.fables import NUM_LAYERS, PROMPT, fables

pytestmark = pytest.mark.processes

DELAY_S = 0.002  # each way: a pass of six layers takes 24 ms and more, a plain one in process 2
WAYS = {"greedy": ("--temperature", "0"), "sampled": ("--temperature", "0.8", "--seed", "7")}


@pytest.fixture(scope="module")
def shards() -> Iterator[str]:
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster())
        parts: list[str] = []
        for experts in ("0-15", "16-31"):
            node = cluster.node(fables(), experts=experts)
            proxy = ChaosProxy(node.endpoint, steady(Weather(delay_s=DELAY_S)))
            parts.append(f"{experts}={stack.enter_context(proxy).endpoint}")
        yield ",".join(parts)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where shadows and the history of this test go."""
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    return tmp_path


def run_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    command = ["run", "fables", PROMPT, "--json", "--max-tokens", "40", "--ignore-eos", *options]
    assert main(command) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def kept(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("token_ids", "text", "logits_digest", "finish_reason")}


@pytest.mark.parametrize("way", WAYS)
def test_guesses_save_round_trips_and_change_no_bit(
    way: str, shards: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_nodes = ("--moe-shards", shards, *WAYS[way])
    off = run_json(capsys, *on_nodes, "--speculate", "off")
    assert off["speculation"]["passes"] == 39
    assert off["speculation"]["round_trips_per_token"] == NUM_LAYERS
    assert off["speculation"]["per_drafter"] == {}

    shadow = run_json(capsys, *on_nodes, "--shadow", "q4")
    assert kept(shadow) == kept(off)
    speculation = shadow["speculation"]
    assert speculation["mode"] == "auto" and set(speculation["per_drafter"]) >= {"lookup", "shadow"}
    assert speculation["per_drafter"]["shadow"]["accepted"] > 10
    assert speculation["round_trips_per_token"] < NUM_LAYERS / 1.5
    num_bytes = speculation["per_drafter"]["shadow"]["local_expert_bytes"]
    assert num_bytes == speculation["local_expert_bytes"] > 0
    assert speculation["tokens_per_pass"] == pytest.approx(39 / speculation["passes"])

    draft = run_json(capsys, *on_nodes, "--speculate", "draft", "--draft-model", "fables")
    assert kept(draft) == kept(off)
    [(name, figures)] = draft["speculation"]["per_drafter"].items()
    assert name == "draft" and figures["accepted"] == figures["drafted"] > 10


def test_what_was_once_said_is_looked_up_where_the_user_wants_it(
    shards: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_nodes = ("--moe-shards", shards, "--temperature", "0")
    first = run_json(capsys, *on_nodes, "--history")
    again = run_json(capsys, *on_nodes, "--history")
    without = run_json(capsys, *on_nodes)
    assert kept(first) == kept(again) == kept(without)
    assert again["speculation"]["per_drafter"]["lookup"]["accepted"] > 10
    assert again["speculation"]["passes"] < without["speculation"]["passes"]


def test_the_figures_say_what_guessing_brought(
    shards: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "fables", PROMPT, "--max-tokens", "30", "--ignore-eos", "--shadow", "q4"]
    assert main([*command, "--temperature", "0", "--moe-shards", shards]) == 0
    err = capsys.readouterr().err
    assert "making the q4 shadow of fables" in err
    assert "tokens per pass" in err and "guesses right" in err and "MB of experts here" in err
