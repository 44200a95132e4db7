"""Speculation off, with nothing local, and with a shadow, at round trips of 1 to 100 ms."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.measure import Row
from bench.wan.cluster import Cluster
from bench.wan.figures import Result, totals
from bench.wan.links import LinkSpeed
from bench.wan.measure_modes import GREEDY, WARM, Case, measure_mode
from bench.wan.modes import AUTO, BARE, OFF, Mode
from bench.wan.prompts import Prompt

RTTS_S = (0.001, 0.005, 0.020, 0.045, 0.100)
TIMED_FROM_S = 0.020  # below it round trips are compared: other work on the machine shows in time
TOLERANCE = 0.03
# The same words again and again, and hardly a word twice.
CASES = (("code-rename", GREEDY), ("story-keeper", WARM))


def sweep_cases(prompts: Sequence[Prompt]) -> list[Case]:
    """Return what is generated: what speculation likes best, and least."""
    named = {prompt.name: prompt for prompt in prompts}
    return [Case(named[name], temperature) for name, temperature in CASES]


def sweep(
    cluster: Cluster,
    shadows: Mapping[str, Path],
    cases: Sequence[Case],
    expected: Sequence[Result],
    num_tokens: int,
) -> list[Row]:
    """Return a row an RTT and mode, one request at a time."""
    rows: list[Row] = []
    for rtt_s in RTTS_S:
        cluster.links.set(LinkSpeed(rtt_s))
        print(f"round trips of {rtt_s * 1e3:g} ms", flush=True)
        modes = (replace(OFF, share=min(1.0, TIMED_FROM_S / rtt_s)), BARE, AUTO)
        off: list[Row] = []
        for mode in modes:
            mine = measure_mode(cluster, mode, shadows, cases, expected, num_tokens, lanes=1)
            off = off or mine
            rows.append(compared(rtt_s, mode, mine, off))
    return rows


def compared(rtt_s: float, mode: Mode, mine: Sequence[Row], off: Sequence[Row]) -> Row:
    """Return the totals, and how the worst case compares with off."""
    slowest = max(
        that["decode_tokens_per_s"] / this["decode_tokens_per_s"]
        for this, that in zip(mine, off, strict=True)
    )
    most = max(
        trips_per_token(this) / trips_per_token(that) for this, that in zip(mine, off, strict=True)
    )
    return {
        "rtt_s": rtt_s,
        "mode": mode.name,
        **totals([dict(row) for row in mine]).figures(),
        "slowest_of_off": slowest,
        "most_round_trips_of_off": most,
        "holds": (slowest if rtt_s >= TIMED_FROM_S else most) <= 1 + TOLERANCE,
        "local_expert_bytes": max(row["local_expert_bytes"] for row in mine),
        "cases": [
            {
                key: row[key]
                for key in (
                    "prompt",
                    "temperature",
                    "measured_tokens",
                    "decode_tokens_per_s",
                    "tokens_per_pass",
                    "decode_round_trips",
                )
            }
            for row in mine
        ],
    }


def trips_per_token(row: Row) -> float:
    """Return round trips of a decoded token: of the layers of passes, and those of drafting."""
    trips: float = row["decode_round_trips"]
    return trips / (len(row["token_ids"]) - 1)
