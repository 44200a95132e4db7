"""Engines that speculate, on a model in this process, as if a pass took as long as any other.

Their clock ticks when it is read, so that every pass of the target takes a second, however many
rows it has, and drafting takes no time: it is a link that is all round trips, and likely guesses
are always worth their rows.
"""

import itertools
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.cancellation import Cancellation
from coordinator.engine import Engine, EngineConfig
from coordinator.expert_branch import DispatchedExperts, WatchedExperts
from coordinator.expert_dispatch import ExpertDispatch, LocalDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.request import Event, Finished, GenerationRequest, TokenGenerated
from coordinator.sequence import Sequence
from coordinator.speculation.compose import pass_time_of
from coordinator.speculation.config import Speculate
from coordinator.speculation.figures import DrafterFigures
from coordinator.speculation.interface import Drafter, DraftToken
from coordinator.speculation.speculator import Speculator, no_speculation
from coordinator.tokenizer import Tokenizer
from coordinator.transformer import Transformer
from coordinator.weights import ModelWeights, load_weights
from shoal.artifact import Artifact
from support.whole_store import whole_executor


@dataclass(frozen=True)
class Parts:
    """What drafters are made of: the target's artifact, dense weights and KV arrays."""

    artifact: Artifact
    weights: ModelWeights
    kv: KvArrays


# From the target's parts to its drafters.
MakeDrafters = Callable[[Parts], SequenceOf[Drafter]]


@dataclass
class Rig:
    """An engine.

    eos_ids: which tokens end a text. dispatch: None: every expert in memory.
    round_trips: of a pass; with some of them a drafter that takes time goes on beside the pass.
    """

    path: Path
    make_drafters: MakeDrafters | None = None
    eos_ids: SequenceOf[int] = ()
    prefill_chunk: int = 64
    max_context: int = 256
    max_draft: int = 8
    divergence: float = 1.0
    round_trips: int = 0
    dispatch: ExpertDispatch | None = None
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.artifact = artifact = Artifact.open(self.path)
        if self.dispatch is None:
            self.dispatch = LocalDispatch(whole_executor(artifact))
        self.tokenizer = Tokenizer(
            artifact.text("tokenizer.json"), {"eos_token_id": list(self.eos_ids)}
        )
        self._weights = load_weights(artifact)
        self._watched = WatchedExperts(artifact.spec, DispatchedExperts(artifact, self.dispatch))
        self.speculator = no_speculation()
        self.engine = Engine(
            Transformer(artifact.spec, self._weights, self._watched),
            self.tokenizer,
            lambda num_blocks: KvArrays(artifact.spec, artifact.kv_dtype, num_blocks),
            EngineConfig(self.max_context, self.prefill_chunk),
            map(float, itertools.count()).__next__,
            self._make_speculator,
        )

    def run(self, request: GenerationRequest, cancellation: Cancellation | None = None) -> "Answer":
        """Serve a request to its end; the engine is left as it should be."""
        answer = Answer(list(self.engine.generate(request, cancellation or Cancellation())))
        self.engine.check_integrity()
        return answer

    def close(self) -> None:
        self.engine.close()
        assert self.dispatch is not None
        self.dispatch.close()

    def _make_speculator(self, kv: KvArrays) -> Speculator:
        if self.make_drafters is not None:
            self.speculator = Speculator(
                self.make_drafters(Parts(self.artifact, self._weights, kv)),
                pass_time_of(self.artifact.spec),
                lambda: 0.0,
                mode=Speculate.AUTO,
                vocab_size=self.artifact.spec.vocab_size,
                max_draft=self.max_draft,
                divergence=self.divergence,
                round_trips_per_pass=self.round_trips,
                verified_routing=self._watched.last_rows,
                notify=self.told.append,
            )
        return self.speculator


@dataclass(frozen=True)
class Answer:
    """The events of a request."""

    events: list[Event]

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last

    @property
    def tokens(self) -> list[TokenGenerated]:
        return [event for event in self.events if isinstance(event, TokenGenerated)]

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.finished.text

    @property
    def told(self) -> tuple[object, ...]:
        """All that must not depend on how the tokens came."""
        end = self.finished
        return self.token_ids, self.tokens, end.reason, end.text, end.logits_digest, str(end.error)

    @property
    def passes(self) -> int:
        assert self.finished.speculation is not None
        return self.finished.speculation.passes

    def of(self, drafter: str) -> DrafterFigures:
        assert self.finished.speculation is not None
        return self.finished.speculation.per_drafter[drafter]


class ScriptedDrafter:
    """Guesses what a function says: of the tokens so far and how many guesses it made already."""

    name = "scripted"
    local_expert_bytes = 0

    def __init__(self, next_id: Callable[[list[int]], int | None], chance: float = 0.9) -> None:
        self._next_id = next_id
        self._chance = chance
        self.num_opened = 0
        self.num_closed = 0

    def begin(self, request: GenerationRequest) -> None:
        """Nothing to prepare."""

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        ids = sequence.token_ids.tolist()
        self.num_opened += 1
        try:
            while (token_id := self._next_id(ids)) is not None:
                ids.append(token_id)
                yield DraftToken(token_id, self._chance)
        finally:
            self.num_closed += 1

    def close(self) -> None:
        """Nothing to let go of."""
