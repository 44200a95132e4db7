"""What the corrected drafter's recipes are worth: tokens a pass and round trips, counted.

Drafts and verifies real prompts in this process, with every draft as long as it may be, and notes
at which round trip each guess was told. From that follows what any shorter draft would have cost,
and so the best length of each recipe at a round-trip time. No clock is in the counts; the predicted
times add the passes of this process as they were timed here.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bench.measure import Row, save, show
from coordinator.array_types import F32
from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.expert_dispatch import LocalDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool
from coordinator.request import GenerationRequest
from coordinator.sampler import choose
from coordinator.sequence import Sequence as Tokens
from coordinator.speculation.corrected_drafter import CorrectedDrafter, Recipe
from coordinator.speculation.interface import Drafter
from coordinator.speculation.shadow_drafter import ShadowDrafter
from coordinator.speculation.shadow_experts import ShadowExperts
from coordinator.tokenizer import Tokenizer
from coordinator.transformer import exact_transformer
from coordinator.weights import load_weights
from shoal import limits, ops
from shoal.artifact import Artifact
from shoal.artifact.shadow import open_shadow
from shoal.experts.local import LocalExperts
from shoal.experts.ownership import Ownership
from shoal.ops import SamplingParams
from shoal.paths import resolve_model

PROMPTS = (
    "The history of the steam engine begins in the first century, when Hero of Alexandria",
    "def is_prime(n):\n    if n < 2:\n        return False\n    for i in range(2, n):\n",
    "Question: Why is the sky blue during the day and red in the evening?\nAnswer:",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
)
RECIPES: dict[str, Recipe | None] = {
    "shadow alone": None,
    "1 sweep, 8 new": Recipe(1, 8),
    "2 sweeps, 8 new": Recipe(2, 8),
    "3 sweeps, 6 new": Recipe(3, 6),
    "3 sweeps, 10 new": Recipe(3, 10),
}


@dataclass
class Step:
    """One draft and its verification. trips: round trips when each guess was told."""

    num_right: int
    trips: list[int]
    seconds: list[float]
    verify_s: float


@dataclass
class Counts:
    steps: list[Step] = field(default_factory=list)

    def at(self, length: int, rtt_s: float, num_layers: int) -> dict[str, float]:
        """Return the means of drafts cut at that length."""
        tokens = trips = seconds = 0.0
        for step in self.steps:
            kept = min(length, len(step.trips))
            drafting = step.trips[kept - 1] if kept else 0
            tokens += 1 + min(step.num_right, kept)
            trips += drafting + num_layers
            seconds += (drafting + num_layers) * rtt_s + (step.seconds[kept - 1] if kept else 0.0)
            seconds += step.verify_s
        count = len(self.steps)
        return {
            "length": length,
            "tokens_per_pass": tokens / count,
            "draft_trips_per_pass": trips / count - num_layers,
            "round_trips_per_token": trips / tokens,
            "predicted_tok_per_s": tokens / seconds,
        }


class Bench:
    """The target with its KV, one sequence at a time."""

    def __init__(self, model: str, shadow: str) -> None:
        self.artifact = Artifact.open(resolve_model(model))
        self.shadow = ShadowExperts(open_shadow(self.artifact, shadow), lambda _: None)
        self.tokenizer = Tokenizer.open(
            self.artifact.tokenizer_path, self.artifact.generation_config
        )
        self.local = LocalExperts(self.artifact, Ownership(self.artifact.owned_experts))
        self.local.warm_up(lambda _: None)
        self.dispatch = LocalDispatch(self.local.executor)
        self.weights = load_weights(self.artifact)
        self.transformer = exact_transformer(self.artifact, self.dispatch)
        self.pool = KvBlockPool(40)
        self.kv = KvArrays(self.artifact.spec, self.artifact.kv_dtype, 40)
        self.num_layers = sum(layer.router is not None for layer in self.artifact.spec.layers)

    def drafter(self, recipe: Recipe | None) -> Drafter:
        if recipe is None:
            return ShadowDrafter(self.shadow, self.weights, self.kv)
        return CorrectedDrafter(
            self.artifact, self.dispatch, self.shadow, self.weights, self.kv, recipe
        )

    def generate(
        self, prompt: str, num_tokens: int, temperature: float, drafter: Drafter
    ) -> Iterator[Step]:
        """Draft as long as may be, verify, go on from what is right."""
        ids = self.tokenizer.encode(prompt)
        sampling = SamplingParams(temperature=temperature, seed=1)
        request = GenerationRequest(tuple(ids), num_tokens, sampling)
        drafter.begin(request)
        tokens = Tokens(self.pool)
        tokens.extend(ids)
        logits = self._run(tokens, len(ids), 1)
        tokens.extend([choose(logits[0], request, tokens.token_ids).token_id])
        while tokens.num_tokens < len(ids) + num_tokens:
            yield self._step(tokens, request, drafter)
        tokens.truncate(0)

    def _step(self, tokens: Tokens, request: GenerationRequest, drafter: Drafter) -> Step:
        guesses: list[int] = []
        step = Step(0, [], [], 0.0)
        begun_trips = getattr(drafter, "num_round_trips", 0)
        begun_s = time.perf_counter()
        with closing(drafter.draft(tokens, Cancellation())) as draft:
            for guess in draft:
                guesses.append(guess.token_id)
                step.trips.append(getattr(drafter, "num_round_trips", 0) - begun_trips)
                step.seconds.append(time.perf_counter() - begun_s)
                if len(guesses) == limits.MAX_DRAFT:
                    break
        begun_s = time.perf_counter()
        place = tokens.num_tokens
        tokens.extend(guesses)
        logits = self._run(tokens, 1 + len(guesses), 1 + len(guesses))
        step.verify_s = time.perf_counter() - begun_s
        right = guesses[0] if guesses else 0
        for row in logits:
            right = choose(row, request, tokens.token_ids[: place + step.num_right]).token_id
            if step.num_right == len(guesses) or guesses[step.num_right] != right:
                break
            step.num_right += 1
        tokens.truncate(place + step.num_right)
        tokens.extend([right])
        return step

    def _run(self, tokens: Tokens, num_rows: int, num_logits: int) -> F32:
        assert tokens.try_reserve(tokens.num_cached + num_rows)
        batch = make_batch([Piece(tokens, num_rows, num_logits)])
        logits = self.transformer.forward(batch, self.kv, Cancellation())
        tokens.advance(num_rows)
        return logits


def measure(bench: Bench, names: Sequence[str], asked: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        with closing(bench.drafter(RECIPES[name])) as drafter:
            counts = Counts()
            for prompt in PROMPTS[: asked.prompts]:
                counts.steps += bench.generate(prompt, asked.tokens, asked.temperature, drafter)
            rtt_s = asked.rtt / 1000
            lengths = [
                counts.at(n, rtt_s, bench.num_layers) for n in range(1, limits.MAX_DRAFT + 1)
            ]
            best = max(lengths, key=lambda at: at["predicted_tok_per_s"])
            recipe = RECIPES[name]
            row: dict[str, Any] = {
                "recipe": name,
                "settings": None if recipe is None else asdict(recipe),
                "local_expert_bytes": drafter.local_expert_bytes,
                "steps": len(counts.steps),
                "verify_ms_median": 1e3 * float(np.median([s.verify_s for s in counts.steps])),
                "best": best,
                "by_length": lengths,
            }
            rows.append(row)
            print(name, {k: round(v, 3) for k, v in best.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--shadow", default="q4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rtt", type=float, default=45.0, help="milliseconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--save", help="name of the result file")
    asked = parser.parse_args()
    ops.set_threads(asked.threads)
    bench = Bench(asked.model, asked.shadow)
    rows = measure(bench, asked.recipes, asked)
    columns = {
        "recipe": lambda row: str(row["recipe"]),
        "draft": lambda row: str(row["best"]["length"]),
        "tokens a pass": lambda row: f"{row['best']['tokens_per_pass']:.2f}",
        "round trips of a draft": lambda row: f"{row['best']['draft_trips_per_pass']:.1f}",
        "round trips a token": lambda row: f"{row['best']['round_trips_per_token']:.2f}",
        "predicted tok/s": lambda row: f"{row['best']['predicted_tok_per_s']:.2f}",
    }
    show(f"best draft length at {asked.rtt:g} ms, {bench.num_layers} layers", rows, columns)
    if asked.save:
        save(asked.save, rows, rtt_ms=asked.rtt, temperature=asked.temperature)
    bench.local.close()


if __name__ == "__main__":
    main()
