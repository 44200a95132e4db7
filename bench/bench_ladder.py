"""The kernel ladder: the same expert on every instruction set of this CPU, on one thread.

python bench/bench_ladder.py [--formats q4_0,f16] [--rows 1,8,128]

Seconds are those the thread ran for (CLOCK_THREAD_CPUTIME_ID), so a neighbour that takes the core
does not count; one that takes memory bandwidth does, in the probe of the same second as well.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from bench.bench_kernels import DIM, FFN_DIM, FORMATS, Arena, layer_work, numbers, random_expert
from bench.measure import PROBE_BYTES, BandwidthProbe, Row, save, show
from shoal import ops
from shoal.quant import parse_format

ALTERNATIONS = 9
SLOW_ROWS = 8  # the portable code takes seconds for more


def thread_seconds(work: Callable[[], object]) -> float:
    """Return how long this thread runs in `work`."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def climb(
    arena: Arena, num_rows: int, probe: BandwidthProbe, rng: np.random.Generator
) -> list[Row]:
    """Return one row of figures a step, the steps alternating."""
    rows = ops.quantise_rows(arena.layout.scheme, rng.standard_normal((num_rows, DIM), np.float32))
    steps = [isa for isa in ops.available_isas() if isa != "scalar" or num_rows <= SLOW_ROWS]
    taken: dict[str, list[float]] = {isa: [] for isa in steps}
    probed: list[float] = []
    for alternation in range(ALTERNATIONS):
        read = min(thread_seconds(partial(probe.read, 1, way)) for way in probe.WAYS)
        probed.append(PROBE_BYTES / read / 1e9)
        for isa in steps:
            if isa == "scalar" and alternation >= 3:
                continue
            ops.set_isa(isa)
            num_visits = 8 if isa == "scalar" or num_rows > 8 else 32
            visits = rng.permutation(len(arena.experts))[:num_visits].tolist()
            work = layer_work(arena, rows, visits)
            taken[isa].append(thread_seconds(work) / num_visits)
    figures: list[Row] = []
    below = None
    for isa in steps:
        us = float(np.median(taken[isa])) * 1e6
        figures.append(
            {
                "step": isa,
                "format": arena.layout.gate_up.label,
                "rows": num_rows,
                "us_per_expert": us,
                "us_min": min(taken[isa]) * 1e6,
                "gb_per_s": arena.layout.num_bytes / us / 1e3,
                "gmac_per_s": 3 * DIM * FFN_DIM * num_rows / us / 1e3,
                "probe_gb_per_s": float(np.median(probed)),
                "gain": None if below is None else below / us,
            }
        )
        below = us
    return figures


def main() -> None:
    """Measure every step, format and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--rows", type=numbers, default=[1, 8, 128])
    chosen = parser.parse_args()
    ops.set_threads(1)
    rng, probe = np.random.default_rng(0), BandwidthProbe()
    figures: list[Row] = []
    for fmt in map(parse_format, chosen.formats.split(",")):
        arena = Arena(fmt, [random_expert(fmt, rng)])
        for num_rows in chosen.rows:
            figures += climb(arena, num_rows, probe, rng)
        del arena
    show(
        f"Expert FFN {DIM} x {FFN_DIM}, cold weights, one thread's CPU time",
        figures,
        {
            "format": lambda r: r["format"],
            "rows": lambda r: str(r["rows"]),
            "step": lambda r: r["step"],
            "us (min)": lambda r: f"{r['us_per_expert']:.0f} ({r['us_min']:.0f})",
            "GB/s": lambda r: f"{r['gb_per_s']:.1f}",
            "probe": lambda r: f"{r['probe_gb_per_s']:.1f}",
            "GMAC/s": lambda r: f"{r['gmac_per_s']:.1f}",
            "gain": lambda r: "" if r["gain"] is None else f"{r['gain']:.1f}",
        },
    )
    save("ladder", figures, dim=DIM, ffn_dim=FFN_DIM, alternations=ALTERNATIONS)


if __name__ == "__main__":
    main()
