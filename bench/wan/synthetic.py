"""A model of a wide geometry and random weights, on a link whose bandwidth counts.

The geometry is that of the model larql measured, 30 layers of 2816 values and 8 of 128 experts a
token (REAL). What runs (WIDE) has half of the experts and a quarter of their width: a row is as
long on the wire, a node computes less, as one with a fast memory would. What is accepted is
replayed (replay.py): the luck of a 4-bit shadow of a Q8_0 model, whose rows travel as this model's
do, and that of one of a BF16 model, whose rows are float32, four times as long.

What does not follow from WIDE is reckoned for REAL: what the shadow takes of memory, and, in
proportion to the weights that a token reads, how long it takes to guess.
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
from bench.wan.record import trace_of
from bench.wan.worker import Request
from shoal.quant import Format
from shoal.wire import request_row_bytes

WIDE = Geometry(
    layers=30, dim=2816, ffn_dim=192, experts=64, heads=16, kv_heads=4, vocab=32768, context=2048
)
REAL = replace(WIDE, ffn_dim=704, experts=128)
LINK = LinkSpeed(rtt_s=0.045, up_mbit=20, down_mbit=100)
DENSE_FORMAT, SHADOW_FORMAT = Format.Q8_0, Format.Q4_T
TARGETS = (Format.Q8_0, Format.BF16)  # of which the shadow is a share
PROMPT_TOKENS = 16  # each takes 0.1 s of this uplink: what is measured is the answer
OFF_TOKENS = 5
FLOAT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """What this model says in one process, in place of the recorded case of that index."""

    index: int
    request: Request
    token_ids: Sequence[int]
    decode_s: float


@dataclass(frozen=True, slots=True)
class Way:
    """One row of the table.

    answers: which are asked for again, over the link. target: whose luck is replayed, and whose
        rows' length on the wire it is.
    """

    name: str
    num_tokens: int
    answers: Sequence[Answer]
    target: Format = Format.Q8_0
    drafts: bool = True

    @property
    def link(self) -> LinkSpeed:
        """The home link. What runs has int8 rows: longer ones are a slower uplink."""
        sizes = [
            request_row_bytes(WIDE.dim, target.scheme, WIDE.experts_per_token)
            for target in (Format.Q8_0, self.target)
        ]
        assert LINK.up_mbit is not None
        return replace(LINK, up_mbit=LINK.up_mbit * sizes[0] / sizes[1])


def expert_params(geometry: Geometry, num_experts: int) -> int:
    """Return the weights of so many experts of every layer."""
    return geometry.layers * num_experts * 3 * geometry.dim * geometry.ffn_dim


def bytes_of(num_params: int, held_as: Format) -> float:
    """Return what weights take in a format, its scales included."""
    return num_params * held_as.block_bytes / held_as.block_cols


def bytes_a_token_reads(geometry: Geometry) -> float:
    """Return the weights that a shadow of that geometry goes through for one guess, in bytes."""
    g = geometry
    attention = 2 * g.dim * (g.heads + g.kv_heads) * g.head_dim
    dense = bytes_of(g.layers * attention + g.vocab * g.dim, DENSE_FORMAT)
    return dense + bytes_of(expert_params(g, g.experts_per_token), SHADOW_FORMAT)


def shadow_bytes() -> int:
    """Return what a shadow of all experts of the real geometry would take."""
    return round(bytes_of(expert_params(REAL, REAL.experts), SHADOW_FORMAT))


def shadow_shares() -> dict[str, float]:
    """Return that, of the experts' own bytes, by the format of the target."""
    params = expert_params(REAL, REAL.experts)
    return {target.name: shadow_bytes() / bytes_of(params, target) for target in TARGETS}


def make_wide_model() -> Path:
    """Make the model, unless it is there; return the artifact. Takes minutes."""
    path = FOLDER / "wide-30-layers-q4_0.shoal"
    if not path.exists():
        source, _ = make(FOLDER, path.stem, WIDE, "q4_0", 0)
        source.unlink()
    return path


def luck_of(target: Format) -> list[dict[str, Any]]:
    """Return the recorded cases: greedily, then at a temperature, one of each kind."""
    cases: list[dict[str, Any]] = json.loads(trace_of(target.name.lower()).read_text())["cases"]
    return cases


def answers(cluster: Cluster, num_tokens: int, is_quick: bool) -> list[Answer]:
    """Run the model in one process, from random prompts."""
    # One of each kind; two of them were sampled greedily.
    indices = (0, 6) if is_quick else (0, 1, 6, 7)
    rng = random.Random(0)
    prompts = [tuple(rng.choices(range(WIDE.vocab), k=PROMPT_TOKENS)) for _ in indices]
    requests = [Request(prompt, num_tokens, 0.0) for prompt in prompts]
    results = ask_all(cluster.local_setup(), requests, 1)
    return [
        Answer(index, request, result["token_ids"], result["decode_s"])
        for index, request, result in zip(indices, requests, results, strict=True)
    ]


def measure_wide(cluster: Cluster, num_tokens: int, is_quick: bool) -> list[Row]:
    """Return a row a case: of off, and of the replayed shadow with rows of either form.

    Raises RuntimeError where a token differs from what the model says in one process.
    """
    alone = answers(cluster, num_tokens, is_quick)
    own_s = min(answer.decode_s / (len(answer.token_ids) - 1) for answer in alone)
    guess_s = own_s * bytes_a_token_reads(REAL) / bytes_a_token_reads(WIDE)
    float_tokens = min(num_tokens, FLOAT_TOKENS)
    rows: list[Row] = []
    for way in (
        Way("off", OFF_TOKENS, alone[:1], drafts=False),
        Way("shadow of Q8_0", num_tokens, alone),
        Way("shadow of BF16, float rows", float_tokens, alone[::2], target=Format.BF16),
    ):
        cluster.links.set(way.link)
        luck = luck_of(way.target)
        for answer, result in zip(way.answers, _run(cluster, way, luck, guess_s), strict=True):
            case = str(luck[answer.index]["case"])
            if result["token_ids"] != answer.token_ids[: way.num_tokens]:
                raise RuntimeError(f"{way.name}, {case}: other tokens than in one process")
            rows.append(
                {
                    "mode": way.name,
                    "case": case,
                    "guess_s": guess_s,
                    "up_mbit": way.link.up_mbit,
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
    cluster: Cluster, way: Way, luck: Sequence[Mapping[str, Any]], guess_s: float
) -> list[Result]:
    setup = cluster.setup({"mode": "shadow" if way.drafts else "off"})
    given: dict[str, Any] = {
        "setup": asdict(setup),
        "guess_s": guess_s,
        "local_expert_bytes": shadow_bytes(),
        "cases": [
            {
                "positions": luck[answer.index]["positions"],
                "answer": answer.token_ids,
                "request": asdict(replace(answer.request, max_tokens=way.num_tokens)),
            }
            for answer in way.answers
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
