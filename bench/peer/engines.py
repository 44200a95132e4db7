"""Engines to compare, each in a process of its own that stays for all phases."""

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from bench.measure import ROOT
from bench.peer.phases import Phase
from bench.peer_llama import peer_python

SHOAL, LLAMA, LLAMA_REPACKED = "shoal", "llama.cpp", "llama.cpp, repacked"


class Engine(AbstractContextManager["Engine"]):
    """A process that does phases; all but one wait while that one works."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def wait_ready(self) -> Self:
        self._answer()
        return self

    def run(self, phase: Phase) -> list[float]:
        """Return the seconds of each step."""
        assert self._process.stdin is not None
        self._process.stdin.write(phase.line() + "\n")
        self._process.stdin.flush()
        steps: list[float] = self._answer()["step_s"]
        return steps

    @property
    def pid(self) -> int:
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}: see above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def shoal_engine(model: Path, max_context: int, *flags: str, name: str = SHOAL) -> Engine:
    """Start shoal on an artifact."""
    command = [sys.executable, "-m", "bench.peer.run_shoal", str(model)]
    return Engine(name, [*command, "--max-context", str(max_context), *flags])


def llama_engine(model: Path, max_context: int, *, repack: bool) -> Engine:
    """Start llama.cpp on a GGUF file. Raises NoPeer."""
    runner = ROOT / "bench" / "peer" / "run_llama.py"
    command = [str(peer_python()), "-I", str(runner), str(model)]
    command += ["--max-context", str(max_context)]
    name = LLAMA_REPACKED if repack else LLAMA
    return Engine(name, command + (["--repack"] if repack else []))
