"""Fidelity of --moe-dispatch batch, kept: `shoal bench fidelity` with commit, machine and command.

Counts and bits, no clock: a busy machine changes nothing.
"""

import argparse
import json
from pathlib import Path

from bench.measure import ROOT, save
from coordinator.corrected.fidelity_cmd import FidelityRequest, measure_fidelity, table

TEXTS = ROOT / "bench" / "traces" / "texts.jsonl"  # what fables was made to say


def fables_text() -> str:
    """Return texts of the model that comes with shoal, one after the other."""
    return "\n\n".join(json.loads(line)["text"] for line in TEXTS.read_text().splitlines()[1:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shadow", default="q4")
    parser.add_argument("--iters", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-zeros", action="store_true")
    parser.add_argument("--fables", action="store_true", help="read texts of its own kind")
    asked = parser.parse_args()
    report = measure_fidelity(
        FidelityRequest(
            str(asked.model),
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
    rows = fields.pop("rows")
    save(f"fidelity-{report.model}-{Path(asked.shadow).stem}", rows, **fields)


if __name__ == "__main__":
    main()
