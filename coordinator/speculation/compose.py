"""Composition of speculation: which drafters, from which files, in which order."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from coordinator.expert_branch import WatchedExperts
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.speculation.config import Speculate, SpeculationConfig
from coordinator.speculation.corrected_drafter import CorrectedDrafter
from coordinator.speculation.history import History
from coordinator.speculation.interface import Drafter
from coordinator.speculation.lookup import LookupDrafter
from coordinator.speculation.model_drafter import ModelDrafter
from coordinator.speculation.pass_time import PassTime
from coordinator.speculation.shadow_drafter import ShadowDrafter
from coordinator.speculation.shadow_experts import ShadowExperts
from coordinator.speculation.speculator import Speculator
from coordinator.tokenizer import NoTokenizer, Tokenizer
from coordinator.weights import ModelWeights
from shoal.artifact import Artifact
from shoal.artifact.shadow import ShowProgress, find_or_make
from shoal.errors import UsageError
from shoal.experts.store import WarmUpProgress
from shoal.model_spec import ModelSpec
from shoal.paths import history_dir, resolve_model


@dataclass(frozen=True, slots=True)
class Target:
    """The model that verifies, as drafters need it.

    watched: its experts, whose routing is compared with a drafter's. dispatch: where they are.
    kv: its engine's arrays.
    round_trips_per_pass: its layers with experts on nodes.
    """

    artifact: Artifact
    weights: ModelWeights
    watched: WatchedExperts
    dispatch: ExpertDispatch
    kv: KvArrays
    max_context: int
    round_trips_per_pass: int


class Told(Protocol):
    """Who hears what: see `app.Feedback`."""

    @property
    def tell(self) -> Callable[[str], None]: ...
    @property
    def show_load(self) -> Callable[[WarmUpProgress], None]: ...
    @property
    def show_making(self) -> ShowProgress: ...


class Speculation:
    """The files that drafters are made of, and the experts that they share.

    Close it after the engine: speculators close their drafters, not what those share.
    """

    def __init__(
        self, config: SpeculationConfig, artifact: Artifact, tokenizer: Tokenizer, told: Told
    ) -> None:
        """Find what the configuration names; make a shadow that is missing. Reads no weights.

        Args: artifact, tokenizer: the target's.

        Raises:
            UsageError: no such model or shadow; a draft model of another tokenizer.
            ArtifactError: one cannot be used; the shadow is another model's.
        """
        self._config, self._told = config, told
        self._draft_model: Artifact | None = None
        self._shadow_artifact: Artifact | None = None
        self._shadow: ShadowExperts | None = None
        if config.draft_model is not None:
            self._draft_model = Artifact.open(resolve_model(config.draft_model))
            _check_is_whole(self._draft_model)
            _check_tokenizer(self._draft_model, artifact, tokenizer)
        self._history = None
        if config.history:
            self._history = _open_history(artifact, told.tell)
        if config.shadow is not None:
            self._shadow_artifact = find_or_make(artifact, config.shadow, told.show_making)

    def shadow(self) -> ShadowExperts:
        """Return the shadow's experts, read when first asked for; there is one shadow at most.

        Raises: as `ShadowExperts`.
        """
        assert self._shadow_artifact is not None, "no --shadow"
        if self._shadow is None:
            self._shadow = ShadowExperts(self._shadow_artifact, self._told.show_load)
        return self._shadow

    def speculator(self, target: Target, clock: Callable[[], float]) -> Speculator:
        """Read what drafters need; return the speculator of the target's engine.

        Raises: as `ModelDrafter` and `ShadowExperts`.
        """
        config, spec = self._config, target.artifact.spec
        with ExitStack() as stack:
            drafters: list[Drafter] = []
            for drafter in self._drafters(target):
                stack.callback(drafter.close)
                drafters.append(drafter)
            stack.pop_all()  # all are there: they are the speculator's now
        return Speculator(
            drafters,
            pass_time_of(spec),
            clock,
            mode=config.mode,
            vocab_size=spec.vocab_size,
            max_draft=config.max_draft,
            divergence=config.draft_divergence,
            round_trips_per_pass=target.round_trips_per_pass,
            local_expert_bytes=self._local_expert_bytes(drafters),
            verified_routing=target.watched.last_rows,
            notify=self._told.tell,
        )

    def close(self) -> None:
        """Let go of the shadow."""
        if self._shadow is not None:
            self._shadow.close()

    def _local_expert_bytes(self, drafters: list[Drafter]) -> int:
        of_models = sum(d.local_expert_bytes for d in drafters if isinstance(d, ModelDrafter))
        return of_models + (0 if self._shadow is None else self._shadow.num_bytes)

    def _drafters(self, target: Target) -> Iterator[Drafter]:
        """Open those that the mode asks for, in the order of preference among equals."""
        mode = self._config.mode
        if mode in {Speculate.AUTO, Speculate.LOOKUP}:
            yield LookupDrafter(self._history)
        if self._draft_model is not None:
            yield ModelDrafter(self._draft_model, target.max_context, self._told.show_load)
        if self._shadow_artifact is not None and mode in {Speculate.AUTO, Speculate.SHADOW}:
            yield ShadowDrafter(self.shadow(), target.weights, target.kv, target.dispatch)
        # Without nodes it would ask this process for what a pass computes anyway.
        asks = mode is Speculate.AUTO and target.round_trips_per_pass > 0
        if self._shadow_artifact is not None and (asks or mode is Speculate.BATCH):
            yield CorrectedDrafter(
                target.artifact, target.dispatch, self.shadow(), target.weights, target.kv
            )


def pass_time_of(spec: ModelSpec) -> PassTime:
    """Return what passes of that model may take, as far as its shape says: its sparsest layer's."""
    routers = [layer.router for layer in spec.layers if layer.router is not None]
    if not routers:
        return PassTime(1, 1)
    router = max(routers, key=lambda r: r.num_experts / r.experts_per_token)
    return PassTime(router.num_experts, router.experts_per_token)


