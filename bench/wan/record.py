"""Record how far a shadow's guesses are right, from every position of real answers.

python -m bench.wan.record [--target q8_0] [--tokens 48] [--longest 16]

Writes bench/traces/wan-shadow-q4-of-TARGET.json: for each position of each answer the guesses'
chances as the drafter gave them, and how many of them the target would have accepted. What another
model of random weights would accept says nothing; this is replayed there (synthetic.py).
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from bench.measure import ROOT
from bench.wan.cluster import make_model, make_shadow
from bench.wan.measure_modes import GREEDY, WARM, Case
from bench.wan.prompts import one_of_each, read_prompts
from bench.wan.worker import MAX_CONTEXT, Request, Worker, WorkerSetup
from coordinator.app import CoordinatorConfig, OpenedModel
from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.expert_branch import DispatchedExperts
from coordinator.expert_dispatch import LocalDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool, blocks_for
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence as Tokens
from coordinator.speculation.shadow_drafter import ShadowDrafter
from coordinator.speculation.shadow_experts import ShadowExperts
from coordinator.transformer import Transformer
from coordinator.weights import load_weights
from shoal import limits
from shoal.artifact import Artifact
from shoal.artifact.shadow import open_shadow
from shoal.experts.local import LocalExperts
from shoal.experts.ownership import Ownership
from shoal.ops import SamplingParams

TARGETS = ("q8_0", "bf16")  # experts that take rows as int8, and as float32
DIGITS = 3


def trace_of(target: str) -> Path:
    """Return the file of the luck with a target of that format."""
    return ROOT / "bench" / "traces" / f"wan-shadow-q4-of-{target}.json"


class Recorder:
    """The target and a shadow of it, both in this process."""

    def __init__(self, path: Path, shadow: Path) -> None:
        self._artifact = Artifact.open(path)
        self._local = LocalExperts(self._artifact, Ownership(self._artifact.owned_experts))
        self._local.warm_up(lambda _: None)
        self._shadow = ShadowExperts(open_shadow(self._artifact, str(shadow)), lambda _: None)
        weights = load_weights(self._artifact)
        experts = DispatchedExperts(self._artifact, LocalDispatch(self._local.executor))
        num_blocks = blocks_for(MAX_CONTEXT) + limits.KV_SCRATCH_BLOCKS
        self._kv = KvArrays(self._artifact.spec, self._artifact.kv_dtype, num_blocks)
        self._pool = KvBlockPool(num_blocks)
        self._transformer = Transformer(self._artifact.spec, weights, experts)
        self._drafter = ShadowDrafter(self._shadow, weights, self._kv)

    def close(self) -> None:
        """Let go of the experts."""
        self._drafter.close()
        self._shadow.close()
        self._local.close()

    def record(
        self, request: Request, answer: Sequence[int], num_tokens: int, longest: int
    ) -> list[dict[str, Any]]:
        """Return for each of the answer's first positions what a draft there would have been."""
        sampling = SamplingParams(temperature=request.temperature, seed=request.seed)
        asked = GenerationRequest(tuple(request.prompt_ids), request.max_tokens, sampling)
        self._drafter.begin(asked)
        sequence, prompt = Tokens(self._pool), len(request.prompt_ids)
        sequence.extend([*request.prompt_ids, *answer])
        while num_left := sequence.num_tokens - sequence.num_cached:
            num_rows = min(num_left, limits.PREFILL_CHUNK)
            assert sequence.try_reserve(sequence.num_cached + num_rows)
            batch = make_batch([Piece(sequence, num_rows, 0)])
            self._transformer.forward(batch, self._kv, Cancellation())
            sequence.advance(num_rows)
        positions: list[dict[str, Any]] = []
        for position in reversed(range(1, min(num_tokens, len(answer) - longest))):
            # The last token before the draft is not in the cache yet.
            sequence.truncate(prompt + position - 1)
            sequence.extend([answer[position - 1]])
            with closing(self._drafter.draft(sequence, Cancellation())) as draft:
                guesses = list(islice(draft, longest))
            right = [g.token_id for g in guesses]
            run = 0
            while run < len(right) and right[run] == answer[position + run]:
                run += 1
            chances = [round(guess.chance, DIGITS) or 10**-DIGITS for guess in guesses]
            positions.append({"run": run, "chances": chances})
        sequence.truncate(0)
        return positions[::-1]


def main() -> None:
    """Record one prompt of each kind, greedily and at a temperature."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default=TARGETS[0])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--longest", type=int, default=16, help="guesses of a draft")
    chosen = parser.parse_args()
    path = make_model(chosen.target)
    model = OpenedModel(CoordinatorConfig(str(path)))
    cases = [Case(p, t) for t in (GREEDY, WARM) for p in one_of_each(read_prompts(model))]
    requests = [case.request(chosen.tokens + chosen.longest) for case in cases]
    with Worker(WorkerSetup(str(path))) as worker:
        answers = [worker.ask(request)["token_ids"] for request in requests]
    recorded: list[dict[str, Any]] = []
    with closing(Recorder(path, make_shadow(path, "q4"))) as recorder:
        for case, request, answer in zip(cases, requests, answers, strict=True):
            positions = recorder.record(request, answer, chosen.tokens, chosen.longest)
            mean = sum(p["run"] for p in positions) / max(1, len(positions))
            print(f"{case.label}: {len(positions)} positions, runs of {mean:.1f} on average")
            recorded.append({"case": case.label, "positions": positions})
    trace = {"model": model.artifact.name, "identity": model.artifact.identity, "cases": recorded}
    trace_of(chosen.target).write_text(json.dumps(trace) + "\n")


if __name__ == "__main__":
    main()
