"""`shoal run` and `shoal chat`: the command line in, text out. What they do is in `app` and `chat`.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.corrected.options import MoeDispatchOptions
from coordinator.recording_options import RecordingOptions
from coordinator.speculation.options import SpeculationOptions
from shoal import limits
from shoal.errors import UsageError
from shoal.experts.options import Io, Mode, Verify
from shoal.option_groups import grouped
from shoal.paths import SUFFIX, default_model, is_artifact, user_folder, user_path
from shoal.sizes import parse_size
from shoal.transport import Transport, Wire

if TYPE_CHECKING:
    from coordinator.app import CoordinatorConfig, Feedback
    from shoal.experts.store import WarmUpProgress

LOAD_SILENCE_S = 0.5
SPECULATION_DEFAULTS = SpeculationOptions()
MOE_DISPATCH_DEFAULTS = MoeDispatchOptions()
RECORDING_DEFAULTS = RecordingOptions()

Model = Annotated[
    str | None,
    typer.Argument(
        help="name or path of an artifact; default: the small one that comes with shoal",
        show_default=False,
    ),
]
System = Annotated[str | None, typer.Option(help="system prompt of the chat template")]
Stop = Annotated[
    list[str] | None, typer.Option(help="end before this string; may be repeated", metavar="STR")
]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen. None: as the model's generation_config.json says, or greedily."""

    temperature: Annotated[
        float | None,
        typer.Option(help="0: always the likeliest token; default: the model's own, or 0"),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="sample from the K likeliest only; 0: from all")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="sample from the likeliest that hold this mass")
    ] = None
    min_p: Annotated[
        float | None, typer.Option(help="drop tokens below this share of the likeliest")
    ] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="above 1: repeat less")] = None
    seed: Annotated[int, typer.Option(help="the same seed gives the same tokens, everywhere")] = 0

    def given(self) -> dict[str, Any]:
        """Return what the command line says."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Where experts are computed, and with what means."""

    moe_shards: Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help="who computes which experts: 0-63=grpc://a:50051,64-127=grpc://b:50051, "
            "replicas as a|b, or @file.toml; without it, this process does",
            show_default=False,
        ),
    ] = None
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="memory for the experts of this process, such as 8GiB; the others are read when "
            "they are called; default: all of them",
            show_default=False,
        ),
    ] = None
    data_dir: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="a copy of the artifact's expert files on another drive; may be repeated",
        ),
    ] = None
    verify: Annotated[Verify, typer.Option(help="which reads of an expert are hashed")] = (
        Verify.FIRST
    )
    io: Annotated[Io, typer.Option(help="how expert files are read; auto: the best that works")] = (
        Io.AUTO
    )
    prefetch: Annotated[
        Mode, typer.Option(help="with --cache: read ahead what is guessed; auto: where that wins")
    ] = Mode.AUTO
    warmup: Annotated[
        bool,
        typer.Option(
            "--warmup",
            help="read all experts that fit before the prompt, not beside it: the first token "
            "comes later, and nothing slows down the others",
        ),
    ] = False
    prefill_chunk: Annotated[
        int, typer.Option(help="prompt tokens per pass; changes speed only")
    ] = limits.PREFILL_CHUNK
    threads: Annotated[
        int | None, typer.Option(help="of the kernels; default: all cores", show_default=False)
    ] = None
    max_context: Annotated[
        int | None, typer.Option(help="tokens; default: the model's own", show_default=False)
    ] = None
    call_timeout: Annotated[
        float, typer.Option(help="seconds that a node may take for one layer")
    ] = 10.0
    shard_wait: Annotated[
        float,
        typer.Option(help="seconds to wait for a node when a range of experts has none left"),
    ] = 30.0
    transport: Annotated[
        Transport, typer.Option(help="to nodes: grpcio, or our own framing (fast, auto)")
    ] = Transport.AUTO
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM of the authorities that sign certificates of grpcs:// nodes; default: those "
            "that the system trusts",
            show_default=False,
        ),
    ] = None
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="certificate for nodes that ask for one", show_default=False
        ),
    ] = None
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="and its key", show_default=False)
    ] = None
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="that nodes' certificates are for; default: each endpoint's host",
            show_default=False,
        ),
    ] = None
    wire: Annotated[
        Wire,
        typer.Option(help="of nodes' replies: exact integers; bf16: rounded, so NOT the same text"),
    ] = Wire.EXACT

    def config(
        self,
        model: str | None,
        speculation: SpeculationOptions = SPECULATION_DEFAULTS,
        moe: MoeDispatchOptions = MOE_DISPATCH_DEFAULTS,
        recording: RecordingOptions = RECORDING_DEFAULTS,
    ) -> "CoordinatorConfig":
        """Return the configuration of a coordinator for that model. Raises UsageError."""
        from coordinator.app import CoordinatorConfig
        from shoal.experts.store import StoreOptions
        from shoal.tls_files import ClientFiles

        cache = None if self.cache is None else parse_size(self.cache, name="--cache")
        return CoordinatorConfig(
            model=str(default_model()) if model is None else model,
            moe_shards=self.moe_shards,
            threads=self.threads,
            max_context=self.max_context,
            prefill_chunk=self.prefill_chunk,
            call_timeout_s=self.call_timeout,
            shard_wait_s=self.shard_wait,
            transport=self.transport,
            tls=ClientFiles(
                _typed_path(self.tls_ca),
                _typed_path(self.tls_cert),
                _typed_path(self.tls_key),
                self.tls_server_name,
            ),
            wire=self.wire,
            store=StoreOptions(
                cache_bytes=cache,
                verify=self.verify,
                backend=self.io.backend,
                data_dirs=tuple(map(user_folder, self.data_dir or ())),
            ),
            prefetch=self.prefetch,
            warmup=self.warmup,
            speculation=speculation.config(),
            moe_dispatch=moe.config(),
            record_routing=recording.path,
        )


