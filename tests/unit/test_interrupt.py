"""Ctrl-C stops an answer; in `run` that ends the program, in `chat` it does not."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.tiny_model import make_tiny_artifact

pytestmark = pytest.mark.processes

LONG = "15000"  # tokens: nobody waits for the end


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("interrupt")
    # Without an end-of-sequence token the answer is as long as we let it be.
    return make_tiny_artifact(
        tmp, "qwen3_moe", "q8_0", max_position_embeddings=20000, eos_token_id=None
    )


@contextmanager
def shoal(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "client.cli", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def test_run_stops_writes_its_figures_and_tells_the_shell(path: Path) -> None:
    """1. text comes. 2. SIGINT. 3. the line ends, figures follow, status 130, no traceback."""
    with shoal("run", str(path), "hello", "--max-tokens", LONG) as process:
        assert process.stdout is not None
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert out.endswith(b"\n")
        assert b"cancelled" in err
        assert b"Traceback" not in err


def test_chat_stops_the_answer_and_takes_the_next_question(path: Path) -> None:
    """1. a long answer comes. 2. SIGINT. 3. its figures come. 4. /exit ends it, status 0."""
    with shoal("chat", str(path), "--max-tokens", LONG) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        assert b"cancelled" in process.stderr.readline()
        _, err = process.communicate(b"/reset\n/exit\n", timeout=60)
        assert process.returncode == 0
        assert err == b""
