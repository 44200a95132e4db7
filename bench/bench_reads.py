"""How fast experts are read from this disk, beside fio's random O_DIRECT reads of the same file.

python bench/bench_reads.py [FILE] [--rounds 5] [--seconds 1.5] [--bursts]

fio and our readers take turns in each round, as the bandwidth of a shared disk drifts; medians are
printed, and of every round the ratio to fio's reads of the same size and queue depth. Ours are
whole experts at random places, cut into chunks of that size, into an arena that is already touched.

Bursts: a call asks for a few experts at once and computes each as it comes. When does the first
one come, and when the last, with so many chunks of 1 MiB at the drive?
"""

import argparse
import itertools
import resource
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.disk_probe import disk_speed, files_of
from bench.measure import ROOT, Row, save, show, spread
from shoal import ops
from shoal.experts.readers import Backend, Read, Reader, Source, Tuning, open_reader
from shoal.limits import KIB

MODELS = ROOT / "build" / "bench" / "models"
EXPERT_BYTES = 2_654_208  # Qwen3-30B-A3B's, of four bits and a scale in 32 weights
EXPERTS_AT_ONCE = 24
BURSTS, BURST_DEPTHS, BURST_ROUNDS = (1, 3, 6), (2, 4, 6, 32), 25
PAGE = 4096
# (block or chunk bytes, queue depth)
SHAPES = [(256 * KIB, 16), (512 * KIB, 16), (1024 * KIB, 16), (1024 * KIB, 32)]
CONTENDERS = [
    *((Backend.IO_URING, *shape) for shape in SHAPES),
    (Backend.PREAD, 1024 * KIB, 16),
    (Backend.BUFFERED, 1024 * KIB, 16),
]


def read_experts(reader: Reader, path: Path, arena: Any, seconds: float, seed: int) -> int:
    """Read random experts for so long; return how many bytes."""
    rng = np.random.default_rng(seed)
    last_page = (path.stat().st_size - EXPERT_BYTES) // PAGE

    def read(place: int) -> Read:
        out = arena[place * EXPERT_BYTES : (place + 1) * EXPERT_BYTES]
        return Read(place, (Source(path, int(rng.integers(last_page)) * PAGE),), out)

    until_s = time.perf_counter() + seconds
    reader.submit([read(place) for place in range(EXPERTS_AT_ONCE)])
    num_bytes, under_way = 0, EXPERTS_AT_ONCE
    while under_way:
        for done in reader.wait(30.0):
            if done.error is not None:
                raise done.error
            num_bytes += done.num_bytes
            if time.perf_counter() < until_s:
                reader.submit([read(done.tag)])
            else:
                under_way -= 1
    return num_bytes


def measure(
    backend: Backend, chunk: int, depth: int, path: Path, arena: Any, seconds: float, seed: int
) -> Row:
    """Return the bandwidth of one reader, and what it cost."""
    tuning = Tuning(chunk_bytes=chunk, queue_depth=depth)
    reader = open_reader(backend, arena, [path], tuning=tuning)
    try:
        read_experts(reader, path, arena, 0.2, seed)  # pins the arena
        began_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        num_bytes = read_experts(reader, path, arena, seconds, seed + 1)
        elapsed_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
        figures = reader.figures()
    finally:
        reader.close()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "reader": str(backend),
        "chunk_kib": chunk // KIB,
        "queue_depth": depth,
        "gb_per_s": num_bytes / elapsed_s / 1e9,
        "cpu_ms_per_gb": cpu_s * 1e12 / num_bytes,
        "pinned_bytes": figures.pinned_bytes,
        "why": reader.why,
    }


def bursts(path: Path, arena: Any) -> list[Row]:
    """Return when the experts of a call come, by queue depth; depths take turns."""
    rng = np.random.default_rng(1)
    last_page = (path.stat().st_size - EXPERT_BYTES) // PAGE
    times: dict[tuple[int, int], list[list[float]]] = {}
    with ExitStack() as stack:
        readers: dict[int, Reader] = {}
        for depth in BURST_DEPTHS:
            tuning = Tuning(queue_depth=depth)
            readers[depth] = open_reader(None, arena, [path], tuning=tuning)
            stack.callback(readers[depth].close)
        for _ in range(BURST_ROUNDS):
            for (depth, reader), count in itertools.product(readers.items(), BURSTS):
                places = [(tag, int(rng.integers(last_page)) * PAGE) for tag in range(count)]
                came = burst(reader, path, arena, places)
                times.setdefault((depth, count), []).append(came)
    return [
        {
            "queue_depth": depth,
            "experts": count,
            "came_ms": [1e3 * median(each) for each in zip(*came, strict=True)],
        }
        for (depth, count), came in times.items()
    ]


