"""`shoal convert`: make an artifact NAME.shoal from a checkpoint."""

import time
from pathlib import Path
from typing import Annotated

import typer

from client.progress import byte_progress, say
from shoal.errors import UsageError
from shoal.paths import SUFFIX, models_dir, user_path
from shoal.quant import Format, parse_format


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="a Hugging Face folder, a GGUF file, or what `shoal pull` fetched"
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="the artifact's folder; a bare NAME goes to $SHOAL_HOME/models/NAME.shoal",
        ),
    ],
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="f32, f16, bf16, q8_0, q4_0, q4_1, q4_k, q4_t or q3_t; default: the source's own",
        ),
    ] = None,
    ffn_slices: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="experts that a dense FFN is cut into; default: up to 16"
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="folder of a tokenizer.json to use instead"),
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="a model that takes token ids only")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
) -> None:
    """Make an artifact from a checkpoint.

    Memory stays bounded: one expert at a time. OUT appears when it is complete, never before.
    Exit status 3: the checkpoint cannot be used, or the disk is full.
    """
    from client.convert import pipeline  # and NumPy with it: not for --help
    from client.convert.open_source import open_source

    started = time.monotonic()
    target = output_path(out)
    options = pipeline.Options(
        quant=_format(quant),
        ffn_slices=ffn_slices,
        tokenizer=tokenizer,
        allow_no_tokenizer=no_tokenizer,
        force=force,
    )
    plan = pipeline.make_plan(open_source(source), options)
    with byte_progress(f"convert {target.name}", plan.num_bytes) as progress:
        manifest, removed = pipeline.convert(plan, target, progress)
    for folder in removed:
        say(f"removed what a killed run had left: {folder}")
    for note in manifest.notes:
        say(f"note: {note}")
    seconds = time.monotonic() - started
    say(f"{target}: {plan.num_bytes:,} bytes, {manifest.quantisation}, in {seconds:.1f} s")
    say(f"identity {manifest.identity}")


def output_path(typed: str) -> Path:
    """Return where an artifact named so is written: NAME alone goes among the models."""
    path = user_path(typed)
    if path.name in ("", ".", ".."):
        raise UsageError(f"{typed!r} is no name for an artifact")
    if len(path.parts) == 1 and path.suffix != SUFFIX:
        return models_dir() / f"{path.name}{SUFFIX}"
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def _format(label: str | None) -> Format | None:
    if label is None:
        return None
    try:
        return parse_format(label)
    except ValueError as error:
        raise UsageError(f"--quant: {error}") from None
