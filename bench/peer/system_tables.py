"""Tables of docs/speed.md about parts and the system: experts, fan-out, nodes, memory, start."""

from bench.measure import Row
from bench.page import table
from bench.peer.engines import SHOAL
from bench.peer.experts import GGML, GGML_REPACKED

# What the two ports that multiply allow a core, 1e9 products of a weight and an activation a second
# (kernels/README.md counts the cycles): with AVX2 at 2.7 GHz, with AVX-512 VNNI at 4.0.
PORTS_GMAC_PER_S = {
    "avx2": {"q4_0": 126.0, "q4_k": 140.0, "q8_0": 70.0},
    "avx512": {"q4_0": 410.0, "q4_k": 414.0, "q8_0": 410.0},
}


def _cell(row: Row) -> str:
    return f"{row['format'].upper()}, {row['rows']} row" + ("s" if row["rows"] > 1 else "")


def _bound_us(row: Row, isa: str) -> float:
    """Return what an expert takes at least: memory as probed, or the ports that multiply."""
    read_us: float = row["bytes_per_expert"] / row["probe_gb_per_s"]["median"] / 1e3
    macs_per_us = PORTS_GMAC_PER_S[isa][row["format"]] * row["threads"] * 1e3
    return max(read_us, float(row["macs_per_expert"] / macs_per_us))


def experts(rows: list[Row], isa: str) -> str:
    """Return one layer's experts, beside ggml and beside what this CPU allows."""

    def time_us(row: Row, engine: str) -> str:
        us = row["us_per_expert"].get(engine)
        return f"{us['median']:.0f} ({us['min']:.0f}-{us['max']:.0f})" if us else "n/a"

    lines = [
        [
            _cell(row),
            str(row["threads"]),
            *(time_us(row, engine) for engine in (SHOAL, GGML, GGML_REPACKED)),
            f"**{row['ratio']['median']:.2f}** "
            f"({row['ratio']['min']:.2f}-{row['ratio']['max']:.2f})",
            f"{row['reach']:.2f}" if row["reach"] else "",
            f"{row['us_per_expert'][row['best_peer']]['median'] / _bound_us(row, isa):.2f}",
            f"{_bound_us(row, isa) / row['us_per_expert'][SHOAL]['median']:.0%}",
            f"{row['probe_gb_per_s']['median']:.1f}",
        ]
        for row in rows
    ]
    heads = ["", "threads", f"{SHOAL} us", f"{GGML} us", f"{GGML_REPACKED} us"]
    heads += ["to the better one", "reach", "the bound to it", "of the bound", "probe GB/s"]
    return table(heads, lines)


def experts_in_brief(rows: list[Row], isa: str) -> str:
    """Return the same, one line for both threads."""
    lines = []
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        us = [f"{row['us_per_expert'][SHOAL]['median']:.0f}" for row in (one, two)]
        ratio = [f"**{row['ratio']['median']:.2f}**" for row in (one, two)]
        best = [row["us_per_expert"][row["best_peer"]]["median"] for row in (one, two)]
        bound = [_bound_us(row, isa) for row in (one, two)]
        most = [f"{ggml_us / bound_us:.2f}" for ggml_us, bound_us in zip(best, bound, strict=True)]
        lines.append([_cell(one), *(", ".join(pair) for pair in (us, ratio, most))])
    return table(["1, 2 threads", "shoal us", "to the better ggml", "the bound to it"], lines)


def dispatch(rows: list[Row]) -> str:
    """Return what a fan-out costs, by transport and rows."""
    lines = [
        [
            str(row["transport"]),
            f"{row['rows']:.0f}",
            f"{row['latency_p50_us']:.0f}",
            f"{row['beyond_compute_p50_us']:.0f}",
            f"{row['beyond_compute_p99_us']:.0f}",
        ]
        for row in rows
    ]
    heads = ["transport", "rows", "p50 us", "beyond compute, p50 us", "p99 us"]
    return table(heads, lines)


def nodes(rows: list[Row]) -> str:
    """Return one process beside nodes on the same machine."""
    inside = rows[0]["decode_tokens_per_s"]["median"]
    lines = [
        [
            row["setup"],
            f"{row['decode_tokens_per_s']['median']:.1f}",
            f"{row['decode_tokens_per_s']['median'] / inside:.2f}",
            f"{row['prefill_tokens_per_s']['median']:.0f}",
            f"{row['dispatch_p50_us']['median']:.0f}",
            f"{row['beyond_compute_p50_us']['median']:.0f}",
        ]
        for row in rows
    ]
    heads = ["", "decode tok/s", "of one process", "prompt tok/s"]
    return table([*heads, "a layer's experts, p50 us", "beyond compute, p50 us"], lines)


def memory(rows: list[Row]) -> str:
    """Return what each process holds, at its peak, and what of it it had to."""
    lines = [
        [
            row["model"],
            f"{row['process']}, {row['setup']}",
            *(f"{row[key] / 1e6:.0f}" for key in ("held_bytes", "peak_rss_bytes", "beyond_bytes")),
            f"{row['reach_bytes'] / 1e6:.0f}",
        ]
        for row in rows
    ]
    return table(["model", "process", "has to hold MB", "peak MB", "beyond MB", "reach MB"], lines)


def start(rows: list[Row]) -> str:
    """Return the time to a command's first byte, or to the end of what its name says."""

    def seconds(row: Row, key: str) -> str:
        return "" if row[key] is None else f"{row[key]['median']:.2f}"

    def spread(wall: Row) -> str:
        return f"{wall['median']:.2f} ({wall['min']:.2f}-{wall['max']:.2f})"

    lines = [
        [
            f"`{row['command']}`",
            spread(row["wall_s"]),
            f"{row['cpu_s']['median']:.2f}",
            f"{row['bytes'] / 1e6:.0f}" if row["bytes"] else "",
            seconds(row, "read_s"),
            seconds(row, "touch_s"),
            spread(row["disk_s"]) if row["disk_s"] else "",
        ]
        for row in rows
    ]
    heads = ["", "wall s", "CPU s", "MB read", "bare reading s", "bare touching s"]
    heads.append("these bytes from the drive s")
    return table(heads, lines)
