"""The safetensors headers of an artifact's files, from what they hold (core).

They follow from the manifest alone, so `verify` compares them byte for byte.
"""

from collections.abc import Iterable, Sequence

from shoal.artifact.inventory import Kind, Slot
from shoal.artifact.manifest import PAGE, ExpertLayer, Manifest, slot_bytes
from shoal.artifact.pregate import PregatePlan
from shoal.artifact.safetensors_header import build_header
from shoal.quant import Format


def dense_header(slots: Sequence[Slot], formats: Sequence[tuple[Format, Format | None]]) -> bytes:
    """Return the header of dense.safetensors: vectors as F32, everything else as U8."""
    tensors: list[tuple[str, str, tuple[int, ...], int]] = []
    for slot, (fmt, down) in zip(slots, formats, strict=True):
        size = slot_bytes(slot, fmt, down)
        is_vector = slot.kind is Kind.VECTOR
        tensors.append(
            (slot.name, "F32" if is_vector else "U8", slot.shape if is_vector else (size,), size)
        )
    return build_header(tensors, PAGE)


def expert_header(indices: Iterable[int], expert_bytes: int) -> bytes:
    """Return the header of a layer's file that holds these experts."""
    return build_header(
        [(f"experts.{index}", "U8", (expert_bytes,), expert_bytes) for index in indices], PAGE
    )


def pregate_header(plans: Iterable[PregatePlan]) -> bytes:
    """Return the header of pregate.safetensors."""
    return build_header(
        [(plan.name, "U8", (plan.num_bytes,), plan.num_bytes) for plan in plans], PAGE
    )


def manifest_dense_header(manifest: Manifest) -> bytes:
    """Return the header that dense.safetensors of this manifest must have."""
    return dense_header(
        [tensor.slot for tensor in manifest.dense],
        [(tensor.format, tensor.down) for tensor in manifest.dense],
    )


def manifest_expert_header(layer: ExpertLayer) -> bytes:
    """Return the header that the file of this layer must have."""
    present = (i for first, last in layer.present for i in range(first, last + 1))
    return expert_header(present, layer.expert_bytes)
