"""Fidelity of --moe-dispatch batch, kept: `shoal bench fidelity` with commit, machine and command.

Counts and bits, no clock: a busy machine changes nothing.
"""

import argparse
import json
from typing import Any

from bench.measure import ROOT, save
from coordinator.app import CoordinatorConfig, OpenedModel
from coordinator.corrected.fidelity_cmd import FidelityRequest, measure_fidelity, table
from coordinator.tokenizer import Tokenizer

TEXTS = ROOT / "bench" / "traces" / "texts.jsonl"  # what fables was made to say


def fables_text() -> str:
    """Return texts of the model that comes with shoal, one after the other."""
    return "\n\n".join(json.loads(line)["text"] for line in TEXTS.read_text().splitlines()[1:4])


def readable(rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return rows of a report with what each mode wrote as text, in place of its token ids."""
    for row in rows:
        free = row["fidelity"]["free"]
        free["text"] = tokenizer.decode(free.pop("token_ids"))
    return rows


def main() -> None:
    """Measure, print the table, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--shadow", default="q4")
    parser.add_argument("--iters", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-zeros", action="store_true")
    parser.add_argument("--fables", action="store_true", help="read texts of its own kind")
    asked = parser.parse_args()
    report = measure_fidelity(
        FidelityRequest(
            asked.model,
            asked.shadow,
            iters=tuple(asked.iters),
            num_tokens=asked.tokens,
            threads=asked.threads,
            zeros=not asked.no_zeros,
            text=fables_text() if asked.fables else None,
        )
    )
    print(table(report))
    fields = report.as_json()
    tokenizer = OpenedModel(CoordinatorConfig(asked.model)).tokenizer
    rows = readable(fields.pop("rows"), tokenizer)
    text = "-own-texts" if asked.fables else ""
    save(f"fidelity-{report.model}-{report.shadow_format}{text}", rows, **fields)


if __name__ == "__main__":
    main()
