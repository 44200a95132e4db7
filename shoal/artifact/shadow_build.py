"""Makes a shadow: reads a model's experts one by one and writes them at a coarser format.

Beside it goes a pass of some text (`text_pass`), which says how much each column of them matters.

Memory: two packed experts, the float32 values of one, the activations of the text. Every expert
read is checked against its hash.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.grid import GridProbe
from shoal.artifact.layout import expert_header
from shoal.artifact.manifest import PAGE, ExpertLayer, Manifest, Weights
from shoal.artifact.reader import Artifact
from shoal.artifact.text_pass import TextPass
from shoal.artifact.writer import ArtifactWriter, new_artifact
from shoal.errors import UsageError
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
        NumericError: the model's own activations are not finite on ordinary text.
        CannotWrite: no space, or no permission.
    """
    _check_target(target)
    with new_artifact(out, force=force, needed_bytes=shadow_bytes(target, fmt)) as writer:
        source = target.manifest
        manifest = replace(
            source,
            notes=(),
            has_dense=False,
            experts=tuple(_Maker(target, fmt, writer, progress).layers()),
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


class _Maker:
    """Writes a shadow's layers, in order, beside the pass that weighs their columns."""

    def __init__(
        self,
        target: Artifact,
        fmt: Format,
        writer: ArtifactWriter,
        progress: Callable[[int], None],
    ) -> None:
        self._target, self._fmt = target, fmt
        self._writer, self._progress = writer, progress
        self._text = TextPass.of(target)

    def layers(self) -> Iterator[ExpertLayer]:
        """Write every layer that has experts; yield the shadow's entry of each."""
        entries = {entry.layer: entry for entry in self._target.manifest.experts}
        for layer in range(self._target.spec.num_layers):
            if self._text is not None:
                self._text.enter(layer)
            if layer in entries:
                yield self._write_layer(entries[layer])
            if self._text is not None:
                self._text.leave()

    def _write_layer(self, entry: ExpertLayer) -> ExpertLayer:
        weights = _weights(entry, self._fmt)
        size = round_up(weights.num_bytes, PAGE)
        probe = GridProbe(entry.layer, weights, entry.num_experts)
        packed = ops.aligned_empty(size)
        packed[weights.num_bytes :] = 0
        hashes: list[str] = []
        header = expert_header(range(entry.num_experts), size)
        input_weights = None if self._text is None else self._text.input_weights()
        with self._writer.file(entry.file, header) as file:
            file.take_hash()
            for index in range(entry.num_experts):
                self._fill(entry, index, input_weights, packed[: weights.num_bytes])
                file.write(packed)
                hashes.append(file.take_hash())
                if index in probe.experts:
                    probe.add(packed)
                self._progress(size)
        return replace(
            entry,
            weights=weights,
            grid=probe.grid(),
            blake3=tuple(hashes),
            present=((0, entry.num_experts - 1),),
            offset=len(header),
        )

    def _fill(self, entry: ExpertLayer, index: int, input_weights: F32 | None, out: U8) -> None:
        own = self._target.read_expert(entry.layer, index)
        gate, up, down = ops.unpack_expert(_layout(entry.weights), own)
        hidden_weights = None
        if self._text is not None:
            hidden_weights = self._text.through_expert(index, gate, up, down)
        ops.pack_expert(
            _layout(_weights(entry, self._fmt)),
            _encode(self._fmt, gate, input_weights),
            _encode(self._fmt, up, input_weights),
            _encode(self._fmt, down, hidden_weights),
            out,
        )


def _encode(fmt: Format, values: F32, importance: F32 | None) -> U8:
    """Return [n, cols] float32 as row-major rows of `fmt`, columns padded with zeros."""
    missing = round_up(values.shape[1], fmt.block_cols) - values.shape[1]
    padded = np.pad(values, ((0, 0), (0, missing)))
    weights = None if importance is None else np.pad(importance, (0, missing))
    return ops.quantise_table(fmt, padded, weights)
