"""`shoal run` when its nodes fail: what the user sees, and the exit status."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.node_process import NodeProcess
from support.chaos_proxy import FAIR, ChaosProxy, Weather, steady
from support.cluster import Cluster, freeze, kill
from support.command import shoal
from support.tiny_model import make_tiny_artifact

pytestmark = pytest.mark.processes

TIMEOUT_S = 120
PROMPT = ["--prompt-ids", "5,6,7", "--ignore-eos", "--seed", "1", "--temperature", "1"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(
        tmp_path_factory.mktemp("model"), "qwen3_moe", "q8_0", max_position_embeddings=100_000
    )


@contextmanager
def running(path: Path, shards: str, *flags: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-P", "-m", "client", "run", str(path), *PROMPT]
    process = subprocess.Popen(
        [*command, "--moe-shards", shards, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    """Wait for its end; return its exit status and stderr in one line."""
    _, stderr = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, " ".join(stderr.decode().split())


@contextmanager
def answering(path: Path, *flags: str) -> Iterator[tuple["subprocess.Popen[bytes]", NodeProcess]]:
    """A run that has printed its first text and has a very long way to go, and one of its nodes."""
    with Cluster() as cluster:
        a, b = cluster.nodes(path)
        shards = f"0-7={a.endpoint},8-15={b.endpoint}"
        with running(path, shards, "--max-tokens", "90000", *flags) as process:
            assert process.stdout is not None
            assert process.stdout.read(1)
            yield process, b


@pytest.mark.parametrize("end", [kill, freeze])
def test_a_range_without_a_node_ends_the_run_after_the_shard_wait(
    path: Path, end: Callable[[NodeProcess], None]
) -> None:
    """The error names the range, its node, and how long it was waited for."""
    with answering(path, "--shard-wait", "0.5") as (process, node):
        end(node)
        status, stderr = ended(process)
    assert status == 4
    assert "no node is left for experts 8-15 of layers 0-2 (waited 0.5 s: --shard-wait)" in stderr
    assert f"node {node.endpoint}" in stderr
    assert "Traceback" not in stderr


def test_a_node_down_at_start_and_a_wrong_map_are_told_apart(path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"grpc://127.0.0.1:{probe.getsockname()[1]}"
        for shards, expected, words in (
            (f"0-15={endpoint}", 4, f"node {endpoint} is not reachable"),
            (f"0-14={endpoint}", 2, "no endpoint for expert 15 of layers 0-2"),
            (f"0-15={endpoint}x", 2, "expected a port in 1..65535"),
            (f"0-16={endpoint}", 2, "experts 0-16 are out of range: this model has experts 0-15"),
        ):
            with running(path, shards) as process:
                status, stderr = ended(process)
            assert status == expected, stderr
            assert words in stderr
            assert "Traceback" not in stderr


def test_a_hangup_moves_a_range_to_another_node_in_the_middle_of_an_answer(
    path: Path, tmp_path: Path
) -> None:
    """1. A run has said something; then nothing arrives at or from node a. 2. The map's file gives
    its experts to b, and the run is told by SIGHUP. 3. a is gone for good. 4. The answer goes on,
    and is what a run without nodes says.
    """
    length = ["--max-tokens", "300"]
    alone = shoal("run", path, *PROMPT, *length)
    assert alone.status == 0
    file = tmp_path / "map.toml"

    def write(low: str, high: str) -> None:
        file.write_text(
            f'[[shard]]\nexperts = "0-7"\nendpoints = ["{low}"]\n'
            f'[[shard]]\nexperts = "8-15"\nendpoints = ["{high}"]\n'
        )

    with Cluster() as cluster:
        a, b = cluster.nodes(path)
        with ChaosProxy(a.endpoint) as proxy:
            write(proxy.endpoint, b.endpoint)
            with running(path, f"@{file}", *length) as process:
                assert process.stdout is not None and process.stderr is not None
                begun = process.stdout.read(1)
                proxy.forecast = steady(Weather(stalls=True))
                write(b.endpoint, b.endpoint)
                process.send_signal(signal.SIGHUP)
                told = b""
                while b"the shard map is reloaded" not in b" ".join(told.split()):
                    line = process.stderr.readline()
                    assert line and process.poll() is None, told
                    told += line
                kill(a)
                proxy.forecast = steady(FAIR)
                rest = process.stdout.read()
                assert process.wait(TIMEOUT_S) == 0
    assert begun + rest == alone.out
