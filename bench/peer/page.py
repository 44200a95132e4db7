"""Put the newest figures into docs/speed.md, between its markers, and draw its pictures.

python -m bench.peer.page
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, ROOT, Row
from bench.page import commit, link, put, table
from bench.peer.drawing import Line, Panel, draw_bars, draw_panels
from bench.peer.engines import LLAMA, LLAMA_REPACKED, SHOAL
from bench.peer.scaling import IN_PROCESS, Cost, Shape
from bench.peer.system_tables import (
    dispatch,
    experts,
    experts_in_brief,
    memory,
    nodes,
    start,
)
from bench.peer.where import GAPS, rate

DOCS = ROOT / "docs"
PAGE = DOCS / "speed.md"
STEM = "qwen3-30b-a3b-12-layers-{}-seed-0"
FORMATS = ("q4_k", "q4_0")
EXPERT_FORMATS = ("q4_0", "q4_k", "q8_0")
Report = dict[str, Any]


def newest(name: str, isa: str | None = None) -> tuple[Report, Path] | None:
    """Return the newest result of that name, of any or of one instruction set."""
    for path in sorted(RESULTS.glob(f"????-??-??-{name}.json"), reverse=True):
        report: Report = json.loads(path.read_text())
        if isa in (None, report["isa"]):
            return report, path
    return None


def _made_by(report: Report) -> str:
    machine = f"{report['cpu']}, {report['num_cpus']} cores, {report['isa']}"
    return f"{machine}, {commit(report)}"


def source(report: Report, path: Path) -> str:
    """Return where figures are from."""
    return sources([(report, path)])


def sources(found: Sequence[tuple[Report, Path]]) -> str:
    """Return where figures of several results are from."""
    links: dict[str, list[str]] = {}
    for report, path in found:
        links.setdefault(_made_by(report), []).append(link(path))
    return "; ".join(f"{', '.join(made)}: {by}" for by, made in links.items()) + "."


def _rate(row: Row, engine: str) -> str:
    rate = row["tokens_per_s"][engine]
    return f"{rate['median']:.1f} ({rate['min']:.1f}-{rate['max']:.1f})"


def _ratio(ratio: Row) -> str:
    return f"**{ratio['median']:.2f}** ({ratio['min']:.2f}-{ratio['max']:.2f})"


def peer(report: Report, path: Path) -> str:
    """Return the table of one format."""
    lines = [
        [
            row["phase"],
            str(row["threads"]),
            _rate(row, SHOAL),
            _rate(row, LLAMA),
            _rate(row, LLAMA_REPACKED),
            _ratio(row["ratio"]),
            _of_bound(row),
            f"{row['probe_gb_per_s']['median']:.1f}",
        ]
        for row in report["rows"]
    ]
    heads = ["", "threads", SHOAL, LLAMA, LLAMA_REPACKED, "to the better one"]
    heads += ["of the weights' bound", "probe GB/s"]
    return f"{table(heads, lines)}\n\n{source(report, path)}"


def _of_bound(row: Row) -> str:
    share = row["share_of_weight_bound"]
    return f"{share['median']:.0%} ({share['min']:.0%}-{share['max']:.0%})" if share else ""


def peers_in_brief(reports: Sequence[Report]) -> str:
    """Return each phase's rate and ratio, a report a pair of columns."""
    phases = [row["phase"] for row in reports[0]["rows"]]
    by_phase = [{row["phase"]: row for row in report["rows"]} for report in reports]
    lines = [
        [phase]
        + [
            cell
            for rows in by_phase
            for cell in (
                f"{rows[phase]['tokens_per_s'][SHOAL]['median']:.1f}",
                f"**{rows[phase]['ratio']['median']:.2f}**",
            )
        ]
        for phase in phases
    ]
    heads = [head for fmt in FORMATS for head in (f"{fmt.upper()} tok/s", "to the better one")]
    return table(["", *heads], lines)


def without_avx512() -> str | None:
    """Return what AVX2 alone reached, from the newest results of a CPU that has no more."""
    peers = [newest("peer-" + STEM.format(fmt), "avx2") for fmt in FORMATS]
    layers = [newest(f"experts-{fmt}", "avx2") for fmt in EXPERT_FORMATS]
    found = [each for each in (*peers, *layers) if each is not None]
    if len(found) < len(peers) + len(layers):
        return None
    reports = [report for report, _ in found]
    rows = [row for report in reports[len(peers) :] for row in report["rows"]]
    tables = [peers_in_brief(reports[: len(peers)]), experts_in_brief(rows, "avx2")]
    return "\n\n".join([*tables, sources(found)])


