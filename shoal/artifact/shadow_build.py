"""Makes a shadow: reads a model's experts one by one and writes them at a coarser format.

Memory: two packed experts and the float32 values of one. Every expert read is checked against its
hash. The bytes are the same on every CPU, as those of `shoal convert` are.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.grid import GridProbe
from shoal.artifact.layout import expert_header
from shoal.artifact.manifest import PAGE, ExpertLayer, Manifest, Weights
from shoal.artifact.reader import Artifact
from shoal.artifact.writer import ArtifactWriter, new_artifact
from shoal.errors import NonFiniteWeights, UsageError
from shoal.experts.ownership import format_spans
from shoal.quant import Format, round_up

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


def shadow_bytes(target: Artifact, fmt: Format) -> int:
    """Return the bytes of the experts of the target's shadow in that format."""
    return sum(
        entry.num_experts * round_up(_weights(entry, fmt).num_bytes, PAGE)
        for entry in target.manifest.experts
    )


def make_shadow(
    target: Artifact, fmt: Format, out: Path, progress: Callable[[int], None], *, force: bool
) -> tuple[Manifest, tuple[Path, ...]]:
    """Write the target's experts in `fmt` to `out`, all or nothing.

    Args:
        progress: told the bytes of each expert that was written.
        force: replace a shadow that is already there.

    Returns the shadow's manifest and what leftovers of killed runs were removed.

    Raises:
        UsageError: the target lacks experts, or `out` is taken.
        CorruptArtifact: names the damaged expert of the target.
        NonFiniteWeights: values that are too large for the format.
        CannotWrite: no space, or no permission.
    """
    _check_target(target)
    with new_artifact(out, force=force, needed_bytes=shadow_bytes(target, fmt)) as writer:
        source = target.manifest
        manifest = replace(
            source,
            notes=(),
            has_dense=False,
            experts=tuple(
                _write_layer(target, entry, fmt, writer, progress) for entry in source.experts
            ),
            files=tuple(replace(file, present=False) for file in source.files),
            pregates=(),
            shadow_of=target.identity,
        )
        writer.finish(manifest)
    return manifest, writer.removed


def _check_target(target: Artifact) -> None:
    if target.manifest.shadow_of is not None:
        raise UsageError(f"{target.path} is a shadow itself: make one of the model")
    if not target.manifest.experts:
        raise UsageError(f"{target.path} has no layer with experts: there is nothing to shadow")
    for entry in target.manifest.experts:
        absent = sorted(set(range(entry.num_experts)) - set(_owned(target, entry.layer)))
        if absent:
            raise UsageError(
                f"{target.path} is a slice without experts {format_spans(absent)} of layer"
                f" {entry.layer}: a shadow is made of the whole model"
            )


def _owned(target: Artifact, layer: int) -> tuple[int, ...]:
    return target.owned_experts.get(layer, ())


def _weights(entry: ExpertLayer, fmt: Format) -> Weights:
    return replace(entry.weights, gate_up=fmt, down=fmt)


def _layout(weights: Weights) -> ops.ExpertLayout:
    return ops.ExpertLayout(weights.dim, weights.ffn_dim, weights.gate_up, weights.down)


def _write_layer(
    target: Artifact,
    entry: ExpertLayer,
    fmt: Format,
    writer: ArtifactWriter,
    progress: Callable[[int], None],
) -> ExpertLayer:
    weights = _weights(entry, fmt)
    size = round_up(weights.num_bytes, PAGE)
    probe = GridProbe(entry.layer, weights, entry.num_experts)
    packed = ops.aligned_empty(size)
    packed[weights.num_bytes :] = 0
    hashes: list[str] = []
    header = expert_header(range(entry.num_experts), size)
    with writer.file(entry.file, header) as file:
        file.take_hash()
        for index in range(entry.num_experts):
            _shadow_expert(target, entry, index, fmt, packed[: weights.num_bytes])
            file.write(packed)
            hashes.append(file.take_hash())
            if index in probe.experts:
                probe.add(packed)
            progress(size)
    return replace(
        entry,
        weights=weights,
        grid=probe.grid(),
        blake3=tuple(hashes),
        present=((0, entry.num_experts - 1),),
        offset=len(header),
    )


def _shadow_expert(target: Artifact, entry: ExpertLayer, index: int, fmt: Format, out: U8) -> None:
    own = target.read_expert(entry.layer, index)
    gate, up, down = (
        _encode(fmt, values) for values in ops.unpack_expert(_layout(entry.weights), own)
    )
    if not all(ops.check_finite(fmt, rows) for rows in (gate, up, down)):
        raise NonFiniteWeights(
            f"{target.path}: expert {index} of layer {entry.layer} has values that are too large"
            f" for {fmt.label}"
        )
    ops.pack_expert(_layout(_weights(entry, fmt)), gate, up, down, out)


def _encode(fmt: Format, values: F32) -> U8:
    """Return [n, cols] float32 as row-major rows of `fmt`, columns padded with zeros."""
    cols = values.shape[1]
    padded = np.pad(values, ((0, 0), (0, round_up(cols, fmt.block_cols) - cols)))
    return _q4_0(padded).reshape(values.shape[0], -1)


def _q4_0(values: F32) -> U8:
    blocks = values.reshape(-1, 32)
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)][:, None]
    scales = (largest / np.float32(-8)).astype("<f2")
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    quants = np.clip(np.rint(blocks / divisors), -8, 7).astype(np.int8) + 8
    quants = quants.astype(np.uint8)
    packed = quants[:, :16] | quants[:, 16:] << 4
    return np.concatenate([scales.view(np.uint8), packed], axis=1)
