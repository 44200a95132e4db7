"""Speculation as somebody types it, where it pays: experts on nodes that are milliseconds away."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from client.cli import main
from support.chaos_proxy import ChaosProxy, Weather, steady
from support.cluster import Cluster
from support.command import run_json
from support.fables import NUM_LAYERS, PROMPT, fables

pytestmark = pytest.mark.processes

DELAY_S = 0.002  # each way: a pass of six layers takes 24 ms and more, a plain one in process 2
FAR_S = 0.02  # each way: a pass takes 240 ms, one call for all layers 40
HALVES = ("0-15", "16-31")
WAYS = {"greedy": ("--temperature", "0"), "sampled": ("--temperature", "0.8", "--seed", "7")}


@pytest.fixture(scope="module")
def proxies() -> Iterator[list[ChaosProxy]]:
    """One before each of two nodes, with half of the experts each."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster())
        nodes = [cluster.node(fables(), experts=experts) for experts in HALVES]
        near = steady(Weather(delay_s=DELAY_S))
        yield [stack.enter_context(ChaosProxy(node.endpoint, near)) for node in nodes]


@pytest.fixture(scope="module")
def shards(proxies: list[ChaosProxy]) -> str:
    return ",".join(
        f"{experts}={proxy.endpoint}" for experts, proxy in zip(HALVES, proxies, strict=True)
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where shadows and the history of this test go."""
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    return tmp_path


def run_fables(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    return run_json(capsys, "fables", PROMPT, "--max-tokens", "40", "--ignore-eos", *options)


def kept(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("token_ids", "text", "logits_digest", "finish_reason")}


@pytest.mark.parametrize("way", WAYS)
def test_guesses_save_round_trips_and_change_no_bit(
    way: str, shards: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_nodes = ("--moe-shards", shards, *WAYS[way])
    off = run_fables(capsys, *on_nodes, "--speculate", "off")
    assert off["speculation"]["passes"] == 39
    assert off["speculation"]["round_trips_per_token"] == NUM_LAYERS
    assert off["speculation"]["per_drafter"] == {}

    shadow = run_fables(capsys, *on_nodes, "--shadow", "q4")
    assert kept(shadow) == kept(off)
    speculation = shadow["speculation"]
    assert speculation["mode"] == "auto" and set(speculation["per_drafter"]) >= {"lookup", "shadow"}
    assert speculation["per_drafter"]["shadow"]["accepted"] > 10
    assert speculation["round_trips_per_token"] < NUM_LAYERS / 1.5
    num_bytes = speculation["per_drafter"]["shadow"]["local_expert_bytes"]
    assert num_bytes == speculation["local_expert_bytes"] > 0
    assert speculation["tokens_per_pass"] == pytest.approx(39 / speculation["passes"])

    draft = run_fables(capsys, *on_nodes, "--speculate", "draft", "--draft-model", "fables")
    assert kept(draft) == kept(off)
    [(name, figures)] = draft["speculation"]["per_drafter"].items()
    assert name == "draft" and figures["accepted"] == figures["drafted"] > 10


@pytest.mark.parametrize("way", WAYS)
def test_the_corrected_pass_guesses_where_that_is_asked_for(
    way: str,
    proxies: list[ChaosProxy],
    shards: str,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    off = run_fables(capsys, *WAYS[way], "--speculate", "off")
    forecasts = [proxy.forecast for proxy in proxies]
    try:
        for proxy in proxies:
            proxy.forecast = steady(Weather(delay_s=FAR_S))
        asked = ("--speculate", "batch", "--shadow", "q4")
        batch = run_fables(capsys, "--moe-shards", shards, *WAYS[way], *asked)
    finally:
        for proxy, forecast in zip(proxies, forecasts, strict=True):
            proxy.forecast = forecast
    assert kept(batch) == kept(off)
    speculation = batch["speculation"]
    [(name, figures)] = speculation["per_drafter"].items()
    assert name == "batch" and figures["accepted"] > 10
    assert figures["local_expert_bytes"] == speculation["local_expert_bytes"] > 0
    assert 0 < figures["round_trips"] < NUM_LAYERS * speculation["passes"]
    of_passes = NUM_LAYERS * speculation["passes"]
    assert speculation["round_trips_per_token"] == pytest.approx(
        (of_passes + figures["round_trips"]) / 39
    )


def test_what_was_once_said_is_looked_up_where_the_user_wants_it(
    shards: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_nodes = ("--moe-shards", shards, "--temperature", "0")
    first = run_fables(capsys, *on_nodes, "--history")
    again = run_fables(capsys, *on_nodes, "--history")
    without = run_fables(capsys, *on_nodes)
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