def _open_history(artifact: Artifact, tell: Callable[[str], None]) -> History:
    tokenizer = artifact.text_file("tokenizer.json")
    if tokenizer is None:
        raise UsageError(
            f"--history: {artifact.name} has no tokenizer: nothing says whose ids they are"
        )
    return History(history_dir(), tokenizer.blake3, tell)


def _check_is_whole(artifact: Artifact) -> None:
    for index, layer in enumerate(artifact.spec.layers):
        held = len(artifact.owned_experts.get(index, ()))
        if layer.router is not None and held < layer.router.num_experts:
            raise UsageError(
                f"--draft-model {artifact.path} is a slice without all experts of layer {index}: "
                "it drafts in this process, so use the whole artifact"
            )


def _check_tokenizer(artifact: Artifact, target: Artifact, tokenizer: Tokenizer) -> None:
    """Raise UsageError unless the draft model's ids mean what the target's mean."""
    what = f"--draft-model {artifact.path}"
    theirs, ours = (a.text_file("tokenizer.json") for a in (artifact, target))
    if theirs is None or ours is None or isinstance(tokenizer, NoTokenizer):
        lacking = artifact.name if theirs is None else target.name
        raise UsageError(f"{what}: {lacking} has no tokenizer: nothing says that their ids agree")
    if theirs.blake3 == ours.blake3:
        return
    vocabulary = Tokenizer(artifact.text("tokenizer.json"), {}).vocabulary()
    own = tokenizer.vocabulary()
    if vocabulary == own:
        return  # the files differ in how text becomes ids, or ids text: no matter
    differs = sum(own.get(token) != token_id for token, token_id in vocabulary.items())
    raise UsageError(
        f"{what}: its tokenizer is another one ({len(vocabulary)} tokens, {differs} of them not "
        f"those of {target.name}): a draft model needs the same vocabulary"
    )
