"""Engines to compare, each in a process of its own that stays for all phases."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Self

from bench.line_process import LineProcess
from bench.measure import ROOT
from bench.peer.phases import Phase
from bench.peer_llama import peer_python

SHOAL, LLAMA, LLAMA_REPACKED = "shoal", "llama.cpp", "llama.cpp, repacked"


class Engine(LineProcess):
    """A process that does phases; all but one wait while that one works."""

    def wait_ready(self) -> Self:
        self.answer()
        return self

    def run(self, phase: Phase) -> list[float]:
        """Return the seconds of each step."""
        steps: list[float] = self.exchange(asdict(phase))["step_s"]
        return steps


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
