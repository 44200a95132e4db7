"""Tokens a second behind a home link: stream, batch with N sweeps, and batch as a drafter.

Two node processes behind a proxy of 45 ms there and back; one prompt, greedy. A clock is in every
figure: a busy machine shows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.local_nodes import start_nodes
from bench.measure import ROOT, save, show
from bench.wan.links import Links, LinkSpeed
from client.node_process import stop_all
from client.shards import even_ranges, moe_shards
from shoal.artifact import Artifact

NUM_EXPERTS = 16  # that a dense FFN is cut into

PROMPT = "Once upon a time, in a small village by the sea, there lived an old fisherman who"
MODES = {
    "stream": ["--speculate", "off"],
    "speculate shadow": ["--speculate", "shadow", "--shadow", "q4"],
    "speculate batch": ["--speculate", "batch", "--shadow", "q4"],
    **{
        f"batch, {n} iters": ["--moe-dispatch", "batch", "--moe-iters", str(n), "--shadow", "q4"]
        for n in (1, 2, 3)
    },
}


def run(model: Path, shards: str, num_tokens: int, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "client", "run", str(model), PROMPT, "--json"]
    command += ["--moe-shards", shards, "--max-tokens", str(num_tokens), "--ignore-eos"]
    command += ["--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout)
    speculation = report["speculation"]
    return {
        "tok_per_s": report["timings"]["decode_tokens_per_s"],
        "first_token_s": report["timings"]["first_token_s"],
        "round_trips_per_token": speculation["round_trips_per_token"],
        "tokens_per_pass": speculation["tokens_per_pass"],
        "is_exact": report["moe_dispatch"]["is_exact"],
        "link_rtt_ms": report["moe_dispatch"]["link_rtt_ms"],
        "local_expert_bytes": speculation["local_expert_bytes"]
        or report["moe_dispatch"]["shadow_expert_bytes"],
        "text": report["text"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rtt", type=float, default=45.0, help="milliseconds")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    artifact = Artifact.open(asked.model)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nodes = start_nodes(asked.model, artifact, 2, scratch).nodes
        stack.callback(stop_all, nodes)
        links = stack.enter_context(Links([node.endpoint for node in nodes]))
        links.set(LinkSpeed(rtt_s=asked.rtt / 1000))
        shards = moe_shards(even_ranges(NUM_EXPERTS, 2), links.endpoints)
        for mode in asked.modes:
            figures = run(asked.model, shards, asked.tokens, MODES[mode])
            rows.append({"mode": mode, **figures})
            print(mode, figures, flush=True)
    columns = {
        "mode": lambda row: str(row["mode"]),
        "tok/s": lambda row: f"{row['tok_per_s']:.2f}",
        "round trips a token": lambda row: f"{row['round_trips_per_token']:.2f}",
        "exact": lambda row: "yes" if row["is_exact"] else "no",
        "expert MB here": lambda row: f"{row['local_expert_bytes'] / 1e6:.0f}",
    }
    show(f"{asked.rtt:g} ms there and back", rows, columns)
    save("batch-link", rows, rtt_ms=asked.rtt, tokens=asked.tokens)


if __name__ == "__main__":
    main()
