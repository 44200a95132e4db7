"""Slices: the whole list of a model's tensors with the bytes of a part of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from shoal import ops
from shoal.artifact.layout import manifest_dense_header, manifest_expert_header, pregate_header
from shoal.artifact.manifest import (
    DENSE_FILE,
    MANIFEST_NAME,
    ExpertLayer,
    Manifest,
    TextFile,
    encode_manifest,
)
from shoal.artifact.pregate import PREGATE_FILE, PregateEntry, PregatePlan, plan_pregates
from shoal.artifact.pregate_build import write_pregates
from shoal.artifact.reader import Artifact, read_exact
from shoal.artifact.writer import ArtifactWriter, FileWriter, new_artifact
from shoal.errors import CorruptArtifact, UsageError
from shoal.experts.ownership import format_spans, spans_of
from shoal.paths import SHADOWS_DIR, SUFFIX

_COPY_BYTES = 16 << 20
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Part:
    """What a slice holds.

    dense: dense.safetensors and the text files: what a coordinator needs.
    experts: layer -> indices, ascending.
    """

    dense: bool
    experts: Mapping[int, Sequence[int]]


def coordinator_part() -> Part:
    """What a coordinator needs: everything but the experts."""
    return Part(dense=True, experts={})


def node_part(
    manifest: Manifest, experts: Sequence[int] | None, layers: Sequence[int] | None
) -> Part:
    """What an expert node needs: these experts of these layers; None means all.

    Raises: UsageError where that is nothing.
    """
    wanted = {
        entry.layer: [i for i in range(entry.num_experts) if experts is None or i in set(experts)]
        for entry in manifest.experts
        if layers is None or entry.layer in set(layers)
    }
    part = Part(
        dense=False, experts={layer: indices for layer, indices in wanted.items() if indices}
    )
    if not part.experts:
        raise UsageError("the slice would hold no expert: those layers have none of that range")
    return part


def slice_bytes(artifact: Artifact, part: Part) -> int:
    """Return the bytes of weights that the slice will hold."""
    dense = sum(tensor.num_bytes for tensor in artifact.manifest.dense) if part.dense else 0
    dense += sum(plan.num_bytes for plan in _pregates(artifact, part))
    return dense + sum(
        len(indices) * artifact.expert_layer(layer).expert_bytes
        for layer, indices in part.experts.items()
    )


def write_slice(
    artifact: Artifact,
    part: Part,
    out: Path,
    progress: Progress,
    *,
    force: bool,
    shadows: Mapping[str, Artifact] = MappingProxyType({}),
) -> tuple[Manifest, tuple[Path, ...]]:
    """Copy a part, every byte checked against its hash on the way.

    Args:
        shadows: the model's own, by name (`q4`): they go along, to where `open_shadow` looks.

    Returns the slice's manifest and what leftovers of killed runs were removed.

    Raises:
        CorruptArtifact: the source is damaged.
        UsageError: it lacks what is asked for, or `out` is taken; CannotWrite.
    """
    source = artifact.manifest
    needed = slice_bytes(artifact, part)
    needed += sum(slice_bytes(one, whole_shadow(one.manifest)) for one in shadows.values())
    _check_source(artifact, part, out)
    with new_artifact(out, force=force, needed_bytes=needed) as writer:
        if part.dense:
            _copy_dense(artifact, writer, progress)
        manifest = replace(
            source,
            has_dense=part.dense,
            experts=tuple(
                _copy_experts(artifact, entry, part, writer, progress) for entry in source.experts
            ),
            files=tuple(_copy_text(artifact, file, part, writer) for file in source.files),
            pregates=_write_pregates(artifact, part, writer, progress),
        )
        assert manifest.identity == source.identity, "a slice speaks of the same model"
        for name, shadow in shadows.items():
            _copy_shadow(shadow, name, writer, progress)
        writer.finish(manifest)
    return manifest, writer.removed


def whole_shadow(manifest: Manifest) -> Part:
    """Return all that a shadow holds."""
    return Part(False, {entry.layer: range(entry.num_experts) for entry in manifest.experts})


def _check_source(artifact: Artifact, part: Part, out: Path) -> None:
    if out.resolve() == artifact.path.resolve():
        raise UsageError(f"{out} is the model itself: a slice needs another place")
    if part.dense and not artifact.manifest.has_dense:
        raise UsageError(
            f"{artifact.path} is a slice without the dense part: slice the whole model"
        )
    for layer, indices in part.experts.items():
        absent = sorted(set(indices) - set(artifact.owned_experts.get(layer, ())))
        if absent:
            raise UsageError(
                f"{artifact.path} is a slice without experts {format_spans(absent)} of layer"
                f" {layer}: slice the whole model"
            )


def _copy_dense(artifact: Artifact, writer: ArtifactWriter, progress: Progress) -> None:
    path = artifact.path / DENSE_FILE
    buffer = ops.aligned_empty(_COPY_BYTES)
    with writer.file(DENSE_FILE, manifest_dense_header(artifact.manifest)) as file:
        file.take_hash()
        for tensor in artifact.manifest.dense:
            for done in range(0, tensor.num_bytes, _COPY_BYTES):
                piece = buffer[: min(_COPY_BYTES, tensor.num_bytes - done)]
                read_exact(path, tensor.offset + done, piece)
                file.write(piece)
                progress(piece.nbytes)
            _check(file, tensor.blake3, f"{path}: tensor {tensor.name}")


def _copy_experts(
    artifact: Artifact, entry: ExpertLayer, part: Part, writer: ArtifactWriter, progress: Progress
) -> ExpertLayer:
    indices = part.experts.get(entry.layer, ())
    spans = tuple(spans_of(indices))
    if not spans:
        return replace(entry, present=(), offset=0)
    copied = replace(entry, present=spans)
    header = manifest_expert_header(copied)
    _copy_layer(artifact, entry, indices, header, writer, progress)
    return replace(copied, offset=len(header))


def _copy_shadow(shadow: Artifact, name: str, writer: ArtifactWriter, progress: Progress) -> None:
    folder = f"{SHADOWS_DIR}/{name}{SUFFIX}/"
    for entry in shadow.manifest.experts:
        header = manifest_expert_header(entry)
        _copy_layer(shadow, entry, range(entry.num_experts), header, writer, progress, folder)
    with writer.file(folder + MANIFEST_NAME) as file:
        file.write(encode_manifest(shadow.manifest))


def _copy_layer(
    artifact: Artifact,
    entry: ExpertLayer,
    indices: Sequence[int],
    header: bytes,
    writer: ArtifactWriter,
    progress: Progress,
    folder: str = "",
) -> None:
    buffer = ops.aligned_empty(entry.expert_bytes)
    with writer.file(folder + entry.file, header) as file:
        file.take_hash()
        for index in indices:
            where = artifact.expert_location(entry.layer, index)
            read_exact(where.path, where.offset, buffer)
            file.write(buffer)
            _check(file, where.blake3, f"{where.path}: expert {index} of layer {entry.layer}")
            progress(buffer.nbytes)


def _pregates(artifact: Artifact, part: Part) -> tuple[PregatePlan, ...]:
    # A node's slice takes those that the source has, or can make: an older artifact has none.
    if not part.experts or not (artifact.manifest.pregates or artifact.manifest.has_dense):
        return ()
    schemes = {layer.layer: layer.weights.scheme for layer in artifact.manifest.experts}
    return plan_pregates(artifact.spec, schemes)


def _write_pregates(
    artifact: Artifact, part: Part, writer: ArtifactWriter, progress: Progress
) -> tuple[PregateEntry, ...]:
    plans = _pregates(artifact, part)
    if not artifact.manifest.pregates:
        return write_pregates(plans, artifact.dense_values, writer, progress)
    if not plans:
        return ()
    source = artifact.manifest.pregates
    with writer.file(PREGATE_FILE, pregate_header(plans)) as file:
        file.take_hash()
        for entry in source:
            file.write(artifact.read_pregate(entry).data)
            _check(file, entry.blake3, f"{artifact.path}: tensor {entry.plan.name}")
            progress(entry.plan.num_bytes)
    return source


def _copy_text(artifact: Artifact, file: TextFile, part: Part, writer: ArtifactWriter) -> TextFile:
    if part.dense:
        data = artifact.text(file.name).encode()
        with writer.file(file.name) as copy:
            copy.write(data)
    return replace(file, present=part.dense)


def _check(file: FileWriter, blake3: str, what: str) -> None:
    if file.take_hash() != blake3:
        raise CorruptArtifact(
            f"{what}: its bytes are not those that were written; fetch or convert the model again"
        )
