"""The model on disk: NAME.shoal. Specification: docs/formats/artifact.md."""

from shoal.artifact.inventory import Kind, Slot, dense_slots
from shoal.artifact.manifest import (
    DenseTensor,
    ExpertLayer,
    Manifest,
    TextFile,
    Weights,
    decode_manifest,
    encode_manifest,
)
from shoal.artifact.reader import Artifact, ExpertLocation

__all__ = [
    "Artifact",
    "DenseTensor",
    "ExpertLayer",
    "ExpertLocation",
    "Kind",
    "Manifest",
    "Slot",
    "TextFile",
    "Weights",
    "decode_manifest",
    "dense_slots",
    "encode_manifest",
]
