"""What speculation yields behind a home link.

python -m bench.wan [--quick] [--parts modes prompt sweep synthetic] [--tokens 48]

SmolLM2 as BF16, its FFN cut into 30 layers of 16 experts that every token visits, on two node
processes behind a proxy of 45 ms there and back, no other limit. See docs/wan.md.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.measure import ROOT, Row, save, show
from bench.wan import drawing
from bench.wan.cluster import Cluster, make_model, make_shadow, open_cluster
from bench.wan.figures import totals
from bench.wan.links import LinkSpeed
from bench.wan.measure_modes import (
    all_cases,
    measure_long_prompt,
    measure_mode,
    references,
    summarise,
)
from bench.wan.modes import AUTO, MODES, Mode
from bench.wan.prompts import read_prompts
from bench.wan.sweep import sweep, sweep_cases
from bench.wan.synthetic import LINK as WIDE_LINK
from bench.wan.synthetic import WIDE, make_wide_model, measure_wide, shadow_shares

PARTS = ("modes", "prompt", "sweep", "synthetic")
WIDE_TOKENS = 48  # of an answer of the wide model, at most: some 45 s
LARQL_TOKENS_PER_S = 0.7  # its published figure: 30 layers, 45 ms
LINK = LinkSpeed(rtt_s=0.045)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts, few tokens")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--modes", nargs="+", choices=[mode.name for mode in MODES])
    parser.add_argument("--tokens", type=int, help="of an answer; default: 48, quick: 24")
    parser.add_argument("--sweep-tokens", type=int, help="default: 20, quick: 12")
    parser.add_argument("--name", default="wan", help="of the result files")
    chosen = parser.parse_args()
    chosen.tokens = chosen.tokens or (24 if chosen.quick else 48)
    chosen.sweep_tokens = chosen.sweep_tokens or (12 if chosen.quick else 20)
    return chosen


def number(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    """Return how a figure shows in a table."""
    return lambda row: f"{row[key] * scale:.{digits}f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "tok/s": number("tokens_per_s", 2),
    "decode tok/s": number("decode_tokens_per_s", 2),
    "tokens a pass": number("tokens_per_pass", 2),
    "accepted": lambda row: f"{row['accepted']:.0f} of {row['drafted']:.0f}",
    "round trips a token": number("round_trips_per_token", 1),
    "ms a pass": number("pass_s", 0, 1e3),
    "first token s": number("first_token_s", 2),
    "local expert MB": number("local_expert_bytes", 1, 1e-6),
    "of the model's": number("local_expert_share", 1, 100),
}


def measure_modes(
    cluster: Cluster, modes: Sequence[Mode], shadows: Mapping[str, Path], chosen: argparse.Namespace
) -> None:
    """Measure, print and save the comparison."""
    cases = all_cases(read_prompts(cluster.model), chosen.quick)
    expected = references(cluster, cases, chosen.tokens)
    cluster.links.set(LINK)
    rows: list[Row] = []
    for mode in modes:
        rows += measure_mode(cluster, mode, shadows, cases, expected, chosen.tokens)
    show(
        "Each prompt",
        rows,
        {
            "mode": lambda row: row["mode"],
            "prompt": lambda row: row["prompt"],
            "temperature": number("temperature", 1),
            "repeated": number("answer_repetition", 2),
            **COLUMNS,
        },
    )
    summary = summarise(rows)
    show(
        "Total tokens / total time",
        summary,
        {
            "mode": lambda row: row["mode"],
            "temperature": lambda row: (
                "all" if row["temperature"] is None else f"{row['temperature']:g}"
            ),
            **COLUMNS,
            "drafting ms a pass": number("draft_s_per_pass", 0, 1e3),
            "fan-out ms": number("fanout_p50_s", 1, 1e3),
        },
    )
    save(
        chosen.name,
        summary,
        **_conditions(cluster, chosen),
        reference_tokens_per_s={"larql": LARQL_TOKENS_PER_S},
        samples=rows,
    )


def measure_prompt(cluster: Cluster, chosen: argparse.Namespace) -> None:
    """Count and time a prompt of 512 tokens."""
    cluster.links.set(LINK)
    row = measure_long_prompt(cluster, LINK.rtt_s)
    print(
        f"a prompt of {row['prompt_tokens']} tokens: {row['round_trips']} round trips, first token "
        f"after {min(row['first_token_s']):.2f} s, {row['beyond_round_trips_s']:.2f} s of them "
        "beyond the round trips"
    )
    save(f"{chosen.name}-prompt", [row], **_conditions(cluster, chosen))


def measure_sweep(
    cluster: Cluster, shadows: Mapping[str, Path], chosen: argparse.Namespace
) -> None:
    """Sweep the round trip and draw it."""
    cases = sweep_cases(read_prompts(cluster.model))
    expected = references(cluster, cases, chosen.sweep_tokens)
    rows = sweep(cluster, shadows, cases, expected, chosen.sweep_tokens)
    show(
        "By round trip",
        rows,
        {
            "RTT ms": number("rtt_s", 0, 1e3),
            "mode": lambda row: row["mode"],
            "decode tok/s": number("decode_tokens_per_s", 2),
            "tokens a pass": number("tokens_per_pass", 2),
            "slowest case, ÷ off": number("slowest_of_off", 3),
            "most round trips, ÷ off": number("most_round_trips_of_off", 3),
            "local expert MB": number("local_expert_bytes", 1, 1e-6),
            "never slower": lambda row: "yes" if row["holds"] else "NO",
        },
    )
    save(f"{chosen.name}-sweep", rows, **_conditions(cluster, chosen))
    if not chosen.quick:
        drawing.draw_sweep(
            ROOT / "docs" / "wan-sweep.svg",
            rows,
            {"larql (published)": (LINK.rtt_s, LARQL_TOKENS_PER_S)},
        )


def measure_synthetic(scratch: Path, chosen: argparse.Namespace) -> None:
    """Measure the wide geometry on its link."""
    with open_cluster(make_wide_model(), scratch) as cluster:
        rows = measure_wide(cluster, min(chosen.tokens, WIDE_TOKENS), chosen.quick)
        summary = [
            {
                "mode": mode,
                **totals(mine).figures(),
                "first_token_s": sum(row["first_token_s"] for row in mine) / len(mine),
                "guess_s": mine[0]["guess_s"],
                "local_expert_bytes": mine[0]["local_expert_bytes"],
            }
            for mode in dict.fromkeys(row["mode"] for row in rows)
            if (mine := [dict(row) for row in rows if row["mode"] == mode])
        ]
        wire = {
            "up KB a row and layer": lambda row: (
                f"{row['bytes_per_row_and_layer']['up'] / 1e3:.2f}"
            ),
            "down": lambda row: f"{row['bytes_per_row_and_layer']['down'] / 1e3:.2f}",
        }
        heads = {"mode": lambda row: row["mode"], "case": lambda row: row.get("case", "all")}
        columns = {name: cell for name, cell in COLUMNS.items() if name != "of the model's"}
        show("30 layers of 2816 values, 100/20 Mbit/s", rows, {**heads, **columns, **wire})
        show("Total tokens / total time", summary, {**heads, **columns})
        save(
            f"{chosen.name}-wide",
            summary,
            **{**_conditions(cluster, chosen), "link": asdict(WIDE_LINK)},
            geometry=asdict(WIDE),
            shadow_shares=shadow_shares(),
            samples=rows,
        )


def _conditions(cluster: Cluster, chosen: argparse.Namespace) -> dict[str, object]:
    return {
        "model": cluster.model.artifact.name,
        "identity": cluster.model.artifact.identity,
        "model_expert_bytes": cluster.expert_bytes,
        "link": asdict(LINK),
        "tokens": chosen.tokens,
        "load_1_min": os.getloadavg()[0],
    }


def measure_smollm2(scratch: Path, modes: Sequence[Mode], chosen: argparse.Namespace) -> None:
    """Measure what is asked for of the real model."""
    path = make_model()
    wanted = {mode.shadow for mode in modes} if "modes" in chosen.parts else set()
    wanted |= {AUTO.shadow} if "sweep" in chosen.parts else set()
    shadows = {name: make_shadow(path, name) for name in sorted(filter(None, wanted))}
    with open_cluster(path, scratch) as cluster:
        if "prompt" in chosen.parts:
            measure_prompt(cluster, chosen)
        if "modes" in chosen.parts:
            measure_modes(cluster, modes, shadows, chosen)
        if "sweep" in chosen.parts:
            measure_sweep(cluster, shadows, chosen)


def main() -> None:
    """Measure the parts that are asked for."""
    chosen = arguments()
    modes = [mode for mode in MODES if chosen.modes is None or mode.name in chosen.modes]
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        if set(chosen.parts) - {"synthetic"}:
            measure_smollm2(Path(scratch), modes, chosen)
        if "synthetic" in chosen.parts:
            measure_synthetic(Path(scratch), chosen)


if __name__ == "__main__":
    main()
