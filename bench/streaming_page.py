"""Put the newest figures of bench_streaming.py into docs/streaming.md, between its markers.

python -m bench.streaming_page [--model qwen3-30b-a3b-12-layers-q4_k-seed-0]

Every result file of that model counts; where several have the same residency, routing and engine,
the newest. Medians of repeats, with the least and the greatest where there are several.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, ROOT, Row
from bench.page import commit, link, put, table

PAGE = ROOT / "docs" / "streaming.md"
MODEL = "qwen3-30b-a3b-12-layers-q4_k-seed-0"
ROUTINGS = ("own", "trace", "uniform")
PEER = "llama.cpp"
HEADS = ["in memory", "routing", "engine", "warm tok/s", "bound", "of it", "hits", "MB missed"]
HEADS += ["÷ llama.cpp", "cold tok/s", "runs"]


@dataclass(frozen=True, slots=True)
class Measured:
    """An engine's two phases, in how many runs, and the report that they are of."""

    warm: Row
    cold: Row
    num_runs: int
    report: Mapping[str, Any]
    path: Path


Key = tuple[float, int, str]  # residency, place of the routing in ROUTINGS, engine


def newest(paths: list[Path]) -> dict[Key, Measured]:
    """Return what was measured last of each residency, routing and engine."""
    reports = [(json.loads(path.read_text("utf-8")), path) for path in paths]
    found: dict[Key, Measured] = {}
    for report, path in sorted(reports, key=lambda each: str(each[0]["date"])):
        phases: dict[Key, dict[str, Row]] = {}
        for row in report["rows"]:
            phases.setdefault(_key(row), {})[row["phase"]] = row
        runs = [_key(row) for row in report["samples"] if row["phase"] == "warm"]
        for key, row in phases.items():
            found[key] = Measured(row["warm"], row["cold"], runs.count(key), report, path)
    return found


def figures(found: Mapping[Key, Measured]) -> str:
    """Return the table."""
    order = list(found)  # engines in the order in which they were measured
    keys = sorted(order, key=lambda key: (key[0], key[1], key[2].startswith(PEER)))
    return table(HEADS, list(_lines(found, keys)))


def sources(found: Mapping[Key, Measured]) -> str:
    """Return where the figures are from."""
    reports = {each.path: each.report for each in found.values()}
    return "\n".join(
        f"- {link(path)}: {report['cpu']}, {report['num_cpus']} cores, {report['peer']}, "
        f"{commit(report)}, `{report['command']}`"
        for path, report in sorted(reports.items())
    )


def _key(row: Row) -> Key:
    return row["residency_percent"], ROUTINGS.index(row["routing"]), row["subject"]


def _lines(found: Mapping[Key, Measured], keys: list[Key]) -> Iterator[list[str]]:
    for key in keys:
        percent, place, engine = key
        warm, cold = found[key].warm, found[key].cold
        peers = [found[k].warm for k in keys if k[:2] == key[:2] and k[2].startswith(PEER)]
        ratio = ""
        if peers:
            best = max(peer["tokens_per_s"]["median"] for peer in peers)
            ratio = f"{warm['tokens_per_s']['median'] / best:.1f}"
        yield [
            f"{percent:g} %",
            ROUTINGS[place],
            engine,
            _spread(warm["tokens_per_s"], 2),
            f"{warm['bound_tokens_per_s']['median']:.1f}",
            _spread(warm["of_bound"], 0, 100) + " %",
            f"{100 * warm['hit_rate']['median']:.0f} %" if "hit_rate" in warm else "",
            f"{warm['missed_bytes_per_token']['median'] / 1e6:.0f}",
            ratio,
            _spread(cold["tokens_per_s"], 2),
            str(found[key].num_runs),
        ]


def _spread(figure: Mapping[str, float], digits: int, scale: float = 1.0) -> str:
    middle, least, most = (
        f"{figure[name] * scale:.{digits}f}" for name in ("median", "min", "max")
    )
    return middle if least == most else f"{middle} ({least}-{most})"


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="whose result files count")
    chosen = parser.parse_args()
    found = newest(sorted(RESULTS.glob(f"????-??-??-streaming-*{chosen.model}.json")))
    if not found:
        raise SystemExit(f"error: no result of bench_streaming.py for {chosen.model}")
    text = put(PAGE.read_text("utf-8"), "figures", f"{figures(found)}\n\n{sources(found)}")
    PAGE.write_text(text, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(found)} rows")


if __name__ == "__main__":
    main()
