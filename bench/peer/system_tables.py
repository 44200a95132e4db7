"""Tables of docs/speed.md about parts and the system: experts, fan-out, nodes, memory, start."""

from bench.measure import Row
from bench.page import table
from bench.peer.engines import SHOAL
from bench.peer.experts import GGML, GGML_REPACKED

# What the two ports that multiply allow a core with AVX2 at 2.7 GHz, 1e9 products of a weight and
# an activation a second (kernels/README.md counts the cycles).
PORTS_GMAC_PER_S = {"q4_0": 126.0, "q4_k": 140.0, "q8_0": 70.0}


def experts(rows: list[Row]) -> str:
    """Return one layer's experts, beside ggml and beside what this CPU allows."""

    def time_us(row: Row, engine: str) -> str:
        us = row["us_per_expert"].get(engine)
        return f"{us['median']:.0f} ({us['min']:.0f}-{us['max']:.0f})" if us else "n/a"

    def bound_us(row: Row) -> float:
        read_us: float = row["bytes_per_expert"] / row["probe_gb_per_s"]["median"] / 1e3
        macs_per_us = PORTS_GMAC_PER_S[row["format"]] * row["threads"] * 1e3
        return max(read_us, float(row["macs_per_expert"] / macs_per_us))

    lines = [
        [
            f"{row['format'].upper()}, {row['rows']} row" + ("s" if row["rows"] > 1 else ""),
            str(row["threads"]),
            *(time_us(row, engine) for engine in (SHOAL, GGML, GGML_REPACKED)),
            f"**{row['ratio']['median']:.2f}** "
            f"({row['ratio']['min']:.2f}-{row['ratio']['max']:.2f})",
            f"{row['reach']:.2f}" if row["reach"] else "",
            f"{row['us_per_expert'][row['best_peer']]['median'] / bound_us(row):.2f}",
            f"{bound_us(row) / row['us_per_expert'][SHOAL]['median']:.0%}",
            f"{row['probe_gb_per_s']['median']:.1f}",
        ]
        for row in rows
    ]
    heads = ["", "threads", f"{SHOAL} us", f"{GGML} us", f"{GGML_REPACKED} us"]
    heads += ["to the better one", "reach", "the bound to it", "of the bound", "probe GB/s"]
    return table(heads, lines)


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