def burst(reader: Reader, path: Path, arena: Any, places: list[tuple[int, int]]) -> list[float]:
    """Read experts (tag, offset) at once; return the seconds after which each was there."""
    reads = [
        Read(tag, (Source(path, at),), arena[tag * EXPERT_BYTES : (tag + 1) * EXPERT_BYTES])
        for tag, at in places
    ]
    began_s = time.perf_counter()
    reader.submit(reads)
    came: list[float] = []
    while len(came) < len(reads):
        for done in reader.wait(30.0):
            if done.error is not None:
                raise done.error
            came.append(time.perf_counter() - began_s)
    return came


def summary(rounds: list[dict[str, Row]], key: str) -> Row:
    """Return the medians of one contender, and its ratio to fio in the same round."""
    rows = [results[key] for results in rounds]
    shape = f"{rows[0]['chunk_kib']}K, {rows[0]['queue_depth']}"
    ratios = [
        results[key]["gb_per_s"] / results[f"fio {shape}"]["gb_per_s"]
        for results in rounds
        if f"fio {shape}" in results
    ]
    return {
        **rows[0],
        "gb_per_s": spread([row["gb_per_s"] for row in rows]),
        "cpu_ms_per_gb": median(row["cpu_ms_per_gb"] for row in rows),
        "ratio_to_fio": spread(ratios) if ratios else None,
    }


def one_round(path: Path, arena: Any, seconds: float, seed: int) -> dict[str, Row]:
    """Measure fio and ours, shape by shape."""
    results: dict[str, Row] = {}
    for chunk, depth in SHAPES:
        shape = {"chunk_kib": chunk // KIB, "queue_depth": depth}
        speed = disk_speed(path, seconds, block_bytes=chunk, queue_depth=depth)
        results[f"fio {chunk // KIB}K, {depth}"] = {
            "reader": speed.tool,
            **shape,
            "gb_per_s": speed.gb_per_s,
            "cpu_ms_per_gb": 0.0,
        }
        for contender in (c for c in CONTENDERS if c[1:] == (chunk, depth)):
            name = f"{contender[0]} {chunk // KIB}K, {depth}"
            results[name] = measure(*contender, path, arena, seconds, seed)
    return results


def show_readers(path: Path, rows: list[Row]) -> None:
    """Print a table of the readers, and the best of ours beside fio's best."""
    show(
        f"Random reads of {path.name}, {EXPERT_BYTES} bytes an expert",
        rows,
        {
            "reader": lambda r: str(r["reader"]),
            "chunk KiB": lambda r: str(r["chunk_kib"]),
            "queue depth": lambda r: str(r["queue_depth"]),
            "GB/s": lambda r: f"{r['gb_per_s']['median']:.2f}",
            "from": lambda r: f"{r['gb_per_s']['min']:.2f}",
            "to": lambda r: f"{r['gb_per_s']['max']:.2f}",
            "of fio": lambda r: f"{r['ratio_to_fio']['median']:.0%}",
            "CPU ms/GB": lambda r: f"{r['cpu_ms_per_gb']:.0f}" if r["cpu_ms_per_gb"] else "",
        },
    )
    best_fio = max(r["gb_per_s"]["median"] for r in rows if "fio" in str(r["reader"]))
    ours = max(r["gb_per_s"]["median"] for r in rows if r["reader"] in list(Backend))
    print(f"best of ours {ours:.2f} GB/s, {ours / best_fio:.0%} of fio's best, {best_fio:.2f}")


def show_bursts(rows: list[Row]) -> None:
    """Print when the experts of a call are there."""
    show(
        "Experts of one call: when each is there, ms (medians)",
        rows,
        {
            "chunks at the drive": lambda r: str(r["queue_depth"]),
            "experts": lambda r: str(r["experts"]),
            "there after": lambda r: " ".join(f"{ms:.2f}" for ms in r["came_ms"]),
        },
    )


def main() -> None:
    """Take turns, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", nargs="?", type=Path, help="default: the largest in build/bench/models"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--bursts", action="store_true", help="bursts alone; nothing is saved")
    chosen = parser.parse_args()
    path = chosen.file or max(files_of(MODELS), key=lambda file: file.stat().st_size)
    arena = ops.aligned_empty(EXPERTS_AT_ONCE * EXPERT_BYTES, huge=True)
    arena[:] = 1
    found = bursts(path, arena)
    show_bursts(found)
    if chosen.bursts:
        return
    rounds = [one_round(path, arena, chosen.seconds, seed) for seed in range(chosen.rounds)]
    rows = [summary(rounds, key) for key in rounds[0]]
    show_readers(path, rows)
    more = {"file": path.name, "expert_bytes": EXPERT_BYTES, "rounds": chosen.rounds}
    save("reads", rows, bursts=found, **more)


if __name__ == "__main__":
    main()
