"""From a trained checkpoint's hub folder to everything that the repository holds of the model.

    python -m tools.train_fables.finish OUT [--documents 400]

Converts, compares with transformers, measures, and writes shoal/models/fables.shoal, its card's
identity, bench/traces, tests/goldens/fables.json and the generated parts of docs/fables.md.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from shoal.artifact import Artifact
from tools.train_fables.passes import Reader
from tools.train_fables.report import stories_page, tables

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "shoal" / "models"
SHIPPED = MODELS / "fables.shoal"
TOLERANCE = 1e-3  # of logits against transformers in float32: DESIGN's measure of closeness
PROMPT = "Once upon a time"
GREEDY = ("--temperature", "0")  # these of tests/exactness/test_fables.py
SAMPLED = ("--seed", "7")
STORY_SEEDS = range(1, 11)


def shoal(*arguments: str) -> str:
    """Run a `shoal` command; return what it printed."""
    command = [sys.executable, "-P", "-m", "client", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"shoal {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def tool(name: str, *arguments: str) -> None:
    """Run a tool of this folder."""
    command = [sys.executable, "-m", f"tools.train_fables.{name}", *arguments]
    subprocess.run(command, cwd=ROOT, check=True)


def convert(out: Path, quant: str) -> Path:
    """Return the artifact of the hub folder in that format, made anew."""
    path = out / f"{quant}.shoal"
    shutil.rmtree(path, ignore_errors=True)
    shoal("convert", str(out / "hub"), str(path), "--quant", quant)
    return path


def check_against_transformers(exact: Path, reference: Path) -> float:
    """Return the largest difference of logits. Exits where it, or any argmax, is off."""
    data = np.load(reference)
    worst = 0.0
    for reading in Reader(exact).read(data["ids"].tolist(), keep_logits=True):
        clear = data["clear"][reading.index]  # up to a router's tie
        ours, theirs = reading.logits[clear], data["logits"][reading.index][clear]
        worst = max(worst, float(np.abs(ours - theirs).max()))
        wrong = int((ours.argmax(-1) != theirs.argmax(-1)).sum())
        if wrong or worst > TOLERANCE:
            raise SystemExit(f"row {reading.index}: {wrong} other tokens, logits differ by {worst}")
    return worst


def golden() -> dict[str, Any]:
    """Return what tests compare: a greedy and a sampled story, their logits' digests."""
    found: dict[str, Any] = {"identity": Artifact.open(SHIPPED).identity}
    for name, options in (("greedy", GREEDY), ("sampled", SAMPLED)):
        report = json.loads(
            shoal("run", str(SHIPPED), PROMPT, "--json", "--max-tokens", "120", *options)
        )
        kept = ("prompt_ids", "token_ids", "text", "logits_digest", "finish_reason")
        found[name] = {key: report[key] for key in kept}
    return found


def replace_between(path: Path, mark: str, text: str) -> None:
    """Put text between `<!-- mark -->` and `<!-- end of mark -->` of a page."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    page = path.read_text()
    head, tail = page.index(begin) + len(begin), page.index(end)
    path.write_text(page[:head] + text.rstrip("\n") + "\n" + page[tail:])


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=400)
    args = parser.parse_args()
    quantised, exact = convert(args.out, "q8_0"), convert(args.out, "f32")
    difference = check_against_transformers(exact, args.out / "reference.npz")
    print(f"f32: logits within {difference:.2g} of transformers', every likeliest token the same")
    evaluate = ["--artifact", str(quantised), "--exact", str(exact)]
    tool("evaluate", str(args.out), *evaluate, "--documents", str(args.documents))
    shutil.rmtree(SHIPPED, ignore_errors=True)
    shutil.copytree(quantised, SHIPPED)
    shutil.copyfile(args.out / "log.jsonl", ROOT / "docs" / "fables-training.jsonl")
    identity = Artifact.open(SHIPPED).identity
    card = MODELS / "README.md"
    card.write_text(re.sub(r"\b[0-9a-f]{64}\b", identity, card.read_text()))
    tool("record_traces")
    file = ROOT / "tests" / "goldens" / "fables.json"
    file.write_text(json.dumps(golden(), indent=1, ensure_ascii=False) + "\n")
    figures = json.loads((args.out / "figures.json").read_text())
    page = ROOT / "docs" / "fables.md"
    replace_between(page, "figures", tables(figures, difference))
    told = {seed: shoal("run", str(SHIPPED), PROMPT, "--seed", str(seed)) for seed in STORY_SEEDS}
    replace_between(page, "stories", stories_page(PROMPT, told))
    print(f"{SHIPPED}: {identity}")


if __name__ == "__main__":
    main()
