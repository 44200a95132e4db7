"""Expert FFN with cold weights, against the read bandwidth of the same second.

python bench/bench_kernels.py [--formats q4_0,q4_k] [--rows 1,8,128] [--threads 1,2]

Experts of Qwen3-30B-A3B's shape (2048 x 768) are visited in random order, enough of them that no
cache holds the next one. Two works: `ffn`, one expert at a time; `layer`, the eight experts that
a token visits in one call, as a node computes them.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.measure import BandwidthProbe, Row, save, seconds, show, spread
from shoal import ops
from shoal.quant import Format, parse_format, row_bytes
from shoal.rows import Rows

U8 = NDArray[np.uint8]
DIM, FFN_DIM = 2048, 768
EXPERTS_PER_TOKEN = 8
ARENA_BYTES = 512 * 1024**2
ALTERNATIONS = 9
FORMATS = "q3_t,q4_t,q4_0,q4_1,q4_k,q8_0,bf16,f16,f32"


def random_rows(fmt: Format, num_rows: int, cols: int, rng: np.random.Generator) -> U8:
    """Return row-major weights whose scales are finite, whatever the format."""
    data = rng.integers(0, 256, (num_rows, row_bytes(fmt, cols)), np.uint8)
    if fmt.is_float:
        values = rng.standard_normal((num_rows, cols), np.float32) * np.float32(0.02)
        if fmt is Format.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        kept = values.astype(np.float16) if fmt is Format.F16 else values
        return kept.view(np.uint8)
    blocks = data.reshape(-1, fmt.block_bytes)
    scale = np.array([0.001, 0.004], np.float16).view(np.uint8)
    num_scale_bytes = 4 if fmt in (Format.Q4_1, Format.Q4_K) else 2
    blocks[:, :num_scale_bytes] = scale[:num_scale_bytes]
    return data


def random_expert(fmt: Format, rng: np.random.Generator) -> list[U8]:
    """Return gate, up and down, row-major."""
    shapes = ((FFN_DIM, DIM), (FFN_DIM, DIM), (DIM, FFN_DIM))
    return [random_rows(fmt, num_rows, cols, rng) for num_rows, cols in shapes]


class Arena:
    """Packed experts, each copied to as many addresses as make them cold.

    distinct: gate, up and down of each; expert i is distinct[i % len(distinct)]. num_experts: None:
    as many as make ARENA_BYTES.
    """

    def __init__(
        self, fmt: Format, distinct: Sequence[Sequence[U8]], num_experts: int | None = None
    ) -> None:
        self.layout = ops.ExpertLayout(DIM, FFN_DIM, fmt, fmt)
        stride = -(-self.layout.num_bytes // 4096) * 4096
        count = num_experts or max(4 * EXPERTS_PER_TOKEN, -(-ARENA_BYTES // stride))
        memory = ops.aligned_empty(count * stride, huge=True)
        self.experts = [
            memory[i * stride : i * stride + self.layout.num_bytes] for i in range(count)
        ]
        for expert, (gate, up, down) in zip(self.experts, distinct, strict=False):
            ops.pack_expert(self.layout, gate, up, down, expert)
        for i in range(len(distinct), count):
            self.experts[i][:] = self.experts[i % len(distinct)]


def ffn_work(arena: Arena, rows: Rows, visits: list[int]) -> Callable[[], None]:
    """Return what computes the visited experts one at a time."""

    def work() -> None:
        for i in visits:
            ops.expert_ffn(arena.layout, arena.experts[i], rows)

    return work


def layer_work(arena: Arena, rows: Rows, visits: list[int]) -> Callable[[], None]:
    """Return what computes the visited experts eight at a time, every row through all eight."""
    count = EXPERTS_PER_TOKEN
    offsets = np.arange(0, (count + 1) * rows.num_rows, rows.num_rows, dtype=np.int32)
    pair_rows = np.tile(np.arange(rows.num_rows, dtype=np.int32), count)
    weights = np.full(pair_rows.size, 1 / count, np.float32)

    def work() -> None:
        for first in range(0, len(visits) - count + 1, count):
            chosen = [arena.experts[i] for i in visits[first : first + count]]
            ops.expert_sums(arena.layout, chosen, rows, offsets, pair_rows, weights, 13, None)

    return work


WORKS = {"ffn": ffn_work, "layer": layer_work}


def measure(
    arena: Arena, num_rows: int, threads: int, probe: BandwidthProbe, rng: np.random.Generator
) -> list[Row]:
    """Return one row of figures a work."""
    ops.set_threads(threads)
    x = rng.standard_normal((num_rows, DIM), np.float32)
    rows = ops.quantise_rows(arena.layout.scheme, x)
    num_visits = 32 if num_rows <= 8 else EXPERTS_PER_TOKEN
    samples: dict[str, list[float]] = {name: [] for name in WORKS}
    probes = []
    for _ in range(ALTERNATIONS):
        probes.append(probe.gb_per_s(threads, repeats=1))
        for name, make in WORKS.items():
            visits = rng.permutation(len(arena.experts))[:num_visits].tolist()
            samples[name].append(seconds(make(arena, rows, visits)) / num_visits)
    macs = 3 * DIM * FFN_DIM * num_rows
    figures: list[Row] = []
    for name, taken in samples.items():
        us = {key: value * 1e6 for key, value in spread(taken).items()}
        probed = spread(probes)
        gb_per_s = arena.layout.num_bytes / us["median"] / 1e3
        figures.append(
            {
                "work": name,
                "format": arena.layout.gate_up.label,
                "rows": num_rows,
                "threads": threads,
                "us_per_expert": us,
                "gb_per_s": gb_per_s,
                "gmac_per_s": macs / us["median"] / 1e3,
                "probe_gb_per_s": probed,
                "share_of_probe": gb_per_s / probed["median"],
            }
        )
    return figures


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure every combination asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--rows", type=numbers, default=[1, 8, 128])
    parser.add_argument("--threads", type=numbers, default=[1, ops.num_threads()])
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    probe = BandwidthProbe()
    figures: list[Any] = []
    for fmt in map(parse_format, chosen.formats.split(",")):
        arena = Arena(fmt, [random_expert(fmt, rng)])
        for num_rows, threads in itertools.product(chosen.rows, sorted(set(chosen.threads))):
            figures += measure(arena, num_rows, threads, probe, rng)
        del arena
    show(
        f"Expert FFN {DIM} x {FFN_DIM}, cold weights ({ops.isa()})",
        figures,
        {
            "format": lambda r: r["format"],
            "work": lambda r: r["work"],
            "rows": lambda r: str(r["rows"]),
            "threads": lambda r: str(r["threads"]),
            "us per expert (min)": lambda r: (
                f"{r['us_per_expert']['median']:.1f} ({r['us_per_expert']['min']:.1f})"
            ),
            "GB/s": lambda r: f"{r['gb_per_s']:.1f}",
            "GMAC/s": lambda r: f"{r['gmac_per_s']:.0f}",
            "probe GB/s": lambda r: f"{r['probe_gb_per_s']['median']:.1f}",
            "share": lambda r: f"{r['share_of_probe']:.0%}",
        },
    )
    save("kernels", figures, dim=DIM, ffn_dim=FFN_DIM, alternations=ALTERNATIONS)


if __name__ == "__main__":
    main()
