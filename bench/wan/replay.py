"""A coordinator whose drafter replays recorded luck: for weights that say nothing about it.

`python -m bench.wan.replay` is a process of its own, as worker.py's: first line from stdin the
setup, one line to stdout for each recorded case.

The drafter knows what the target will say: it was run before, in one process. From a position of
the answer it guesses right as often as was recorded there and wrong from then on, gives each guess
the chance that was recorded, and takes as long for it as it is told (synthetic.py). Everything else
is as it is anywhere: which lengths are drafted follows from what passes take on this link.
"""

import json
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from bench.wan.figures import Result
from bench.wan.worker import Request, WorkerSetup, serve
from coordinator.app import Coordinator, CoordinatorConfig, OpenedModel
from coordinator.cancellation import Cancellation
from coordinator.corrected.compose import figures_of
from coordinator.corrected.config import MoeDispatchConfig
from coordinator.engine import Engine
from coordinator.expert_branch import DispatchedExperts, WatchedExperts
from coordinator.kv_arrays import KvArrays
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence as Tokens
from coordinator.speculation.compose import pass_time_of
from coordinator.speculation.config import MAX_DIVERGENCE, Speculate
from coordinator.speculation.interface import DraftToken
from coordinator.speculation.speculator import Speculator
from coordinator.transformer import Transformer
from coordinator.weights import load_weights
from shoal import limits


@dataclass(slots=True)
class Replay:
    """positions: recorded ones (record.py); answer: what the target says."""

    positions: Sequence[dict[str, Any]]
    answer: Sequence[int]


class ReplayDrafter:
    """Guesses as well as was recorded, as slowly as a shadow."""

    def __init__(self, guess_s: float, local_expert_bytes: int, vocab_size: int) -> None:
        self._guess_s = guess_s
        self._local_expert_bytes = local_expert_bytes
        self._vocab_size = vocab_size
        self._num_prompt = 0
        self.replay = Replay((), ())

    @property
    def name(self) -> str:
        return "replay"

    @property
    def local_expert_bytes(self) -> int:
        return self._local_expert_bytes

    def begin(self, request: GenerationRequest) -> None:
        """See `Drafter.begin`."""
        self._num_prompt = len(request.prompt_ids)

    def draft(
        self, sequence: Tokens, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        """See `Drafter.draft`."""
        position = sequence.num_tokens - self._num_prompt  # tokens of the answer so far
        recorded = self.replay.positions[(position - 1) % len(self.replay.positions)]
        for index, chance in enumerate(recorded["chances"]):
            if position + index >= len(self.replay.answer):
                return
            time.sleep(self._guess_s)
            right = self.replay.answer[position + index]
            is_right = index < recorded["run"]
            yield DraftToken(right if is_right else (right + 1) % self._vocab_size, chance)

    def close(self) -> None:
        """See `Drafter.close`."""


def main() -> None:
    """Serve the cases of the first line."""
    given = json.loads(sys.stdin.readline())
    setup, guess_s = WorkerSetup(**given["setup"]), float(given["guess_s"])
    assert setup.moe_shards is not None, "a map of nodes"
    model = OpenedModel(CoordinatorConfig(setup.model, setup.moe_shards))
    artifact, vocab = model.artifact, model.artifact.spec.vocab_size
    drafter = ReplayDrafter(guess_s, int(given["local_expert_bytes"]), vocab)
    with ExitStack() as stack:
        dispatch = stack.enter_context(closing(open_remote_dispatch(artifact, setup.moe_shards)))
        is_off = setup.speculation["mode"] == Speculate.OFF
        engine = _engine(model, dispatch, [] if is_off else [drafter])
        figures = figures_of(MoeDispatchConfig(), None, None)
        coordinator = Coordinator(model, engine, dispatch, figures)
        for case in given["cases"]:
            drafter.replay = Replay(case["positions"], case["answer"])
            result: Result = serve(coordinator, Request(**case["request"]))
            print(json.dumps(result), flush=True)
        engine.close()


def _engine(model: OpenedModel, dispatch: RemoteDispatch, drafters: list[ReplayDrafter]) -> Engine:
    artifact = model.artifact
    watched = WatchedExperts(artifact.spec, DispatchedExperts(artifact, dispatch))

    def speculator(_kv: KvArrays) -> Speculator:
        return Speculator(
            drafters,
            pass_time_of(artifact.spec),
            time.perf_counter,
            mode=Speculate.SHADOW if drafters else Speculate.OFF,
            vocab_size=artifact.spec.vocab_size,
            max_draft=limits.MAX_DRAFT,
            divergence=MAX_DIVERGENCE,
            round_trips_per_pass=dispatch.num_layers_on_nodes,
            local_expert_bytes=sum(drafter.local_expert_bytes for drafter in drafters),
            verified_routing=watched.last_rows,
        )

    return Engine(
        Transformer(artifact.spec, load_weights(artifact), watched),
        model.tokenizer,
        lambda num_blocks: KvArrays(artifact.spec, artifact.kv_dtype, num_blocks),
        model.engine_config,
        time.perf_counter,
        speculator,
    )


if __name__ == "__main__":
    main()
