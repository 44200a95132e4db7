"""Tables of docs/speed.md about the whole system: fan-out, nodes, memory and start."""

from bench.measure import Row
from bench.page import table


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
    """Return the time to a command's first byte."""

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
        ]
        for row in rows
    ]
    heads = ["", "first byte s", "CPU s", "MB read", "bare reading s", "bare touching s"]
    return table(heads, lines)
