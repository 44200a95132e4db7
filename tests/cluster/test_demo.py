"""`make demo`, the first thing that a stranger types, from its end and from an interrupt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support.smollm2 import smollm2_gguf

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = [sys.executable, str(ROOT / "tools" / "demo.py")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a shoal that has pulled the model and nothing else: no stale artifact.

    The first demo that runs converts; the second one finds what the first one made.
    """
    folder: Path = tmp_path_factory.mktemp("home")
    (folder / "sources").symlink_to(smollm2_gguf().parent.parent)
    return {**os.environ, "SHOAL_HOME": str(folder)}


@pytest.mark.processes
@pytest.mark.weights
def test_the_demo_answers_paris_and_leaves_nothing_running(home: dict[str, str]) -> None:
    ran = subprocess.run(DEMO, env=home, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("The capital of France is Paris") == 2, "over nodes, and in process"
    assert "tok/s" in ran.stderr, "the figures"
    assert "(both nodes are stopped)" in ran.stdout


@pytest.mark.processes
@pytest.mark.weights
def test_an_interrupted_demo_stops_the_nodes_that_it_started(home: dict[str, str]) -> None:
    # 1. The demo prepares, starts its nodes, and says that both serve.
    # 2. It is told to end (as by Ctrl-C, which a test run in the background would ignore).
    # 3. It stops both nodes, then itself.
    with subprocess.Popen(DEMO, env=home, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        num_serving = 0
        while num_serving < 2:
            line = demo.stdout.readline()
            assert line, "the demo ended before its nodes served"
            num_serving += " serves at " in line
        nodes = psutil.Process(demo.pid).children()
        assert sum("expert_node" in node.cmdline() for node in nodes) == 2
        demo.send_signal(signal.SIGTERM)
        rest = demo.stdout.read()
        assert demo.wait(timeout=60) == 130
    assert "(both nodes are stopped)" in rest
    _, alive = psutil.wait_procs(nodes, timeout=5)
    assert alive == []
