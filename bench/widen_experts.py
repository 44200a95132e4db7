"""A model with the same tokens and routing, and experts of any size: for measuring reads.

python bench/widen_experts.py MODEL.shoal OUT.shoal FFN_DIM

A small trained model routes as trained models do, but its experts are too small to be worth a read.
Here each expert gets more hidden values: gate and down random, up zero, so that every new hidden
value is exactly zero and outputs stay what they were. Experts become Q8_0; the dense part and
the pre-gate matrices are copied.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.convert.transcode import encode
from shoal import ops
from shoal.artifact import Artifact, ExpertLayer, Manifest, Weights
from shoal.artifact.canonical import digest
from shoal.artifact.layout import expert_header
from shoal.artifact.manifest import DENSE_FILE, PAGE, expert_file
from shoal.artifact.pregate import PREGATE_FILE
from shoal.artifact.writer import ArtifactWriter, new_artifact
from shoal.quant import LANES, Format, group_bytes, round_up

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def unpack_expert(layout: ops.ExpertLayout, packed: U8) -> tuple[F32, F32, F32]:
    """Return gate [I, D], up [I, D] and down [D, I] of an expert in kernel layout."""
    groups = round_up(layout.ffn_dim, LANES) // LANES
    size = group_bytes(layout.gate_up, layout.dim)
    pairs = packed[: 2 * groups * size].reshape(groups, 2, size)

    def matrix(fmt: Format, rows: int, cols: int, data: U8) -> F32:
        aligned = ops.aligned_empty(data.size)
        aligned[:] = data.reshape(-1)
        return ops.unpack_matrix(ops.Matrix(fmt, rows, cols, aligned))

    gate = matrix(layout.gate_up, layout.ffn_dim, layout.dim, pairs[:, 0])
    up = matrix(layout.gate_up, layout.ffn_dim, layout.dim, pairs[:, 1])
    down = packed[2 * groups * size : layout.num_bytes]
    return gate, up, matrix(layout.down, layout.dim, layout.ffn_dim, down)


def widen(artifact: Artifact, out: Path, ffn_dim: int) -> None:
    """Write the wider model, unless it is there."""
    if out.exists():
        return
    weights = Weights(artifact.spec.model_dim, ffn_dim, Format.Q8_0, Format.Q8_0)
    size = round_up(weights.num_bytes, PAGE)
    count = sum(entry.num_experts for entry in artifact.manifest.experts)
    with new_artifact(out, force=False, needed_bytes=count * size) as writer:
        layers = tuple(
            _write_layer(artifact, entry, weights, writer) for entry in artifact.manifest.experts
        )
        names = [DENSE_FILE, *(file.name for file in artifact.manifest.files)]
        for name in [*names, *([PREGATE_FILE] if artifact.manifest.pregates else [])]:
            with writer.file(name) as file:
                file.write((artifact.path / name).read_bytes())
        spec = replace(
            artifact.spec,
            layers=tuple(
                layer if layer.router is None else replace(layer, ffn_dim=ffn_dim)
                for layer in artifact.spec.layers
            ),
        )
        writer.finish(_manifest(artifact, spec=spec, experts=layers))


def _manifest(artifact: Artifact, **changes: object) -> Manifest:
    return replace(artifact.manifest, **changes)  # type: ignore[arg-type]


def _write_layer(
    artifact: Artifact, entry: ExpertLayer, weights: Weights, writer: ArtifactWriter
) -> ExpertLayer:
    layout = artifact.expert_layout(entry.layer)
    wide = ops.ExpertLayout(weights.dim, weights.ffn_dim, weights.gate_up, weights.down)
    size = round_up(weights.num_bytes, PAGE)
    header = expert_header(range(entry.num_experts), size)
    hashes: list[str] = []
    rng = np.random.default_rng(entry.layer)
    with writer.file(expert_file(entry.layer), header) as file:
        for index in range(entry.num_experts):
            gate, up, down = unpack_expert(layout, artifact.read_expert(entry.layer, index))
            more = weights.ffn_dim - layout.ffn_dim
            noise = rng.standard_normal((more, weights.dim), np.float32) * np.float32(0.05)
            packed = ops.aligned_empty(size)
            packed[weights.num_bytes :] = 0
            ops.pack_expert(
                wide,
                encode(Format.Q8_0, np.concatenate([gate, noise])),
                encode(Format.Q8_0, np.concatenate([up, np.zeros_like(noise)])),
                encode(Format.Q8_0, np.concatenate([down, noise.T], axis=1)),
                packed[: weights.num_bytes],
            )
            file.write(packed)
            hashes.append(digest(packed.data))
    return replace(
        entry,
        weights=weights,
        blake3=tuple(hashes),
        present=((0, entry.num_experts - 1),),
        offset=len(header),
    )


def main() -> None:
    """Widen the model that the command line names."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    widen(Artifact.open(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))


if __name__ == "__main__":
    main()
