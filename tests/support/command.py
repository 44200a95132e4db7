"""The `shoal` command as somebody types it: a real process, its exit status, what it printed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.cli import main

TIMEOUT_S = 120.0  # a busy machine; nothing here waits for time to pass


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. `err`: its stderr in one line."""

    status: int
    out: bytes
    err: str


def command_line(*arguments: object) -> list[str]:
    """Return the argv of `shoal ARGUMENTS`."""
    return [sys.executable, "-P", "-m", "client", *map(str, arguments)]


def shoal(
    *arguments: object, stdin: bytes = b"", shell: str = "", env: dict[str, str] | None = None
) -> Ended:
    """Run `shoal ARGUMENTS` to its end.

    Args:
        shell: a line of sh in which "$@" is the command, such as 'ulimit -f 64; "$@"'.
        env: added to the environment.
    """
    command = command_line(*arguments)
    process = subprocess.run(
        ["sh", "-c", shell, "sh", *command] if shell else command,
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT_S,
        env=_environment(env),
        check=False,
    )
    return _ended(process.returncode, process.stdout, process.stderr)


def shoal_here(capture: pytest.CaptureFixture[bytes], *arguments: object) -> Ended:
    """Do what `shoal` does, but in this process: for what a process of its own adds nothing to."""
    capture.readouterr()
    status = main([str(word) for word in arguments])
    shown = capture.readouterr()
    return _ended(status, shown.out, shown.err)


def run_json(
    capsys: pytest.CaptureFixture[str], model: Path | str, *options: str
) -> dict[str, Any]:
    """Return the report of `shoal run MODEL --json OPTIONS`, in this process."""
    assert main(["run", str(model), "--json", *options]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@contextmanager
def running_shoal(
    *arguments: object, env: dict[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start `shoal ARGUMENTS` with pipes; it is gone at the end of the block."""
    process = subprocess.Popen(
        command_line(*arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(env),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def end_of(process: "subprocess.Popen[bytes]") -> Ended:
    """Close its stdin and wait for its end."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    return _ended(process.returncode, out, err)


def assert_refused(ended: Ended, status: int, *words: str) -> None:
    """Assert that it ended with one error, of that status, whose message has those words."""
    assert ended.status == status, ended
    assert "Traceback" not in ended.err, ended.err
    assert ended.err.count("error: ") == 1, ended.err
    for word in words:
        assert word in ended.err, (word, ended.err)


def _ended(status: int, out: bytes, err: bytes) -> Ended:
    return Ended(status, out, " ".join(err.decode(errors="backslashreplace").split()))


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1"} | (more or {})