@grouped
def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="name or path of an artifact (default: the small one that comes with shoal), "
            "text to complete (- reads it from stdin)",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="tokens to generate at most; default: the model's own, or 128"),
    ] = None,
    sampling: SamplingOptions = SamplingOptions(),
    stop: Stop = None,
    chat: Annotated[bool, typer.Option("--chat", help="apply the model's chat template")] = False,
    system: System = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
    top_logprobs: Annotated[
        int, typer.Option(help="with --json: logprobs of the K likeliest tokens, too")
    ] = 0,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="token ids in place of a prompt")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="go on after an end-of-sequence token")
    ] = False,
    engine: EngineOptions = EngineOptions(),
    speculation: SpeculationOptions = SPECULATION_DEFAULTS,
    moe: MoeDispatchOptions = MOE_DISPATCH_DEFAULTS,
    recording: RecordingOptions = RECORDING_DEFAULTS,
) -> None:
    """Complete one prompt, streaming the text; a line of figures follows on stderr.

    The prompt is completed as it is; --chat wraps it in the model's chat template.
    """
    from coordinator.run import RunRequest, run_once

    if top_logprobs and not json:
        raise UsageError("--top-logprobs needs --json: there is nowhere else to show them")
    if system is not None and not chat:
        raise UsageError("--system needs --chat: a raw completion has no system prompt")
    model, prompt = _model_and_prompt(words or [], prompt_ids is not None)
    run_once(
        engine.config(model, speculation, moe, recording),
        RunRequest(
            prompt=prompt,
            prompt_ids=None if prompt_ids is None else _parse_ids(prompt_ids),
            is_chat=chat,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling.given(),
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
            num_top_logprobs=top_logprobs if json else None,
        ),
        feedback(),
    )