def draw_peer(report: Report, path: Path, fmt: str) -> None:
    """Draw what two threads reach."""
    most = max(row["threads"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["threads"] == most]
    engines = (SHOAL, LLAMA, LLAMA_REPACKED)
    bars = [(row["phase"], [row["tokens_per_s"][e]["median"] for e in engines]) for row in rows]
    draw_bars(
        path, f"tokens a second, {most} threads, {fmt}; each row on its own scale", bars, engines
    )


def draw_scaling(report: Report, path: Path) -> None:
    """Draw measured points and what the cost says."""
    rows: list[Row] = report["rows"]
    shape, cost = Shape(**report["shape"]), Cost(**report["cost"])
    own = shape.experts_per_token
    inside = [row for row in rows if row["setup"] == IN_PROCESS]
    one = [row for row in inside if row["rows"] == 1 and row["experts_per_token"] == own]
    behind = next(row["context"] for row in inside if row["rows"] > 1)
    verify = [row for row in inside if row["context"] == behind and row["experts_per_token"] == own]
    experts = [row for row in inside if row["rows"] == 1 and row["context"] == behind]
    nodes = [row for row in rows if row["setup"] != IN_PROCESS]

    def panel(title: str, label: str, mine: Sequence[Row], key: str, *, log: bool) -> Panel:
        measured = [(row[key], row["tokens_per_s"]) for row in mine]
        model = [
            (
                row[key],
                row["rows"]
                / cost.seconds(shape, row["rows"], row["context"], row["experts_per_token"]),
            )
            for row in mine
        ]
        return Panel(title, label, [Line("measured", measured), Line("cost", model, False)], log)

    spread = [(int(row["setup"].split()[0]), row["tokens_per_s"]) for row in nodes]
    draw_panels(
        path,
        [
            panel("tok/s over context", "tokens in the cache", one, "context", log=False),
            panel(f"tok/s over rows a pass, behind {behind}", "rows", verify, "rows", log=True),
            panel("tok/s over experts a token", "experts", experts, "experts_per_token", log=True),
            Panel(
                f"tok/s over nodes on this machine ({report['num_cpus']} cores)",
                "nodes",
                [Line("measured", spread)],
                logarithmic=True,
            ),
        ],
    )


def scaling(report: Report, path: Path) -> str:
    """Return the sentence on the cost, and where it is from."""
    cost = Cost(**report["cost"])
    rows = [row for row in report["rows"] if row["setup"] == IN_PROCESS]
    worst = max(abs(row["predicted_s"] / row["pass_s"]["median"] - 1) for row in rows)
    shape = Shape(**report["shape"])
    always_s = cost.fixed_s + shape.dense_bytes / cost.bytes_per_s
    return (
        f"A pass takes {always_s * 1e3:.1f} ms for what every pass does, reading "
        f"{shape.dense_bytes / 1e6:.0f} MB of dense weights in it, + "
        f"{shape.expert_bytes / cost.bytes_per_s * 1e6:.0f} µs an expert that any row visits "
        f"({shape.expert_bytes / 1e6:.0f} MB in all layers) + {cost.pair_s * 1e6:.0f} µs an expert "
        f"of a row + {cost.row_s * 1e3:.2f} ms a row + {cost.key_s * 1e6:.2f} µs for each earlier "
        f"token that a row attends to; no point of one process is further than {worst:.0%} from "
        f"that. The probe: {max(report['probe_gb_per_s']):.1f} GB/s. {source(report, path)}"
    )


def where(report: Report, path: Path) -> str:
    """Return the table of what a token's time goes to; small parts in one line."""
    parts = [row for row in report["rows"] if row["weight_bytes"] or row["what"] == GAPS]
    rest = sum(row["ms"] for row in report["rows"]) - sum(row["ms"] for row in parts)
    lines = [
        [
            {"expert_sums": "experts"}.get(row["what"], row["what"]),
            f"{row['ms']:.2f}",
            f"{row['weight_bytes'] / 1e6:.0f}" if row["weight_bytes"] else "",
            f"{rate(row):.1f}" if row["weight_bytes"] else "",
        ]
        for row in parts
    ]
    lines.append(["all other native calls", f"{rest:.2f}", "", ""])
    return (
        f"{table(['', 'ms', 'MB of weights', 'GB/s'], lines)}\n\n"
        f"A token: {report['token_ms']:.1f} ms with nothing timed, {report['threads']} threads; "
        f"the probe: {report['probe_gb_per_s']:.1f} GB/s. {source(report, path)}"
    )


def main() -> None:
    """Write the page and its pictures."""
    text = PAGE.read_text()
    for fmt in FORMATS:
        if (found := newest("peer-" + STEM.format(fmt))) is not None:
            text = put(text, f"peer-{fmt}", peer(*found))
            draw_peer(found[0], DOCS / f"speed-{fmt}.svg", fmt)
    if (found := newest("peer-1-thread-" + STEM.format("q4_k"))) is not None:
        text = put(text, "peer-1-thread", peer(*found))
    if (found := newest("scaling-" + STEM.format("q4_k"))) is not None:
        text = put(text, "scaling", scaling(*found))
        draw_scaling(found[0], DOCS / "speed-scaling.svg")
    if (found := newest("where-" + STEM.format("q4_k"))) is not None:
        text = put(text, "where", where(*found))
    results = [newest(f"experts-{fmt}") for fmt in EXPERT_FORMATS]
    if measured := [each for each in results if each is not None]:
        rows = [row for report, _ in measured for row in report["rows"]]
        isa = measured[0][0]["isa"]
        text = put(text, "experts", f"{experts(rows, isa)}\n\n{sources(measured)}")
    if (brief := without_avx512()) is not None:
        text = put(text, "without-avx512", brief)
    model = "model-" + STEM.format("q4_k")
    for name, block, make in (
        ("dispatch", "dispatch", dispatch),
        (model, "nodes", nodes),
        ("memory", "memory", memory),
        ("start", "start", start),
    ):
        if (found := newest(name)) is not None:
            report, path = found
            text = put(text, block, f"{make(report['rows'])}\n\n{source(report, path)}")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
