"""`shoal slice`: cut an artifact for a coordinator or an expert node."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from client.convert_cmd import output_path
from client.progress import byte_progress, say
from shoal.errors import UsageError
from shoal.paths import resolve_model

if TYPE_CHECKING:
    from shoal.artifact import Artifact
    from shoal.artifact.slicing import Part


class Preset(StrEnum):
    COORDINATOR = "coordinator"
    EXPERT_NODE = "expert-node"


def slice_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an artifact: path or name")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="the slice's folder, or a NAME among the models")
    ],
    preset: Annotated[
        Preset, typer.Option(help="coordinator: all but the experts; expert-node: experts only")
    ],
    experts: Annotated[
        str | None, typer.Option(metavar="RANGES", help="of each layer: 0-63, 0-31+96-127")
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="RANGES", help="0-14; default: all")] = None,
    shadow: Annotated[
        str | None,
        typer.Option(
            metavar="q3|q4", help="with coordinator: take the model's shadow along; made if needed"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
) -> None:
    """Cut an artifact: the whole list of tensors, the bytes of a part.

    Whole and slice have one identity, so a node and a coordinator can prove that they speak of
    one model. Every byte is checked against its hash on the way.
    """
    from shoal.artifact import Artifact  # and NumPy with it: not for --help
    from shoal.artifact.shadow import find_or_make, shadow_format
    from shoal.artifact.slicing import slice_bytes, whole_shadow, write_slice

    artifact = Artifact.open(resolve_model(model))
    part = _part(artifact, preset, experts, layers)
    target = output_path(out)
    if shadow is not None and preset is not Preset.COORDINATOR:
        raise UsageError(
            "--shadow goes with --preset coordinator: a node computes the real experts"
        )
    shadows = {}
    if shadow is not None:
        shadow_format(shadow)
        shadows[shadow] = find_or_make(artifact, shadow, byte_progress)
    size = slice_bytes(artifact, part)
    size += sum(slice_bytes(one, whole_shadow(one.manifest)) for one in shadows.values())
    with byte_progress(f"slice {target.name}", size) as progress:
        manifest, removed = write_slice(
            artifact, part, target, progress, force=force, shadows=shadows
        )
    for folder in removed:
        say(f"removed what a killed run had left: {folder}")
    say(f"{target}: {size:,} bytes of {_whole_bytes(artifact):,}, identity {manifest.identity}")


def _part(artifact: "Artifact", preset: Preset, experts: str | None, layers: str | None) -> "Part":
    from shoal.artifact.slicing import coordinator_part, node_part
    from shoal.experts.ownership import parse_spans

    if preset is Preset.COORDINATOR:
        if experts is not None or layers is not None:
            raise UsageError("--experts and --layers go with --preset expert-node")
        return coordinator_part()
    spec = artifact.spec
    most = max((entry.num_experts for entry in artifact.manifest.experts), default=0)
    if most == 0:
        raise UsageError(f"{artifact.path} has no layer with experts")
    return node_part(
        artifact.manifest,
        None if experts is None else parse_spans(experts, name="--experts", limit=most),
        None if layers is None else parse_spans(layers, name="--layers", limit=spec.num_layers),
    )


def _whole_bytes(artifact: "Artifact") -> int:
    dense = sum(tensor.num_bytes for tensor in artifact.manifest.dense)
    return dense + sum(
        layer.num_experts * layer.expert_bytes for layer in artifact.manifest.experts
    )
