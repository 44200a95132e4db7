"""Decoding with experts that do not fit in memory: shoal and llama.cpp under one memory cap.

python bench/bench_streaming.py MODEL.shoal [--residency 25 50] [--tokens 288] [--peer-tokens 32]
    [--prefetch off auto] [--routing own trace uniform] [--repeats 3] [--peer-repeats 1]
    [--node-threads 2]

python -m bench.streaming_page puts the newest results into docs/streaming.md.

Each measurement is a process of its own in a memory cgroup whose limit counts page cache: dense
weights, the share of the experts' bytes that is asked for, and OVERHEAD_BYTES. shoal's cache has
exactly that share; llama.cpp maps MODEL.gguf, which lies beside the artifact, and has the page
cache. Cold: the first tokens, with no expert in memory yet; warm: the last ones. Random weights
do not route as trained ones do. Routing `own`: each engine's router (the same choices, but for
rounding). `trace`: recorded from a small trained model, in both engines (bench/replay.py).
`uniform`: drawn at random: no cache can do better than its share.

The bound is the drive's bandwidth (random O_DIRECT reads without any of our code, before and after
each measurement; the better one) over the bytes per token that had to come from it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.disk_probe import DiskSpeed, disk_speed, files_of, forget, read_ahead
from bench.measure import ROOT, Row, save, show, spread
from bench.memory_cap import MemoryCap
from bench.peer_llama import VERSION, decode_command
from bench.replay import replayed_experts
from shoal.artifact import Artifact
from shoal.experts.routing_trace import decode_trace

OVERHEAD_BYTES = 500_000_000  # DESIGN.md: coordinator 300 MB, node 200 MB beyond what they hold
PROBE_S = 2.0
COLD_TOKENS = 8
WARM_TOKENS = 96  # by then the prefetcher has made up its mind: some 28 windows of 4 tokens
TIMEOUT_S = 1800
ROUTINGS = ("own", "trace", "uniform")


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine and its settings. routing: one of ROUTINGS. num_tokens: of a measurement."""

    name: str
    routing: str
    flags: tuple[str, ...]
    num_tokens: int
    is_peer: bool = False
    read_ahead_kib: int | None = None  # None: the machine's own


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share."""

    artifact: Artifact
    source: Path
    ids: tuple[int, ...]
    folder: Path

    @property
    def expert_bytes(self) -> int:
        return sum(
            len(layer.blake3) * layer.expert_bytes for layer in self.artifact.manifest.experts
        )

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.artifact.manifest.dense)

    def cache_bytes(self, percent: float) -> int:
        return int(self.expert_bytes * percent / 100)

    def cap_bytes(self, percent: float) -> int:
        return self.dense_bytes + self.cache_bytes(percent) + OVERHEAD_BYTES


def subjects(chosen: argparse.Namespace, turn: int) -> Iterator[Subject]:
    """Yield what is compared in that round, in order."""
    shared = ("--verify", chosen.verify, "--io", chosen.io, "--prefetch")
    for routing in chosen.routing:
        for prefetch in chosen.prefetch:
            name = f"shoal, prefetch {prefetch}"
            yield Subject(name, routing, (*shared, prefetch), chosen.tokens)
        if not chosen.without_node:
            threads = ("--node-threads", str(chosen.node_threads))
            flags = ("--node", *threads, *shared, chosen.prefetch[-1])
            yield Subject(f"shoal node, prefetch {flags[-1]}", routing, flags, chosen.tokens)
        if turn < chosen.peer_repeats:
            for kib in chosen.peer_read_ahead:
                name = f"llama.cpp, read-ahead {kib} KiB"
                yield Subject(name, routing, (), chosen.peer_tokens, True, kib)


def command_of(bench: Bench, subject: Subject, percent: float) -> list[str]:
    """Return the command that measures it."""
    flags, ids = list(subject.flags), bench.ids[: subject.num_tokens]
    if subject.routing != "own":
        suffix = "json" if subject.is_peer else "npy"
        flags += ["--trace", str(bench.folder / f"{subject.routing}.{suffix}")]
    if subject.is_peer:
        return decode_command(bench.source, ids, *flags)
    script = ["-P", str(ROOT / "bench" / "stream_decode.py"), str(bench.artifact.path)]
    script += [",".join(map(str, ids))]
    return [sys.executable, *script, "--cache", str(bench.cache_bytes(percent)), *flags]


def measure(bench: Bench, subject: Subject, percent: float) -> list[Row]:
    """Measure once; return a row a phase."""
    num_warm = min(WARM_TOKENS, subject.num_tokens * 3 // 5)
    phases = {"cold": slice(0, COLD_TOKENS), "warm": slice(-num_warm, None)}
    experts = [path for path in files_of(bench.artifact.path) if path.parent.name == "experts"]
    forget([*experts, bench.source])
    before = disk_speed(bench.source, PROBE_S)
    with ExitStack() as stack:
        cap = stack.enter_context(MemoryCap(f"shoal-bench-{os.getpid()}", bench.cap_bytes(percent)))
        if subject.read_ahead_kib is not None:
            stack.enter_context(read_ahead(bench.source, subject.read_ahead_kib))
        done = subprocess.run(
            cap.command(command_of(bench, subject, percent)),
            stdout=subprocess.PIPE,
            timeout=TIMEOUT_S,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )
        usage = cap.usage()
    if done.returncode != 0:
        sys.exit(f"error: {subject.name} at {percent} % ended with {done.returncode}: {usage}")
    after = disk_speed(bench.source, PROBE_S)
    report = json.loads(done.stdout)
    common = {
        "subject": subject.name,
        "routing": subject.routing,
        "residency_percent": percent,
        "cap_bytes": bench.cap_bytes(percent),
        "peak_bytes": usage.peak_bytes,
        "peak_rss_bytes": report["peak_rss_bytes"],
        "times_limited": usage.num_limited,
        "answer": report.get("logits_digest"),
        "disk": [before.gb_per_s, after.gb_per_s],
        "disk_tool": before.tool,
    }
    return [
        {"phase": name, **common, **phase_figures(report, phase, bench, before, after)}
        for name, phase in phases.items()
    ]


def phase_figures(
    report: dict[str, Any], phase: slice, bench: Bench, before: DiskSpeed, after: DiskSpeed
) -> dict[str, Any]:
    """Return the figures of some of the tokens."""
    seconds = report["token_s"][phase]
    first, last, _ = phase.indices(len(report["token_s"]))
    disk = max(before.gb_per_s, after.gb_per_s) * 1e9
    figures: dict[str, Any] = {
        "tokens_per_s": len(seconds) / sum(seconds),
        "slowest_token_s": max(seconds),
    }
    if "read_bytes" in report:
        missed = (report["read_bytes"][last] - report["read_bytes"][first]) / len(seconds)
        figures["read_bytes_per_token"] = missed
    else:
        start, end = report["figures"][first], report["figures"][last]
        moved = {key: (end[key] - start[key]) / len(seconds) for key in end}
        missed = moved["num_bytes"] - moved["prefetch_wasted_bytes"]
        cpu_s = (report["cpu_s"][last] - report["cpu_s"][first]) / len(seconds)
        figures |= {
            "hit_rate": moved["hits"] / (moved["hits"] + moved["misses"]),
            "read_bytes_per_token": moved["num_bytes"],
            "stall_s_per_token": moved["stall_s"],
            "cpu_s_per_token": cpu_s,
            "prefetch_used_bytes_per_token": moved["prefetch_used_bytes"],
            "prefetch_wasted_bytes_per_token": moved["prefetch_wasted_bytes"],
            "resident_bytes": end["resident_bytes"],
        }
    figures["missed_bytes_per_token"] = missed
    figures["bound_tokens_per_s"] = disk / max(missed, 1.0)
    figures["of_bound"] = figures["tokens_per_s"] * missed / disk
    return figures


def write_routings(path: Path, bench: Bench) -> None:
    """Write the routings that are not the router's own as both engines read them."""
    routers = [layer.router for layer in bench.artifact.spec.layers if layer.router is not None]
    num_tokens, num_layers, first = len(bench.ids), len(routers), routers[0]
    trace = decode_trace(path.read_bytes(), str(path))
    shape = (num_layers, first.num_experts, first.experts_per_token)
    drawn = np.random.default_rng(0).random((num_tokens, num_layers, first.num_experts))
    routings = {
        "trace": replayed_experts(trace, num_tokens, *shape),
        "uniform": drawn.argsort(axis=-1)[..., : first.experts_per_token].astype(np.int32),
    }
    for name, experts in routings.items():
        np.save(bench.folder / f"{name}.npy", experts)
        (bench.folder / f"{name}.json").write_text(json.dumps(experts.tolist()))


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return one row a subject, routing, residency and phase: the spread of its repeats."""
    keys = ("subject", "routing", "residency_percent", "phase")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    summary: list[Row] = []
    for key, group in groups.items():
        numbers = [name for name, value in group[0].items() if isinstance(value, float)]
        spreads = {n: spread([row[n] for row in group]) for n in numbers if n not in keys}
        fixed = {name: group[0][name] for name in ("cap_bytes", "disk_tool")}
        peaks = {name: max(row[name] for row in group) for name in ("peak_bytes", "peak_rss_bytes")}
        summary.append({**dict(zip(keys, key, strict=True)), **fixed, **peaks, **spreads})
    return summary


def check_answers(rows: Sequence[Row]) -> None:
    """End the program unless shoal said the same in every measurement of one routing."""
    for routing in {row["routing"] for row in rows}:
        mine = [r for r in rows if r["routing"] == routing and r["subject"].startswith("shoal")]
        if len({json.dumps(row["answer"]) for row in mine}) > 1:
            sys.exit(f"error: routing {routing}: shoal gave different logits")


def print_table(rows: Sequence[Row], model: str) -> None:
    """Print the summary."""

    def middle(key: str, digits: int, scale: float = 1.0) -> Any:
        return lambda row: f"{row[key]['median'] * scale:.{digits}f}" if key in row else ""

    show(
        f"{model}: decode under a memory cap",
        rows,
        {
            "engine": lambda r: r["subject"],
            "routing": lambda r: r["routing"],
            "resident": lambda r: f"{r['residency_percent']:g} %",
            "phase": lambda r: r["phase"],
            "tok/s": middle("tokens_per_s", 2),
            "bound": middle("bound_tokens_per_s", 2),
            "of bound": middle("of_bound", 2),
            "hits": middle("hit_rate", 2),
            "MB read": middle("read_bytes_per_token", 0, 1e-6),
            "stall ms": middle("stall_s_per_token", 1, 1e3),
            "peak GB": lambda r: f"{r['peak_bytes'] / 1e9:.2f}",
        },
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--residency", type=float, nargs="+", default=[25.0, 50.0], help="percent")
    parser.add_argument("--tokens", type=int, default=288, help="random ones, of a measurement")
    parser.add_argument("--peer-tokens", type=int, default=32)
    parser.add_argument("--peer-read-ahead", type=int, nargs="+", default=[128], help="KiB")
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument("--prefetch", nargs="+", default=["off", "auto"])
    parser.add_argument("--verify", default="first")
    parser.add_argument("--io", default="auto")
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--trace", type=Path, default=ROOT / "bench" / "traces" / "fables.trace")
    parser.add_argument("--without-node", action="store_true")
    parser.add_argument("--node-threads", type=int, default=2, help="its coordinator has as many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", help="of the result file; default: streaming-RESIDENCY")
    return parser.parse_args()


def main() -> None:
    """Measure round after round, so that a slow hour of the machine falls on everybody."""
    chosen = arguments()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        artifact = Artifact.open(chosen.model)
        source = chosen.model.with_suffix(".gguf")
        ids = random.Random(0).choices(range(artifact.spec.vocab_size), k=chosen.tokens)
        bench = Bench(artifact, source, tuple(ids), Path(name))
        write_routings(chosen.trace, bench)
        for turn in range(chosen.repeats):
            for percent in chosen.residency:
                for subject in subjects(chosen, turn):
                    rows += measure(bench, subject, percent)
                    print(
                        f"{percent:g} % {subject.name} ({subject.routing}): "
                        + ", ".join(
                            f"{r['phase']} {r['tokens_per_s']:.2f} tok/s" for r in rows[-2:]
                        ),
                        file=sys.stderr,
                    )
    check_answers(rows)
    summary = summarise(rows)
    shares = "-".join(f"{percent:g}" for percent in chosen.residency)
    print_table(summary, chosen.model.stem)
    save(
        f"{chosen.name or f'streaming-{shares}'}-{chosen.model.stem}",
        summary,
        peer=f"llama-cpp-python {VERSION}",
        samples=[{k: v for k, v in row.items() if k != "answer"} for row in rows],
    )


if __name__ == "__main__":
    main()
