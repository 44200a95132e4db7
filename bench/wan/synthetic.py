"""A model of a wide geometry and random weights, on a link whose bandwidth counts.

The geometry is that of the model larql measured, 30 layers of 2816 values and 8 experts a token,
with half of its 128 experts and a quarter of their width: a row is as long on the wire, a node
computes less, as a node with a fast memory would. What is accepted is replayed (replay.py).
"""

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.make_synthetic import Geometry, make
from bench.measure import ROOT, Row
from bench.wan.cluster import FOLDER, Cluster, ask_all
from bench.wan.figures import Result, totals
from bench.wan.links import LinkSpeed
from bench.wan.record import TRACE
from bench.wan.worker import Request

WIDE = Geometry(
    layers=30, dim=2816, ffn_dim=192, experts=64, heads=16, kv_heads=4, vocab=32768, context=2048
)
LINK = LinkSpeed(rtt_s=0.045, up_mbit=20, down_mbit=100)
PROMPT_TOKENS = 16  # each takes 0.1 s of this uplink: what is measured is the answer
OFF_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Replayed:
    """What is replayed: a recorded case, and the answer of this model that takes its place."""

    case: str
    positions: Sequence[Mapping[str, Any]]
    request: Request
    answer: Sequence[int]
    decode_s: float  # of the whole answer, in one process


def make_wide_model() -> Path:
    """Make the model, unless it is there; return the artifact. Takes minutes."""
    path = FOLDER / "wide-30-layers-q4_0.shoal"
    if not path.exists():
        source, _ = make(FOLDER, path.stem, WIDE, "q4_0", 0)
        source.unlink()
    return path


def replayed_cases(cluster: Cluster, num_tokens: int, is_quick: bool) -> list[Replayed]:
    """Run the model in one process; return its answers with the recorded luck."""
    # One of each kind; two of them were sampled greedily.
    cases = json.loads(TRACE.read_text())["cases"]
    cases = [cases[index] for index in ((0, 6) if is_quick else (0, 1, 6, 7))]
    rng = random.Random(0)
    prompts = [tuple(rng.choices(range(WIDE.vocab), k=PROMPT_TOKENS)) for _ in cases]
    requests = [Request(prompt, num_tokens, 0.0) for prompt in prompts]
    results = ask_all(cluster.local_setup(), requests, 1)
    return [
        Replayed(case["case"], case["positions"], request, result["token_ids"], result["decode_s"])
        for case, request, result in zip(cases, requests, results, strict=True)
    ]


def measure_wide(cluster: Cluster, num_tokens: int, is_quick: bool) -> list[Row]:
    """Return a row a case, of off (fewer tokens) and of the replayed shadow.

    Raises RuntimeError where a token differs from what the model says in one process.
    """
    cluster.links.set(LINK)
    cases = replayed_cases(cluster, num_tokens, is_quick)
    guess_s = min(case.decode_s / (len(case.answer) - 1) for case in cases)
    rows: list[Row] = []
    for mode, limit, chosen in (
        ("off", OFF_TOKENS, cases[:1]),
        ("shadow, replayed", num_tokens, cases),
    ):
        for case, result in zip(chosen, _run(cluster, mode, chosen, limit, guess_s), strict=True):
            if result["token_ids"] != case.answer[:limit]:
                raise RuntimeError(f"{mode}, {case.case}: other tokens than in one process")
            rows.append(
                {
                    "mode": mode,
                    "case": case.case,
                    "guess_s": guess_s,
                    **totals([result]).figures(),
                    "bytes_per_row_and_layer": _bytes_per_row(result),
                    **result,
                }
            )
    return rows


def _bytes_per_row(result: Result) -> dict[str, float]:
    """Return what a row's experts of one layer take on the wire, to and from all nodes."""
    num_rows = PROMPT_TOKENS + result["passes"] + result["drafted"]
    return {way: result[f"bytes_{way}"] / num_rows / WIDE.layers for way in ("up", "down")}


def _run(
    cluster: Cluster, mode: str, cases: Sequence[Replayed], num_tokens: int, guess_s: float
) -> list[Result]:
    setup = cluster.setup({"mode": "off" if mode == "off" else "shadow"})
    given: dict[str, Any] = {
        "setup": asdict(setup),
        "guess_s": guess_s,
        "cases": [
            {
                "positions": case.positions,
                "answer": case.answer,
                "request": asdict(replace(case.request, max_tokens=num_tokens)),
            }
            for case in cases
        ],
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bench.wan.replay"],
        input=json.dumps(given) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]
