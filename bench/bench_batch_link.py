"""Tokens a second behind a home link: exact decoding, batch dispatch, and batch as a drafter.

    python -m bench.bench_batch_link

SmolLM2 with BF16 experts on two node processes, each behind a proxy of 45 ms there and back; one
prompt, greedy, a process of its own for each mode. What claims to be exact must say what stream
says. A clock is in most figures: a busy machine shows. round trips and tokens are counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure import ROOT, save, show
from bench.wan.cluster import make_model, make_shadow, open_cluster
from bench.wan.links import LinkSpeed

PROMPT = "Once upon a time, in a small village by the sea, there lived an old fisherman who"
STREAM = "stream"
MODES = {
    STREAM: ["--speculate", "off"],
    "speculate shadow": ["--speculate", "shadow"],
    "speculate batch": ["--speculate", "batch"],
    **{
        f"batch, {n} iters": ["--moe-dispatch", "batch", "--moe-iters", str(n)]
        for n in (1, 2, 3, 4)
    },
}


def run(model: Path, shards: str, num_tokens: int, arguments: list[str]) -> dict[str, Any]:
    """Return what `shoal run --json` says of one mode."""
    command = [sys.executable, "-P", "-m", "client", "run", str(model), PROMPT, "--json"]
    command += ["--moe-shards", shards, "--max-tokens", str(num_tokens), "--ignore-eos"]
    command += ["--temperature", "0", "--threads", "1", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout)
    speculation, dispatch = report["speculation"], report["moe_dispatch"]
    return {
        "tok_per_s": report["timings"]["decode_tokens_per_s"],
        "first_token_s": report["timings"]["first_token_s"],
        "round_trips_per_token": speculation["round_trips_per_token"],
        "tokens_per_pass": speculation["tokens_per_pass"],
        "is_exact": dispatch["is_exact"],
        "link_rtt_ms": dispatch["link_rtt_ms"],
        "local_expert_bytes": speculation["local_expert_bytes"] or dispatch["shadow_expert_bytes"],
        "token_ids": report["token_ids"],
        "text": report["text"],
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Count the leading tokens that each mode shares with the first. Raises where exact is not."""
    exact = rows[0]["token_ids"]
    for row in rows:
        ids = row.pop("token_ids")
        same = [mine == its for mine, its in zip(ids, exact, strict=True)]
        row["same_tokens"] = len(ids) if all(same) else same.index(False)
        if row["is_exact"] and not all(same):
            raise RuntimeError(f"{row['mode']} says something else than {STREAM}")


def main() -> None:
    """Measure every mode; print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rtt", type=float, default=45.0, help="milliseconds")
    parser.add_argument("--shadow", default="q4", choices=["q3", "q4"])
    asked = parser.parse_args()
    model = make_model()
    shadow = str(make_shadow(model, asked.shadow))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, open_cluster(model, Path(scratch)) as cluster:
        cluster.links.set(LinkSpeed(rtt_s=asked.rtt / 1000))
        for mode, arguments in MODES.items():
            stand_in = [] if mode == STREAM else ["--shadow", shadow]
            figures = run(model, cluster.shard_map, asked.tokens, [*arguments, *stand_in])
            rows.append({"mode": mode, **figures})
            print(f"{mode}: {figures['tok_per_s']:.2f} tok/s", flush=True)
        expert_bytes = cluster.expert_bytes
    compare(rows)
    columns = {
        "mode": lambda row: str(row["mode"]),
        "tok/s": lambda row: f"{row['tok_per_s']:.2f}",
        "round trips a token": lambda row: f"{row['round_trips_per_token']:.2f}",
        "exact": lambda row: "yes" if row["is_exact"] else "no",
        "first other token": lambda row: str(row["same_tokens"]),
        "expert MB here": lambda row: f"{row['local_expert_bytes'] / 1e6:.0f}",
    }
    show(f"{asked.rtt:g} ms there and back, {asked.tokens} tokens", rows, columns)
    save("batch-link", rows, rtt_ms=asked.rtt, tokens=asked.tokens, expert_bytes=expert_bytes)


if __name__ == "__main__":
    main()
