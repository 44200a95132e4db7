"""`shoal inspect`: show what an artifact is made of."""

import json
import sys
from typing import Annotated

import typer

from shoal.paths import resolve_model


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an artifact: path or name")],
    tensors: Annotated[bool, typer.Option("--tensors", help="list every dense tensor")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Show what an artifact is made of: geometry, formats, sizes, what a slice holds.

    Reads the manifest and the files' sizes; `shoal verify` reads the rest.
    """
    from rich.console import Console

    from client import inspection  # and NumPy with it: not for --help
    from shoal.artifact import Artifact

    artifact = Artifact.open(resolve_model(model))
    summary = inspection.summarise(artifact)
    if as_json:
        if tensors:
            summary["tensors"] = inspection.tensor_list(artifact)
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(inspection.overview(summary))
    if summary["experts"]:
        console.print(inspection.expert_table(summary))
    for note in summary["notes"]:
        console.print(f"note: {note}")
    if tensors:
        console.print(inspection.tensor_table(inspection.tensor_list(artifact)))
