"""How long commands take to begin: the first byte of an answer, and the processor time until then.

Each command is a new process on a warm page cache. Commands take turns, and so do two checkouts
with --against, whose processes import from there (its kernels must be built). The bare interpreter
and NumPy's import are there to be subtracted.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.measure import ROOT, Row, save, show, spread


class Command(NamedTuple):
    """What is typed after `python`, and whether it goes on until it is stopped."""

    name: str
    arguments: tuple[str, ...]
    serves: bool = False


FABLES = ("shoal/models/fables.shoal",)
SHOAL = ("-m", "client.cli")
COMMANDS = (
    Command("python", ("-c", "print()")),
    Command("python, numpy", ("-c", "import numpy; print()")),
    Command("shoal --help", (*SHOAL, "--help")),
    Command("shoal run --help", (*SHOAL, "run", "--help")),
    Command("shoal run, first token", (*SHOAL, "run", "Once upon a time", "--max-tokens", "1")),
    Command("shoal node, ready", (*SHOAL, "node", *FABLES, "--listen", "127.0.0.1:0"), serves=True),
    Command(
        "shoal node --warmup, ready",
        (*SHOAL, "node", *FABLES, "--listen", "127.0.0.1:0", "--warmup"),
        serves=True,
    ),
)


class Start(NamedTuple):
    """One start. wall_s: to the first byte. cpu_s: of the process, then or at its end."""

    wall_s: float
    cpu_s: float


def start(command: Command, checkout: Path) -> Start:
    """Run a command once. Raises CalledProcessError: it failed."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command.arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert process.stdout is not None
    cpu_s: float | None = None
    with process.stdout as stdout:
        first = os.read(stdout.fileno(), 1)
        wall_s = time.perf_counter() - began
        if command.serves:
            cpu_s = _cpu_s(process.pid)
            process.terminate()
        while os.read(stdout.fileno(), 65536):
            pass
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or not first:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Start(wall_s, usage.ru_utime + usage.ru_stime if cpu_s is None else cpu_s)


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def measure(checkouts: Sequence[Path], rounds: int) -> list[Row]:
    """Take turns; return a row for each command in each checkout."""
    taken: dict[tuple[Command, Path], list[Start]] = {}
    for _ in range(rounds + 1):
        for command in COMMANDS:
            for checkout in checkouts:
                taken.setdefault((command, checkout), []).append(start(command, checkout))
    return [
        {
            "command": command.name,
            "checkout": _commit(checkout),
            "wall_s": spread([one.wall_s for one in starts[1:]]),  # the first one filled caches
            "cpu_s": spread([one.cpu_s for one in starts[1:]]),
        }
        for (command, checkout), starts in taken.items()
    ]


def _commit(checkout: Path) -> str:
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Take turns, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout, such as of an older commit")
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    checkouts = [ROOT] if chosen.against is None else [chosen.against.resolve(), ROOT]
    rows = measure(checkouts, chosen.rounds)
    load = os.getloadavg()[0]
    show(
        f"Starts on a warm page cache, {chosen.rounds} rounds; load average {load:.1f}",
        rows,
        {
            "command": lambda r: str(r["command"]),
            "checkout": lambda r: str(r["checkout"]),
            "wall ms": lambda r: f"{r['wall_s']['median'] * 1e3:.0f}",
            "least": lambda r: f"{r['wall_s']['min'] * 1e3:.0f}",
            "CPU ms": lambda r: f"{r['cpu_s']['median'] * 1e3:.0f}",
            "least CPU": lambda r: f"{r['cpu_s']['min'] * 1e3:.0f}",
        },
    )
    save("start", rows, rounds=chosen.rounds, load_average=load)


if __name__ == "__main__":
    main()
