"""`shoal shadow`: make a coarser copy of a model's experts."""

import time
from typing import Annotated

import typer

from client.convert_cmd import output_path
from client.progress import byte_progress, say
from shoal.paths import resolve_model


def shadow(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="an artifact with all its experts: path or name")
    ],
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="[OUT]",
            help="the shadow's folder; default: in the model's own, where it is found",
        ),
    ] = None,
    fmt: Annotated[
        str, typer.Option("--format", metavar="q3|q4", help="3.5 or 4.5 bits a weight")
    ] = "q4",
    force: Annotated[bool, typer.Option("--force", help="replace it if it exists")] = False,
) -> None:
    """Make a shadow: the model's experts again, at 3.5 or 4.5 bits a weight.

    It stays where the coordinator is and drafts for experts that are far away (--shadow of
    `shoal run`): the model verifies every token, so the text is the model's own. MODEL is not
    changed. The shadow appears when it is complete, never before.
    """
    from shoal.artifact import Artifact  # and NumPy with it: not for --help
    from shoal.artifact.shadow import expert_bytes, shadow_format, shadow_place
    from shoal.artifact.shadow_build import make_shadow, shadow_bytes

    started = time.monotonic()
    chosen = shadow_format(fmt)
    artifact = Artifact.open(resolve_model(model))
    target = shadow_place(artifact, fmt) if out is None else output_path(out)
    size = shadow_bytes(artifact, chosen)
    with byte_progress(f"{fmt} shadow of {artifact.name}", size) as progress:
        manifest, removed = make_shadow(artifact, chosen, target, progress, force=force)
    for folder in removed:
        say(f"removed what a killed run had left: {folder}")
    share = 100 * size / expert_bytes(artifact.manifest)
    seconds = time.monotonic() - started
    say(
        f"{target}: {size:,} bytes, {share:.1f} % of the model's experts,"
        f" {manifest.quantisation}, in {seconds:.1f} s"
    )
    say(f"identity {manifest.identity}, shadow of {artifact.identity}")