@grouped
def chat(
    model: Model = None,
    system: System = None,
    max_tokens: Annotated[int, typer.Option(help="tokens of one answer at most")] = 1024,
    sampling: SamplingOptions = SamplingOptions(),
    stop: Stop = None,
    engine: EngineOptions = EngineOptions(),
    speculation: SpeculationOptions = SPECULATION_DEFAULTS,
    moe: MoeDispatchOptions = MOE_DISPATCH_DEFAULTS,
) -> None:
    """Talk with a model: history, streaming, /reset, /system TEXT, /exit.

    Ctrl-C stops an answer, Ctrl-D leaves. Without a terminal every line of stdin is a message.
    """
    from coordinator.chat import ChatConfig, run_chat

    run_chat(
        engine.config(model, speculation, moe),
        ChatConfig(system, max_tokens, sampling.given(), tuple(stop or ())),
        feedback(),
    )


def _typed_path(typed: Path | None) -> Path | None:
    return None if typed is None else user_path(typed)


def _model_and_prompt(words: list[str], has_ids: bool) -> tuple[str | None, str | None]:
    """Return what the words of `shoal run` mean: a single one is the prompt, with ids the model."""
    match words:
        case [] if has_ids:
            return None, None
        case [model] if has_ids:
            return model, None
        case [word] if word != "-" and (word.endswith(SUFFIX) or is_artifact(word)):
            return word, _prompt(None)
        case [prompt]:
            return None, _prompt(prompt)
        case [model, prompt]:
            return model, _prompt(prompt)
        case []:
            return None, _prompt(None)
    raise UsageError(
        f"{len(words)} words, {words[2]!r} after the prompt: put the prompt in quotes, "
        'as in `shoal run MODEL "Once upon a time"`'
    )


def _prompt(prompt: str | None) -> str:
    if prompt is None:
        raise UsageError("no prompt: give a text, - to read it from stdin, or --prompt-ids 1,2,3")
    return sys.stdin.read() if prompt == "-" else prompt


def _parse_ids(text: str) -> tuple[int, ...]:
    ids: list[int] = []
    for index, word in enumerate(text.split(",")):
        if not word.strip().isdecimal():
            raise UsageError(
                f"--prompt-ids: {word.strip()!r} at place {index} is not a token id: "
                "write ids separated by commas, such as 1,2,3"
            )
        ids.append(int(word))
    return tuple(ids)


def feedback() -> "Feedback":
    """Return who hears how a start goes: standard error."""
    from coordinator.app import Feedback

    load = _LoadLine()

    def tell(text: str) -> None:
        load.leave()
        typer.echo(text, err=True)

    return Feedback(tell=tell, show_load=load.show, show_making=_show_making, end_load=load.end)


class _LoadLine:
    """How far reading is, on one line of a terminal that is written anew, until text follows.

    Only where reading takes long enough for somebody to wonder.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # experts may be read on another thread
        self._is_open = False  # something stands on the line, and the cursor behind it
        self._is_over = False

    def show(self, progress: "WarmUpProgress") -> None:
        with self._lock:
            if self._is_over or progress.elapsed_s < LOAD_SILENCE_S or not sys.stderr.isatty():
                return
            done, total = progress.num_bytes / 1e9, progress.total_bytes / 1e9
            self._is_open = progress.num_experts < progress.total_experts
            end = "" if self._is_open else "\n"
            sys.stderr.write(f"\rreading experts: {done:.2f} of {total:.2f} GB{end}")
            sys.stderr.flush()

    def leave(self) -> None:
        """Have what comes next begin on a line of its own."""
        with self._lock:
            self._leave()

    def end(self) -> None:
        """Show no more."""
        if not self._is_over:
            with self._lock:
                self._is_over = True
                self._leave()

    def _leave(self) -> None:
        if self._is_open:
            self._is_open = False
            sys.stderr.write("\n")
            sys.stderr.flush()


@contextmanager
def _show_making(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    # Once in a model's life, and it may take minutes: always told, with progress on a terminal.
    sys.stderr.write(f"making the {what} ({num_bytes / 1e9:.2f} GB)\n")

    def show(num_done: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{100 * num_done / max(1, num_bytes):.0f} %")
            sys.stderr.flush()

    yield show
    if sys.stderr.isatty():
        sys.stderr.write("\n")
