"""`shoal up`: nodes for a command or until told to stop, and nothing left of them afterwards."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from client.shards import even_ranges
from client.up import PLACEHOLDER
from shoal.errors import UsageError

UP = [sys.executable, "-m", "client.cli", "up"]
TIMEOUT_S = 120


def run_up(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*UP, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def start_up(*arguments: str) -> "tuple[subprocess.Popen[str], str]":
    """Start it and return it with the --moe-shards line that it printed once it was ready."""
    process = subprocess.Popen(
        [*UP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


@pytest.mark.parametrize(
    ("num_experts", "num_nodes", "ranges"),
    [
        (16, 1, ["0-15"]),
        (16, 2, ["0-7", "8-15"]),
        (16, 3, ["0-4", "5-9", "10-15"]),
        (3, 3, ["0", "1", "2"]),
    ],
)
def test_ranges_are_even_and_cover_every_expert(
    num_experts: int, num_nodes: int, ranges: list[str]
) -> None:
    assert even_ranges(num_experts, num_nodes) == ranges


def test_more_nodes_than_experts_are_refused() -> None:
    with pytest.raises(UsageError, match="the model has 4 experts"):
        even_ranges(4, 5)


@pytest.mark.processes
def test_a_command_runs_with_the_map_and_its_status_is_ours(path: Path) -> None:
    script = "import sys; print(sys.argv[1]); sys.exit(7)"
    done = run_up(str(path), "--nodes", "3", "--", sys.executable, "-c", script, PLACEHOLDER)
    assert done.returncode == 7, done.stderr
    announced, told = done.stdout.splitlines()
    assert announced.removeprefix("--moe-shards ") == told
    assert [entry.partition("=")[0] for entry in told.split(",")] == ["0-4", "5-9", "10-15"]
    assert all("=grpc://127.0.0.1:" in entry for entry in told.split(","))


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_every_node(path: Path, number: signal.Signals, tmp_path: Path) -> None:
    sockets = Path(os.path.relpath(tmp_path)) / "s"
    process, line = start_up(str(path), "--nodes", "2", "--socket-dir", str(sockets))
    nodes = psutil.Process(process.pid).children()
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    assert line.startswith("--moe-shards 0-7=unix:///"), line
    assert "shoal run" in errors and "The capital of France is" in errors
    assert len(nodes) == 2 and not any(node.is_running() for node in nodes)


@pytest.mark.processes
def test_a_signal_stops_the_command_and_every_node(path: Path) -> None:
    script = "import time; print('started', flush=True); time.sleep(1000)"
    process, _ = start_up(str(path), "--", sys.executable, "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert len(children) == 3 and not any(child.is_running() for child in children)


@pytest.mark.processes
def test_a_dead_node_is_reported_and_ends_the_others(path: Path) -> None:
    process, line = start_up(str(path), "--nodes", "2")
    assert line.startswith("--moe-shards 0-7=grpc://"), line
    nodes = psutil.Process(process.pid).children()
    nodes[1].kill()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 4, errors
    assert "experts 8-15) was ended by SIGKILL" in errors or "experts 0-7) was ended" in errors
    assert not any(node.is_running() for node in nodes)


@pytest.mark.processes
def test_a_node_that_cannot_start_says_why(path: Path) -> None:
    done = run_up(str(path), "--nodes", "2", "--threads", "100000")
    assert done.returncode == 4
    assert "node 0 (experts 0-7) exited (2)" in done.stderr
    assert "--threads 100000" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "0"], "--nodes 0: must be in 1..64"),
        (["--nodes", "17"], "the model has 16 experts"),
        (["--base-port", "65535"], "--base-port 65535: must be in 1..65534"),
        (["--base-port", "5000", "--socket-dir", "/tmp/x"], "exclude each other"),
        (["--", "no-such-command-anywhere"], "cannot run 'no-such-command-anywhere'"),
    ],
)
@pytest.mark.processes
def test_wrong_flags_are_refused(path: Path, flags: list[str], words: str) -> None:
    done = run_up(str(path), *flags)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


@pytest.mark.processes
def test_nodes_leave_when_what_started_them_is_killed(path: Path) -> None:
    process, line = start_up(str(path), "--nodes", "2")
    assert line.startswith("--moe-shards 0-7=grpc://"), line
    nodes = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    _, alive = psutil.wait_procs(nodes, timeout=TIMEOUT_S)
    assert len(nodes) == 2 and not alive
