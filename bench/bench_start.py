"""How long commands take to begin: the first byte of an answer, and the processor time until then.

Each command is a new process on a warm page cache. Commands take turns, and so do two checkouts
with --against, whose processes import from there (its kernels must be built). The bare interpreter
and NumPy's import are there to be subtracted.

A --model's first token, and the last of 64, stand beside two times that nobody who loads all of it
can go below (the first token needs a part): reading its files once, by one thread, into memory in
use; and touching as much fresh memory, by two. The latter comes just before the start and is not
part of it: where a virtual machine's host takes free memory back, it is many times what it is
elsewhere, and the start would show the host instead. And beside what its bytes take at the speed of
the drive (bench/disk_probe.py): a second more was set out for.
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

from bench.disk_probe import disk_speed
from bench.measure import ROOT, Row, save, show, spread


class Command(NamedTuple):
    """What is typed after `python`, and whether it goes on until it is stopped.

    model: whose bytes it reads, if it does. is_whole: its last byte counts, not its first.
    """

    name: str
    arguments: tuple[str, ...]
    serves: bool = False
    model: Path | None = None
    is_whole: bool = False


NUM_TOKENS = 64
PIECE_BYTES = 1 << 20
DISK_SECONDS = 1.0
TOUCH = """
import ctypes, mmap, sys, threading, time
num_bytes, huge = int(sys.argv[1]), 2 << 20
memory = mmap.mmap(-1, num_bytes + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
write = ctypes.CDLL(None).memset
write.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
halves = [(start, num_bytes // 2), (start + num_bytes // 2, num_bytes - num_bytes // 2)]
threads = [threading.Thread(target=write, args=(at, 1, size)) for at, size in halves]
began_s = time.perf_counter()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(time.perf_counter() - began_s)
"""
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
    """One start. wall_s: to the byte that counts. cpu_s: of the process, then or at its end."""

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
            if command.is_whole:
                wall_s = time.perf_counter() - began
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or not first:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Start(wall_s, usage.ru_utime + usage.ru_stime if cpu_s is None else cpu_s)


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def tokens(model: Path, num_tokens: int, what: str) -> Command:
    """Return the command that prints so many tokens of a model, the last of which counts."""
    prompt = ("--prompt-ids", "1,2,3,4", "--max-tokens", str(num_tokens), "--ignore-eos")
    arguments = (*SHOAL, "run", str(model.resolve()), *prompt)
    name = f"shoal run {model.stem}, {what}"
    return Command(name, arguments, model=model, is_whole=num_tokens > 1)


def read_s(model: Path) -> float:
    """Return the seconds that one reading of a model's tensors takes."""
    buffer = bytearray(PIECE_BYTES)
    began = time.perf_counter()
    for path in model.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def touch_s(num_bytes: int) -> float:
    """Return the seconds until the system has given that much memory to a process of its own."""
    command = [sys.executable, "-c", TOUCH, str(num_bytes)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def disk_s(model: Path) -> float:
    """Return the seconds that a model's tensors take at the speed of the drive."""
    largest = max(model.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    return num_bytes(model) / disk_speed(largest, DISK_SECONDS).gb_per_s / 1e9


def num_bytes(model: Path) -> int:
    """Return the bytes of a model's tensors."""
    return sum(path.stat().st_size for path in model.rglob("*.safetensors"))


def measure(commands: Sequence[Command], checkouts: Sequence[Path], rounds: int) -> list[Row]:
    """Take turns; return a row for each command in each checkout."""
    taken: dict[tuple[Command, Path], list[Start]] = {}
    readings: dict[Command, list[float]] = {}
    touches: dict[Command, list[float]] = {}
    drive: dict[Command, list[float]] = {}
    for _ in range(rounds + 1):
        for command in commands:
            if command.model is not None:
                drive.setdefault(command, []).append(disk_s(command.model))
                readings.setdefault(command, []).append(read_s(command.model))
            for checkout in checkouts:
                if command.model is not None:
                    touches.setdefault(command, []).append(touch_s(num_bytes(command.model)))
                taken.setdefault((command, checkout), []).append(start(command, checkout))
    return [
        {
            "command": command.name,
            "checkout": _commit(checkout),
            "wall_s": spread([one.wall_s for one in starts[1:]]),  # the first one filled caches
            "cpu_s": spread([one.cpu_s for one in starts[1:]]),
            "bytes": 0 if command.model is None else num_bytes(command.model),
            "read_s": None if command.model is None else spread(readings[command][1:]),
            "touch_s": None if command.model is None else spread(touches[command]),
            "disk_s": None if command.model is None else spread(drive[command]),
        }
        for (command, checkout), starts in taken.items()
    ]


def touching(row: Row) -> str:
    """Return the least and the greatest of the times, which may be far apart."""
    times = row["touch_s"]
    return f"{times['min'] * 1e3:.0f}-{times['max'] * 1e3:.0f}" if times else ""


def _commit(checkout: Path) -> str:
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Take turns, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout, such as of an older commit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", type=Path, action="append", default=[], help="any artifact")
    chosen = parser.parse_args()
    commands = [*COMMANDS]
    for model in chosen.model:
        commands += [tokens(model, 1, "first token")]
        commands += [tokens(model, NUM_TOKENS, f"{NUM_TOKENS} tokens")]
    checkouts = [ROOT] if chosen.against is None else [chosen.against.resolve(), ROOT]
    rows = measure(commands, checkouts, chosen.rounds)
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
            "MB": lambda r: f"{r['bytes'] / 1e6:.0f}" if r["bytes"] else "",
            "reading ms": lambda r: f"{r['read_s']['median'] * 1e3:.0f}" if r["read_s"] else "",
            "touching ms": touching,
            "drive ms": lambda r: f"{r['disk_s']['median'] * 1e3:.0f}" if r["disk_s"] else "",
            "least CPU": lambda r: f"{r['cpu_s']['min'] * 1e3:.0f}",
        },
    )
    save("start", rows, rounds=chosen.rounds, load_average=load)


if __name__ == "__main__":
    main()
