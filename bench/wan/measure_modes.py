"""Every mode on every prompt, greedy and at a temperature; and the prompt of 512 tokens."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Row
from bench.wan.cluster import Cluster, ask_all
from bench.wan.figures import Result, repetition, totals
from bench.wan.modes import OFF, Mode
from bench.wan.prompts import Prompt, long_prompt, one_of_each
from bench.wan.worker import Request

GREEDY, WARM = 0.0, 0.8
MIN_TOKENS = 5  # of a mode that generates a share only
LONG_RUNS = 3  # of the long prompt


@dataclass(frozen=True, slots=True)
class Case:
    """One request of the comparison."""

    prompt: Prompt
    temperature: float

    @property
    def label(self) -> str:
        return f"{self.prompt.name}, {'greedy' if self.temperature == GREEDY else self.temperature}"

    def request(self, num_tokens: int) -> Request:
        return Request(self.prompt.ids, num_tokens, self.temperature, seed=1)


def all_cases(prompts: Sequence[Prompt], is_quick: bool) -> list[Case]:
    """Return all prompts greedily, one of each kind at a temperature; quick: these, greedily."""
    few = one_of_each(prompts)
    if is_quick:
        return [Case(prompt, GREEDY) for prompt in few]
    return [*(Case(prompt, GREEDY) for prompt in prompts), *(Case(prompt, WARM) for prompt in few)]


def references(cluster: Cluster, cases: Sequence[Case], num_tokens: int) -> list[Result]:
    """Return what each case's answer is: in one process, without a link or a guess."""
    return ask_all(cluster.local_setup(), [case.request(num_tokens) for case in cases], 1)


def measure_mode(
    cluster: Cluster,
    mode: Mode,
    shadows: Mapping[str, Path],
    cases: Sequence[Case],
    expected: Sequence[Result],
    num_tokens: int,
    lanes: int | None = None,
) -> list[Row]:
    """Run a mode over all cases; return a row a case.

    Args: lanes: None: the mode's own.

    Raises RuntimeError where a token differs from what is expected.
    """
    count = max(MIN_TOKENS, round(num_tokens * mode.share))
    requests = [case.request(count) for case in cases]
    speculation = mode.with_shadows(shadows)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-home-") as folder:
        home = folder if mode.remembers else None
        if mode.remembers:  # the first visit: nobody waits for it, so no link is needed
            first = [case.request(num_tokens) for case in cases if case.temperature == GREEDY]
            ask_all(cluster.local_setup(speculation, home), first, 1)
        began_s = time.perf_counter()
        results = ask_all(cluster.setup(speculation, home), requests, lanes or mode.lanes)
    print(f"{mode.name}: {time.perf_counter() - began_s:.0f} s", flush=True)
    rows: list[Row] = []
    for case, result, right in zip(cases, results, expected, strict=True):
        if result["token_ids"] != right["token_ids"][:count]:
            raise RuntimeError(f"{mode.name}, {case.label}: other tokens than without speculation")
        rows.append(_row(cluster, mode, case, result, right))
    return rows


def _row(cluster: Cluster, mode: Mode, case: Case, result: Result, right: Result) -> Row:
    """Return one request's figures; repetition is that of the whole answer."""
    prompt, whole = case.prompt.ids, [*case.prompt.ids, *right["token_ids"]]
    measured_tokens = len(result["token_ids"])
    if measured_tokens < len(right["token_ids"]):
        result = stretched(result, right["token_ids"])
    return {
        "mode": mode.name,
        "prompt": case.prompt.name,
        "kind": case.prompt.kind,
        "temperature": case.temperature,
        "prompt_tokens": len(prompt),
        "prompt_repetition": repetition(prompt),
        "answer_repetition": repetition(whole, len(prompt)),
        "measured_tokens": measured_tokens,
        **totals([result]).figures(),
        "identical": True,
        "lanes": mode.lanes,
        "local_expert_share": result["local_expert_bytes"] / cluster.expert_bytes,
        **result,
    }


def stretched(result: Result, token_ids: Sequence[int]) -> Result:
    """Return what the whole answer would have come to, had the decode gone on as it did.

    So every mode's rate is of the same tokens: the prompt counts as much in each.
    """
    factor = (len(token_ids) - 1) / (len(result["token_ids"]) - 1)
    scaled = ("decode_s", "passes", "drafted", "accepted", "decode_round_trips")
    grown = {key: result[key] * factor for key in scaled}
    return {**result, **grown, "token_ids": list(token_ids)}


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return a row a mode, in order: total tokens by total time."""
    summary: list[Row] = []
    for name in dict.fromkeys(row["mode"] for row in rows):
        for temperature in (None, *sorted({row["temperature"] for row in rows})):
            mine = [dict(row) for row in rows if row["mode"] == name]
            if temperature is not None:
                mine = [row for row in mine if row["temperature"] == temperature]
            summary.append(
                {
                    "mode": name,
                    "temperature": temperature,
                    **totals(mine).figures(),
                    "draft_s_per_pass": _draft_s(mine) / sum(row["passes"] for row in mine),
                    "cpu_s_per_pass": sum(row["cpu_s"] for row in mine)
                    / sum(row["passes"] for row in mine),
                    "first_token_s": sum(row["first_token_s"] for row in mine) / len(mine),
                    "fanout_p50_s": sorted(row["fanout_p50_s"] for row in mine)[len(mine) // 2],
                    "local_expert_bytes": max(row["local_expert_bytes"] for row in mine),
                    "local_expert_share": max(row["local_expert_share"] for row in mine),
                    "lanes": mine[0]["lanes"],
                    "measured_tokens": sum(row["measured_tokens"] for row in mine),
                    "identical": all(row["identical"] for row in mine),
                }
            )
    return summary


def _draft_s(rows: Sequence[Row]) -> float:
    return float(sum(of["draft_s"] for row in rows for of in row["per_drafter"].values()))


def measure_long_prompt(cluster: Cluster, rtt_s: float) -> Row:
    """Return how many round trips a prompt of 512 tokens takes, and how long."""
    ids = long_prompt(cluster.model)
    runs: list[Result] = []
    for _ in range(LONG_RUNS):  # each by a coordinator of its own: nothing is cached
        runs += ask_all(cluster.setup(OFF.speculation), [Request(ids, 1, GREEDY)], 1)
    best = min(runs, key=lambda run: float(run["first_token_s"]))
    trips = best["prefill_round_trips"]
    return {
        "prompt_tokens": len(ids),
        "round_trips": trips,
        "first_token_s": [run["first_token_s"] for run in runs],
        "beyond_round_trips_s": best["first_token_s"] - trips * rtt_s,
        "bytes_up": best["bytes_up"],
        "bytes_down": best["bytes_down"],
    }
