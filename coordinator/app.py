"""Composition: which artifact, which dispatch, which clock. Everything is handed in from here.

open_model:   artifact + tokenizer. Cheap; enough to build and to refuse a request.
start_engine: kernels checked, nodes met and verified, weights read. Then requests run.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.cancellation import Cancellation
from coordinator.corrected.compose import (
    MoeDispatchFigures,
    announce,
    check_shadow,
    corrected_pass,
    figures_of,
)
from coordinator.corrected.config import MoeDispatchConfig
from coordinator.engine import Engine, EngineConfig
from coordinator.expert_branch import DispatchedExperts, WatchedExperts
from coordinator.expert_dispatch import SHARD_WAIT_S, ExpertDispatch, LocalDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.map_reload import reload_on_hangup
from coordinator.report import ModelLabel, Transcript
from coordinator.request import Event, Finished, GenerationRequest, PromptRead, TokenGenerated
from coordinator.routing_recorder import RoutingRecorder
from coordinator.speculation.compose import Speculation, Target
from coordinator.speculation.config import Speculate, SpeculationConfig
from coordinator.speculation.speculator import Speculator
from coordinator.tokenizer import NoTokenizer, Tokenizer
from coordinator.transformer import Transformer
from coordinator.weights import load_weights
from shoal import limits, numerics, ops
from shoal.artifact import Artifact
from shoal.artifact.shadow import ShowProgress
from shoal.errors import CorruptArtifact, RequestError, UsageError
from shoal.experts.local import LocalExperts
from shoal.experts.options import Mode
from shoal.experts.ownership import Ownership
from shoal.experts.store import StoreOptions, WarmUpProgress
from shoal.grpc_settings import prepare_grpc
from shoal.paths import resolve_model
from shoal.tls_files import ClientFiles
from shoal.transport import Transport, Wire

if TYPE_CHECKING:
    from coordinator.chat_template import ChatTemplate
    from coordinator.remote_dispatch import RemoteDispatch

# Parameters that generation_config.json may hold, and what each is.
_OWN_SAMPLING: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
}


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """What the command line says; checked here, once.

    model: a name or a path. moe_shards: None: every expert in this process.
    threads: of the kernels; None: as many as the machine has cores.
    max_context: None: the model's own. store, prefetch: of the experts of this process.
    tls: what `grpcs://` nodes are met with.
    warmup: whether experts are read before the first request, not beside it.
    record_routing: a file that gets the routing of each request's tokens; None: nowhere.
    """

    model: str
    moe_shards: str | None = None
    threads: int | None = None
    max_context: int | None = None
    prefill_chunk: int = limits.PREFILL_CHUNK
    call_timeout_s: float = 10.0
    shard_wait_s: float = SHARD_WAIT_S
    transport: Transport = Transport.AUTO
    tls: ClientFiles = field(default_factory=ClientFiles)
    wire: Wire = Wire.EXACT
    store: StoreOptions = field(default_factory=StoreOptions)
    prefetch: Mode = Mode.AUTO
    warmup: bool = False
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    moe_dispatch: MoeDispatchConfig = field(default_factory=MoeDispatchConfig)
    record_routing: Path | None = None

    def __post_init__(self) -> None:
        guesses = self.speculation.mode not in {Speculate.AUTO, Speculate.OFF}
        guesses |= self.speculation.draft_model is not None
        self.moe_dispatch.check(self.speculation.shadow, guesses)
        if self.moe_dispatch.is_exact:
            self.speculation.check_shadow_is_used()
        if self.record_routing is not None and not self.moe_dispatch.is_exact:
            raise UsageError(
                "--record-routing with --moe-dispatch batch: its routing is not the model's: use "
                "--moe-dispatch stream"
            )
        if self.wire is not Wire.EXACT and self.moe_shards is None:
            raise UsageError(
                f"--wire {self.wire} needs --moe-shards: without nodes there is no wire"
            )
        if self.tls != ClientFiles() and self.moe_shards is None:
            raise UsageError("--tls-... needs --moe-shards: without nodes there is no wire")
        if self.threads is not None and not 1 <= self.threads <= limits.MAX_THREADS:
            raise UsageError(f"--threads {self.threads}: must be in 1..{limits.MAX_THREADS}")
        if not 0 < self.call_timeout_s <= limits.MAX_CALL_TIMEOUT_S:
            raise UsageError(
                f"--call-timeout {self.call_timeout_s}: must be above 0 and at most "
                f"{limits.MAX_CALL_TIMEOUT_S} seconds"
            )
        if not 0 <= self.shard_wait_s <= limits.MAX_SHARD_WAIT_S:
            raise UsageError(
                f"--shard-wait {self.shard_wait_s}: must be in 0..{limits.MAX_SHARD_WAIT_S:g} "
                "seconds"
            )


class OpenedModel:
    """An artifact and its tokenizer, before any weight is read."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self.artifact = Artifact.open(resolve_model(config.model))
        self.tokenizer = _tokenizer(self.artifact)
        longest = self.artifact.spec.max_context
        max_context = longest if config.max_context is None else config.max_context
        if max_context > longest:
            raise RequestError(
                f"--max-context {max_context}: {self.artifact.name} was made for {longest} tokens"
            )
        self.engine_config = EngineConfig(max_context, config.prefill_chunk)

    def chat_template(self) -> "ChatTemplate":
        """Return the model's template. Raises RequestError if it has none."""
        from coordinator.chat_template import ChatTemplate  # and jinja2: not for raw text

        if self.artifact.chat_template_path is None:
            raise RequestError(
                f"{self.artifact.name} has no chat template: complete raw text with `shoal run`, "
                "without --chat"
            )
        source = self.artifact.text("chat_template.jinja")
        return ChatTemplate(source, self.tokenizer.special_tokens, datetime.now)

    def max_tokens(self, otherwise: int) -> int:
        """Return how long the model's own generation_config.json lets an answer become."""
        longest = self.artifact.generation_config.get("max_new_tokens")
        return longest if type(longest) is int and longest > 0 else otherwise

    def sampling(self, given: Mapping[str, Any]) -> ops.SamplingParams:
        """Return how tokens are chosen: as given, else as the model's makers say, else greedily.

        generation_config.json counts where its do_sample is true, as in transformers.

        Raises: RequestError for a value out of range; CorruptArtifact for one that is no number.
        """
        config = self.artifact.generation_config
        own: dict[str, Any] = {}
        for name, kinds in _OWN_SAMPLING.items():
            value = config.get(name)
            if config.get("do_sample") is not True or value is None or name in given:
                continue
            if type(value) not in kinds:
                where = f"{self.artifact.path}: generation_config.json"
                raise CorruptArtifact(f"{where}: {name} = {value!r}: not such a number")
            own[name] = value
        return ops.SamplingParams(**own, **given)

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError for a request that this model cannot serve."""
        request.check(self.artifact.spec.vocab_size, self.engine_config.max_context)


def _tokenizer(artifact: Artifact) -> Tokenizer:
    if artifact.text_file("tokenizer.json") is None:
        return NoTokenizer(artifact.generation_config)
    return Tokenizer.open(artifact.tokenizer_path, artifact.generation_config)


def message(role: str, content: str) -> dict[str, str]:
    """Return one message as chat templates know it."""
    return {"role": role, "content": content}


class Coordinator:
    """A model that answers. Not thread-safe."""

    def __init__(
        self,
        model: OpenedModel,
        engine: Engine,
        dispatch: ExpertDispatch,
        moe_dispatch: MoeDispatchFigures,
        recorder: RoutingRecorder | None = None,
    ) -> None:
        self.model = model
        self.recorder = recorder
        self.moe_dispatch = moe_dispatch
        self.engine = engine
        self._dispatch = dispatch

    @property
    def label(self) -> ModelLabel:
        artifact = self.model.artifact
        return ModelLabel(artifact.name, artifact.identity, numerics.NUMERICS, ops.isa())

    def check(self) -> None:
        """Raise CorruptArtifact if an expert is known to be damaged, also one that nobody wanted.

        Experts are read while requests run: from then on every request fails so.
        """
        if isinstance(self._dispatch, LocalDispatch):
            self._dispatch.check()

    def generate(self, transcript: Transcript, cancellation: Cancellation) -> Iterator[Event]:
        """Serve the transcript's request and write down what it brings.

        Raises: RequestError, before any work, for a request that cannot be served.
        """
        self._dispatch.stats.reset()
        transcript.moe_dispatch = self.moe_dispatch
        for event in self.engine.generate(transcript.request, cancellation):
            match event:
                case PromptRead():
                    transcript.prefill = self._dispatch.stats.summary()
                    self._dispatch.stats.reset()
                case TokenGenerated():
                    transcript.tokens.append(event)
                case Finished():
                    transcript.decode = self._dispatch.stats.summary()
                    transcript.finished = event
            yield event


@dataclass(frozen=True, slots=True)
class Feedback:
    """Who hears how a start goes.

    tell: a sentence; show_load: after each expert that was read, from whatever thread; end_load:
    show no more of that, as text follows; show_making: of a shadow.
    """

    tell: Callable[[str], None]
    show_load: Callable[[WarmUpProgress], None]
    show_making: ShowProgress
    end_load: Callable[[], None] = lambda: None


@contextmanager
def start_engine(model: OpenedModel, feedback: Feedback) -> Iterator[Coordinator]:
    """Check the kernels, meet the nodes, read the weights; let go of everything at the end.

    Raises:
        NumericsMismatch: this build's kernels compute other bits than the golden digests.
        ShardMapError, NodeError: --moe-shards is wrong, or a node cannot do its part.
        ArtifactError: a tensor is damaged or missing. Of an expert that may be known only later:
            by a request, or by `Coordinator.check`.
    """
    config, artifact = model.config, model.artifact
    numerics.verify()
    if config.threads is not None:
        ops.set_threads(config.threads)
    with ExitStack() as stack:
        stack.callback(feedback.end_load)  # an error, too, begins on a line of its own
        guessing = config.speculation
        if not config.moe_dispatch.is_exact:
            guessing = replace(guessing, mode=Speculate.OFF)
        speculation = Speculation(guessing, artifact, model.tokenizer, feedback)
        stack.callback(speculation.close)
        dispatch = open_dispatch(config, artifact, feedback)
        stack.callback(dispatch.close)
        recorder = None
        if config.record_routing is not None:
            recorder = RoutingRecorder(config.record_routing, artifact.spec, artifact.identity)
        engine, moe_dispatch = _make_engine(model, dispatch, speculation, feedback, recorder)
        stack.callback(engine.close)
        if config.moe_shards is not None and config.moe_shards.startswith("@"):
            stack.enter_context(reload_on_hangup(_on_nodes(dispatch), feedback.tell))
        yield Coordinator(model, engine, dispatch, moe_dispatch, recorder)


def _make_engine(
    model: OpenedModel,
    dispatch: ExpertDispatch,
    speculation: Speculation,
    feedback: Feedback,
    recorder: RoutingRecorder | None,
) -> tuple[Engine, MoeDispatchFigures]:
    artifact, config, asked = model.artifact, model.engine_config, model.config
    nodes = None if asked.moe_shards is None else _on_nodes(dispatch)
    round_trips = 0 if nodes is None else nodes.num_layers_on_nodes
    shadow = None if asked.moe_dispatch.is_exact else speculation.shadow()
    figures = figures_of(asked.moe_dispatch, shadow, None if nodes is None else nodes.farthest_s)
    guessing = asked.speculation
    is_told = guessing.mode is Speculate.OFF or guessing.shadow or guessing.draft_model
    announce(figures, round_trips, not is_told, feedback.tell)
    weights = load_weights(artifact)
    approximate = None
    if shadow is not None:
        check_shadow(shadow.artifact)
        num_sweeps = asked.moe_dispatch.num_sweeps
        approximate = corrected_pass(artifact, weights, dispatch, shadow, num_sweeps)
        round_trips = min(round_trips, num_sweeps)
    watched = WatchedExperts(artifact.spec, DispatchedExperts(artifact, dispatch))

    def make_speculator(kv: KvArrays) -> Speculator:
        target = Target(artifact, weights, watched, dispatch, kv, config.max_context, round_trips)
        return speculation.speculator(target, time.perf_counter)

    make_transformer = Transformer if recorder is None else recorder.transformer
    engine = Engine(
        make_transformer(artifact.spec, weights, watched),
        model.tokenizer,
        lambda num_blocks: KvArrays(artifact.spec, artifact.kv_dtype, num_blocks),
        config,
        time.perf_counter,
        make_speculator,
        approximate,
    )
    return engine, figures


def _on_nodes(dispatch: ExpertDispatch) -> "RemoteDispatch":
    from coordinator.remote_dispatch import RemoteDispatch

    assert isinstance(dispatch, RemoteDispatch), "--moe-shards makes one"
    return dispatch


def open_dispatch(
    config: CoordinatorConfig, artifact: Artifact, feedback: Feedback
) -> ExpertDispatch:
    """Meet the nodes that the configuration names, or begin to read all experts.

    Raises as start_engine.
    """
    if config.moe_shards is not None:
        prepare_grpc("ERROR")  # its "Got goaway" is no business of the user's
        from coordinator.remote_dispatch import open_remote_dispatch  # and gRPC: not without nodes

        return open_remote_dispatch(
            artifact,
            config.moe_shards,
            config.call_timeout_s,
            shard_wait_s=config.shard_wait_s,
            transport=config.transport,
            tls=config.tls,
            replies=config.wire,
            store=config.store,
            prefetch=config.prefetch,
            notify=feedback.tell,
        )
    wanted = {
        index: range(layer.router.num_experts)
        for index, layer in enumerate(artifact.spec.layers)
        if layer.router is not None
    }
    for layer, experts in wanted.items():
        if len(artifact.owned_experts.get(layer, ())) < len(experts):
            raise UsageError(
                f"{artifact.path} is a slice without all experts of layer {layer}: say with "
                "--moe-shards which nodes have them, or use the whole artifact"
            )
    local = LocalExperts(artifact, Ownership(dict(wanted)), config.store, config.prefetch)
    try:
        if local.how_read:
            feedback.tell(local.how_read)
        warm_up = None
        if config.warmup:
            local.warm_up(feedback.show_load)
        else:
            warm_up = local.warm_up_beside(feedback.show_load)
    except BaseException:
        local.close()
        raise
    return LocalDispatch(local.executor, warm_up)
