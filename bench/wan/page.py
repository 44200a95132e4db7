"""Put the newest figures into docs/wan.md, between its markers.

python -m bench.wan.page [--name wan]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, ROOT, Row
from bench.page import commit, link, put, table

PAGE = ROOT / "docs" / "wan.md"
Report = dict[str, Any]


def source(report: Report, path: Path) -> str:
    """Return where the figures are from."""
    return (
        f"{link(path)}: {report['cpu']}, {report['num_cpus']} cores, load "
        f"{report['load_1_min']:.1f}, {commit(report)}, `{report['command']}`."
    )


def modes(report: Report) -> str:
    """Return the totals of each mode."""
    lines = [
        [
            row["mode"],
            "both" if row["temperature"] is None else f"{row['temperature']:g}",
            f"**{row['tokens_per_s']:.2f}**" if row["temperature"] is None else _rate(row),
            f"{row['decode_tokens_per_s']:.2f}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['accepted']:.0f} of {row['drafted']:.0f}",
            f"{row['round_trips_per_token']:.1f}",
            f"{row['pass_s'] * 1e3:.0f} + {row['draft_s_per_pass'] * 1e3:.0f}",
            f"{row['local_expert_bytes'] / 1e6:.1f} ({row['local_expert_share']:.1%})",
        ]
        for row in map(_net, report["rows"])
    ]
    heads = ["mode", "temperature", "tok/s", "decode tok/s", "tokens a pass", "accepted"]
    heads += ["round trips a token", "ms a pass, drafting", "local expert MB (of the model's)"]
    return table(heads, lines)


def prompts(report: Report) -> str:
    """Return each prompt's tokens a second, and tokens a pass, by mode."""
    samples: list[Row] = report["samples"]
    names = list(dict.fromkeys(row["mode"] for row in samples))
    lines: list[list[str]] = []
    for key in dict.fromkeys((row["prompt"], row["temperature"]) for row in samples):
        mine = {row["mode"]: row for row in samples if (row["prompt"], row["temperature"]) == key}
        row = max(mine.values(), key=lambda row: len(row["token_ids"]))
        lines.append(
            [
                key[0],
                f"{key[1]:g}",
                f"{row['prompt_tokens']} → {len(row['token_ids'])}",
                f"{row['prompt_repetition']:.0%}, {row['answer_repetition']:.0%}",
                *(f"{_rate(mine[name])} ({mine[name]['tokens_per_pass']:.1f})" for name in names),
            ]
        )
    heads = [_named(samples, name) for name in names]
    return table(["prompt", "temperature", "tokens", "repeated", *heads], lines)


def _named(rows: Sequence[Row], mode: str) -> str:
    """Return a mode with what its drafters keep of experts."""
    num_bytes = max(row["local_expert_bytes"] for row in rows if row["mode"] == mode)
    return f"{mode}; {num_bytes / 1e6:.1f} MB"


def prompt(report: Report) -> str:
    """Return the sentence on the long prompt."""
    (row,) = report["rows"]
    return (
        f"A prompt of {row['prompt_tokens']} tokens takes {row['round_trips']} round trips; its "
        f"first token comes after {min(row['first_token_s']):.2f} s, "
        f"{row['beyond_round_trips_s']:.2f} s more than those take (the best of "
        f"{len(row['first_token_s'])}; two cores compute for everybody)."
    )


def sweep(report: Report) -> str:
    """Return the sweep, drawn and as a table."""
    rows: list[Row] = report["rows"]
    names = list(dict.fromkeys(row["mode"] for row in rows))
    lines: list[list[str]] = []
    for rtt_s in dict.fromkeys(row["rtt_s"] for row in rows):
        mine = [row for row in rows if row["rtt_s"] == rtt_s]
        cells = [f"{row['decode_tokens_per_s']:.2f} ({row['tokens_per_pass']:.1f})" for row in mine]
        worst = [
            f"{row['slowest_of_off']:.3f}, {row['most_round_trips_of_off']:.3f}" for row in mine[1:]
        ]
        held = ["yes" if row["holds"] else "**no**" for row in mine[1:]]
        lines.append([f"{rtt_s * 1e3:g} ms", *cells, *worst, ", ".join(held)])
    heads = [_named(rows, name) for name in names]
    worst_heads = [f"worst prompt of {name}, ÷ off: time, round trips" for name in names[1:]]
    drawn = "![tokens a second over the round trip](wan-sweep.svg)"
    return f"{drawn}\n\n" + table(["round trip", *heads, *worst_heads, "never slower"], lines)


def wide(report: Report) -> str:
    """Return the wide geometry's figures."""
    lines = [
        [
            row["mode"],
            row.get("case", "**all**"),
            _rate(row),
            f"{row['decode_tokens_per_s']:.2f}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['accepted']:.0f} of {row['drafted']:.0f}",
            f"{row['round_trips_per_token']:.1f}",
            f"{row['pass_s'] * 1e3:.0f}",
            f"{row['local_expert_bytes'] / 1e9:.2f}",
        ]
        for row in [*report["samples"], *report["rows"]]
    ]
    heads = ["mode", "replayed from", "tok/s", "decode tok/s", "tokens a pass", "accepted"]
    shares = " and ".join(
        f"{share:.0%} of {kind}" for kind, share in report["shadow_shares"].items()
    )
    guess_s = report["rows"][-1]["guess_s"]
    sentence = f"A guess takes {guess_s * 1e3:.0f} ms. The shadow's bytes are {shares} experts'."
    return (
        table([*heads, "round trips a token", "ms a pass", "local expert GB"], lines)
        + f"\n\n{sentence}"
    )


def _rate(row: Row) -> str:
    return f"{row['tokens_per_s']:.2f}"


def _net(row: Row) -> Row:
    """Return the row with drafting taken out of the pass."""
    return {**row, "pass_s": row["pass_s"] - row["draft_s_per_pass"]}


BLOCKS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "modes": ("", modes),
    "prompts": ("", prompts),
    "prompt": ("-prompt", prompt),
    "sweep": ("-sweep", sweep),
    "wide": ("-wide", wide),
}


def filled(text: str, name: str) -> str:
    """Return the page with its blocks written anew, those of which there are figures."""
    for block, (suffix, write) in BLOCKS.items():
        files = sorted(RESULTS.glob(f"????-??-??-{name}{suffix}.json"))
        if files:
            report = json.loads(files[-1].read_text())
            text = put(text, block, f"{write(report)}\n\n{source(report, files[-1])}")
    return text


def main() -> None:
    """Rewrite the blocks of which there are figures; name the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="wan", help="of the result files")
    chosen = parser.parse_args()
    text = filled(PAGE.read_text("utf-8"), chosen.name)
    PAGE.write_text(text, "utf-8")
    for block in BLOCKS:
        if f"<!-- {block} -->\n<!-- end -->" in text:
            print(f"no figures for {block}")


if __name__ == "__main__":
    main()
