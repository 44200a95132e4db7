"""shoal beside llama.cpp: decode, prompts and passes of some rows.

python -m bench.peer MODEL [--threads 2 1] [--rounds 5] [--contexts 0 2048 8192 32768]

MODEL.shoal and MODEL.gguf: the same weights (bench/make_synthetic.py makes both). Three processes
stay: shoal, llama.cpp, llama.cpp with its weights rearranged ("repacked"). In every round each of
them does every phase in turn, the others waiting; medians over rounds of the median step. The
better of the two llama.cpp counts. The read-bandwidth probe runs just before shoal.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from bench.bench_model import bytes_per_token
from bench.measure import BandwidthProbe, Row, save, show, spread
from bench.peer.engines import SHOAL, Engine, llama_engine, shoal_engine
from bench.peer.phases import FILL_ROWS, Phase
from bench.peer_llama import VERSION
from shoal.artifact import Artifact


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="without its ending")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of a decode")
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 2048, 8192, 32768])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--rows", type=int, nargs="*", default=[4, 16], help="behind 512 tokens")
    parser.add_argument("--name", default="peer")
    parser.add_argument("--shoal-only", action="store_true")
    return parser.parse_args()


def phases(chosen: argparse.Namespace, threads: int) -> list[Phase]:
    """Return all phases at that number of threads."""
    decodes = [Phase(f"decode at {n}", 1, n, threads, chosen.steps) for n in chosen.contexts]
    verifies = [
        Phase(f"{rows} rows at {FILL_ROWS}", rows, FILL_ROWS, threads, max(3, chosen.steps // 3))
        for rows in chosen.rows
    ]
    prompts = [Phase(f"prompt of {n}", n, 0, threads, 1) for n in chosen.prompts]
    return decodes + verifies + prompts


def measure(chosen: argparse.Namespace, engines: Sequence[Engine]) -> list[Row]:
    """Return a row for each phase and number of threads."""
    probe = BandwidthProbe()
    weights = bytes_per_token(Artifact.open(chosen.model.with_suffix(".shoal")))
    plan = [phase for threads in chosen.threads for phase in phases(chosen, threads)]
    taken: dict[tuple[Phase, str], list[float]] = {}
    probes: dict[Phase, list[float]] = {}
    for number in range(chosen.rounds):
        for phase in plan:
            for engine in engines if number % 2 == 0 else reversed(engines):
                if engine.name == SHOAL:
                    probes.setdefault(phase, []).append(probe.steady_gb_per_s(phase.threads))
                seconds = statistics.median(engine.run(phase))
                taken.setdefault((phase, engine.name), []).append(phase.rows / seconds)
        print(f"round {number + 1} of {chosen.rounds}", flush=True)
    names = [engine.name for engine in engines]
    return [
        summary(phase, {name: taken[phase, name] for name in names}, probes[phase], weights)
        for phase in plan
    ]


def summary(phase: Phase, rates: dict[str, list[float]], probes: list[float], weights: int) -> Row:
    """Return a phase's medians, tokens a second, and shoal's ratio to the better peer."""
    peers = {name: statistics.median(rate) for name, rate in rates.items() if name != SHOAL}
    best = max(peers, key=lambda name: peers[name], default=None)
    ratios = [a / b for a, b in zip(rates[SHOAL], rates[best], strict=True)] if best else []
    shares = [rate * weights / (p * 1e9) for rate, p in zip(rates[SHOAL], probes, strict=True)]
    return {
        "phase": phase.name,
        "rows": phase.rows,
        "context": phase.context,
        "threads": phase.threads,
        "tokens_per_s": {name: spread(rate) for name, rate in rates.items()},
        "rounds": {name: rate for name, rate in rates.items()},
        "best_peer": best,
        "ratio": spread(ratios) if ratios else None,
        "probe_gb_per_s": spread(probes),
        # Weights alone: what is read of the KV cache comes on top.
        "share_of_weight_bound": spread(shares) if phase.rows == 1 else None,
    }


def cell(name: str) -> Callable[[Row], str]:
    """Return how an engine's rate shows."""
    return lambda row: f"{row['tokens_per_s'][name]['median']:.1f}"


def main() -> None:
    """Measure, print the table, write the result file."""
    chosen = arguments()
    longest = max([*chosen.contexts, *chosen.prompts, FILL_ROWS]) + FILL_ROWS
    artifact, gguf = chosen.model.with_suffix(".shoal"), chosen.model.with_suffix(".gguf")
    with ExitStack() as stack:
        engines = [stack.enter_context(shoal_engine(artifact, longest)).wait_ready()]
        if not chosen.shoal_only:
            for repack in (False, True):
                peer = stack.enter_context(llama_engine(gguf, longest, repack=repack))
                engines.append(peer.wait_ready())
        rows = measure(chosen, engines)
        memory = {e.name: psutil.Process(e.pid).memory_full_info()._asdict() for e in engines}
    show(
        f"{chosen.model.name}: tokens a second",
        rows,
        {
            "": lambda r: r["phase"],
            "threads": lambda r: str(r["threads"]),
            **{engine.name: cell(engine.name) for engine in engines},
            "ratio": lambda r: f"{r['ratio']['median']:.2f}" if r["ratio"] else "",
            "of bound": lambda r: (
                f"{r['share_of_weight_bound']['median']:.0%}" if r["rows"] == 1 else ""
            ),
            "probe GB/s": lambda r: f"{r['probe_gb_per_s']['median']:.1f}",
        },
    )
    save(f"{chosen.name}-{chosen.model.name}", rows, peer=VERSION, memory=memory)


if __name__ == "__main__":
    main()
