"""The coordinator's weights: what an artifact's dense part becomes in memory, nothing twice."""

from dataclasses import dataclass

from coordinator.array_types import F32
from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.layer_weights import LayerWeights, load_layer, load_linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embed: ops.Matrix  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: F32  # [D]
    lm_head: ops.Linear  # [V, D]; `embed` itself when the model ties them
    inv_freq: F32  # [rotary_dim / 2]


def load_weights(artifact: Artifact) -> ModelWeights:
    """Read every dense tensor of the artifact.

    Raises: CorruptArtifact naming the tensor whose bytes are not what the manifest says.
    """
    embed = artifact.matrix("embed")
    tied = artifact.spec.tie_embeddings
    memory = ops.HugeArena()
    return ModelWeights(
        embed=embed,
        layers=tuple(load_layer(artifact, i, memory) for i in range(artifact.spec.num_layers)),
        norm=artifact.vector("norm"),
        lm_head=ops.Linear(embed) if tied else load_linear(artifact, "lm_head"),
        inv_freq=artifact.vector("rope.inv_freq"),
    )
