"""`shoal top` on a node that serves, one that is gone and one that never was."""

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("textual", reason="the extra [tui] is not installed")

from textual.widgets import DataTable, Label, Sparkline

from client.top.scrape import watch
from client.top.screen import TopApp
from support.cluster import Cluster, kill
from support.command import shoal

pytestmark = pytest.mark.processes

INTERVAL_S = 0.1
NOBODY = "127.0.0.1:1"


def test_one_look_is_a_table_or_json_and_the_status_tells_who_is_silent(path: Path) -> None:
    with Cluster() as cluster:
        node = cluster.node(path, extra=("--metrics-listen", "127.0.0.1:0"))
        url = str(node.ready["metrics"])
        looked = shoal("top", url, "--json", "--interval", "0.1")
        figures = json.loads(looked.out)[url.split("/")[2]]
        table = shoal("top", url, NOBODY, "--once", "--interval", "0.1")
    assert looked.status == 0, looked
    assert (figures["state"], figures["model"]) == ("serving", "tiny")
    assert figures["num_owned"] == node.ready["num_experts"]
    assert figures["calls_per_s"] == 0.0
    assert table.status == 4 and "no answer from 127.0.0.1:1 (Connection refused)" in table.err
    assert "serving" in table.out.decode() and "chunk p99 ms" in table.out.decode()


def test_the_screen_follows_nodes_that_come_and_go(path: Path) -> None:
    async def follow() -> None:
        with Cluster() as cluster:
            node = cluster.node(path, extra=("--metrics-listen", "127.0.0.1:0"))
            app = TopApp(watch([str(node.ready["metrics"]), NOBODY]), INTERVAL_S)
            async with app.run_test(size=(200, 30)) as pilot:
                table = app.query_one(DataTable)

                async def until(row: int, words: str) -> None:
                    while words not in str(table.get_row_at(row)):
                        await pilot.pause(INTERVAL_S)

                await until(0, "serving")
                await until(1, "no answer: Connection refused")
                assert "tiny" in str(app.query_one("#whose", Label).content)
                assert app.query_one("#calls", Sparkline).data
                kill(node)
                await until(0, "no answer")
                await pilot.press("down", "space")
                assert app.sub_title == "paused"
                assert "127.0.0.1:1" in str(app.query_one("#whose", Label).content)
                await pilot.press("q")

    asyncio.run(asyncio.wait_for(follow(), 120))
