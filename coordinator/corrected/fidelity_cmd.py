"""`shoal bench fidelity`: how near --moe-dispatch batch comes to the exact text, on your model."""

import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.corrected.config import MAX_ITERS
from shoal.errors import RequestError, UsageError

if TYPE_CHECKING:
    from coordinator.corrected.fidelity import Fidelity

TEMPERATURE = 0.8  # free running: greedily, small models soon repeat themselves, however near

app = typer.Typer(help="Measure what a mode costs or is worth, on your model and machines.")


@dataclass(frozen=True, slots=True)
class FidelityRequest:
    """What to measure. shadow: a format or a path. iters: of the corrected pass.

    text: None: a passage of our own. num_prompt: its tokens that are read exactly, before
    num_tokens that are run one by one, and before as many that are written freely.
    temperature: of what is written. zeros: also with nothing for a stand-in, as larql does it.
    """

    model: str
    shadow: str
    moe_shards: str | None = None
    iters: tuple[int, ...] = (1, 2, 3, 4)
    text: str | None = None
    num_prompt: int = 32
    num_tokens: int = 200
    temperature: float = TEMPERATURE
    zeros: bool = True
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class FidelityRow:
    """One mode. iters: None: without a round trip, or exact."""

    mode: str
    iters: int | None
    local_expert_bytes: int
    fidelity: "Fidelity"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FidelityReport:
    """Everything that is measured, and of what. expert_bytes: of the model itself."""

    model: str
    identity: str
    numerics: str
    isa: str
    expert_bytes: int
    shadow_format: str
    shadow_bits: float
    num_layers: int
    num_prompt: int
    num_tokens: int
    temperature: float
    rows: tuple[FidelityRow, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@app.command()
def fidelity(
    model: Annotated[str, typer.Argument(help="name or path of an artifact")],
    shadow: Annotated[
        str, typer.Option(metavar="q3|q4|PATH", help="a coarser copy of the experts: the stand-in")
    ] = "q4",
    moe_shards: Annotated[
        str | None, typer.Option(metavar="MAP", help="where the experts are; default: here")
    ] = None,
    iters: Annotated[str, typer.Option(metavar="N,N", help="round trips a token")] = "1,2,3,4",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="default: a passage of our own")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="of the text, read exactly")] = 32,
    tokens: Annotated[int, typer.Option(help="of the text, one by one; and as many free")] = 200,
    temperature: Annotated[
        float, typer.Option(help="of what is written free; 0: the likeliest token")
    ] = TEMPERATURE,
    zeros: Annotated[
        bool, typer.Option("--zeros/--no-zeros", help="also with nothing for a stand-in")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="of the kernels; default: all cores")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one object instead")] = False,
) -> None:
    """Compare --moe-dispatch batch with the exact text: KL, agreement, routing, perplexity.

    Teacher forced (a given text, token by token) and free running (what each mode writes).
    """
    import orjson

    request = FidelityRequest(
        model=model,
        shadow=shadow,
        moe_shards=moe_shards,
        iters=_parse_iters(iters),
        text=None if text is None else text.read_text("utf-8"),
        num_prompt=prompt_tokens,
        num_tokens=tokens,
        temperature=temperature,
        zeros=zeros,
        threads=threads,
    )
    report = measure_fidelity(request)
    if as_json:
        sys.stdout.write(orjson.dumps(report.as_json(), option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        sys.stdout.write(table(report))


def measure_fidelity(request: FidelityRequest) -> FidelityReport:
    """Run every mode over the text.

    Raises:
        UsageError: a number out of range, no such shadow, one too coarse.
        RequestError: the text is too short.
        As `start_engine`.
    """
    from coordinator.app import CoordinatorConfig, OpenedModel, open_dispatch
    from coordinator.commands import feedback
    from coordinator.corrected.compose import check_shadow
    from coordinator.corrected.fidelity import FidelityBench, Zeros
    from coordinator.corrected.passage import PASSAGE
    from coordinator.corrected.surrogate import Shadow, expert_bits
    from coordinator.expert_branch import DispatchedExperts
    from coordinator.speculation.shadow_experts import ShadowExperts
    from shoal import numerics, ops
    from shoal.artifact.shadow import expert_bytes, find_or_make

    told = feedback()
    config = CoordinatorConfig(request.model, request.moe_shards, request.threads, warmup=True)
    model = OpenedModel(config)
    artifact = model.artifact
    ids = model.tokenizer.encode(PASSAGE if request.text is None else request.text)
    num_ids = request.num_prompt + request.num_tokens
    _check_lengths(request, len(ids), model.engine_config.max_context)
    numerics.verify()
    if request.threads is not None:
        ops.set_threads(request.threads)
    coarse = find_or_make(artifact, request.shadow, told.show_making)
    check_shadow(coarse)
    rows: list[FidelityRow] = []
    with ExitStack() as stack:
        shadow = ShadowExperts(coarse, told.show_load)
        stack.callback(shadow.close)
        dispatch = open_dispatch(model.config, artifact, told)
        stack.callback(dispatch.close)
        bench = FidelityBench(
            artifact,
            dispatch,
            ids[:num_ids],
            request.num_prompt,
            request.num_tokens,
            ops.SamplingParams(temperature=request.temperature),
        )
        rows.append(FidelityRow("stream", None, 0, bench.stream()))
        alone = bench.alone(DispatchedExperts(coarse, shadow.dispatch))
        rows.append(FidelityRow("shadow alone", None, shadow.num_bytes, alone))
        surrogate = Shadow(coarse, shadow.dispatch)
        for count in request.iters:
            measured = bench.corrected(surrogate, count)
            rows.append(FidelityRow("batch", count, shadow.num_bytes, measured))
        for count in request.iters if request.zeros else ():
            rows.append(FidelityRow("zeros", count, 0, bench.corrected(Zeros(artifact), count)))
    return FidelityReport(
        artifact.name,
        artifact.identity,
        numerics.NUMERICS,
        ops.isa(),
        expert_bytes(artifact.manifest),
        coarse.manifest.quantisation,
        expert_bits(coarse),
        sum(layer.router is not None for layer in artifact.spec.layers),
        request.num_prompt,
        request.num_tokens,
        request.temperature,
        tuple(rows),
    )


def table(report: FidelityReport) -> str:
    """Return a report as Markdown, for a person."""
    share = 100 * report.rows[1].local_expert_bytes / report.expert_bytes
    lines = [
        f"{report.model}: {report.num_layers} layers, stand-in {report.shadow_format}, "
        f"{report.shadow_bits:.2f} bits a weight, {share:.0f} % of the experts' bytes; "
        f"{report.num_tokens} tokens after {report.num_prompt}",
        "",
        "| mode | iters | top-1 | KL | perplexity | routing | free: top-1 | free: perplexity |"
        " free: same | free: distinct |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        forced, free = row.fidelity.forced, row.fidelity.free
        routing = "-" if row.fidelity.routing is None else f"{row.fidelity.routing:.3f}"
        lines.append(
            f"| {row.mode} | {'-' if row.iters is None else row.iters} | {forced.agreement:.3f} "
            f"| {forced.kl:.2g} | {forced.perplexity:.2f} | {routing} | {free.agreement:.3f} "
            f"| {free.exact_perplexity:.2f} | {free.same_tokens} | {free.distinct:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _parse_iters(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_ITERS for word in words):
        raise UsageError(
            f"--iters {text}: must be numbers in 1..{MAX_ITERS}, separated by commas, such as 1,2,3"
        )
    return tuple(map(int, words))


def _check_lengths(request: FidelityRequest, num_ids: int, max_context: int) -> None:
    for name, value in (("prompt-tokens", request.num_prompt), ("tokens", request.num_tokens)):
        if value < 2:
            raise UsageError(f"--{name} {value}: must be at least 2")
    wanted = request.num_prompt + request.num_tokens
    if num_ids < wanted:
        raise RequestError(
            f"the text has {num_ids} tokens, --prompt-tokens and --tokens ask for {wanted}: give a"
            " longer one with --text, or ask for fewer"
        )
    if wanted > max_context:
        raise RequestError(f"{wanted} tokens do not fit the context of {max_context} tokens")
