"""Which dense tensors a model has, from its spec alone: names, kinds, shapes, order (core).

The converter writes exactly these, the reader demands exactly these, and a family page says where
in a checkpoint each comes from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from shoal.model_spec import LayerSpec, ModelSpec, QkNorm, RouterKind


class Kind(StrEnum):
    MATRIX = "matrix"  # [rows, cols] in kernel layout
    VECTOR = "vector"  # [n] float32
    FFN = "ffn"  # a dense FFN packed like one expert; shape [model_dim, ffn_dim]


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that a spec calls for."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def always_f32(self) -> bool:
        """Whether it stays F32 whatever was asked for (exactness rule 4)."""
        return self.kind is Kind.VECTOR or self.name.endswith(".router")

    @property
    def is_vocabulary(self) -> bool:
        """Whether it is the embedding or the output matrix: Q8_0 under any 4-bit choice."""
        return self.name in ("embed", "lm_head")


def dense_slots(spec: ModelSpec) -> tuple[Slot, ...]:
    """Return every dense tensor, in the order in which they are stored: matrices, then vectors.

    Vectors come last because their sizes are not multiples of 64 bytes and a safetensors file
    cannot contain holes.
    """
    slots = list(_all_slots(spec))
    return tuple(sorted(slots, key=lambda slot: slot.kind is Kind.VECTOR))


def _all_slots(spec: ModelSpec) -> Iterator[Slot]:
    yield Slot("embed", Kind.MATRIX, (spec.vocab_size, spec.model_dim))
    yield Slot("rope.inv_freq", Kind.VECTOR, (spec.rotary_dim // 2,))
    for index, layer in enumerate(spec.layers):
        for slot in _layer_slots(spec, layer):
            yield Slot(f"layers.{index}.{slot.name}", slot.kind, slot.shape)
    yield Slot("norm", Kind.VECTOR, (spec.model_dim,))
    if not spec.tie_embeddings:
        yield Slot("lm_head", Kind.MATRIX, (spec.vocab_size, spec.model_dim))


def _layer_slots(spec: ModelSpec, layer: LayerSpec) -> Iterator[Slot]:
    dim, attention = spec.model_dim, spec.attention
    heads = {
        "q": attention.num_heads * attention.head_dim,
        "k": attention.num_kv_heads * attention.head_dim,
        "v": attention.num_kv_heads * attention.head_dim,
    }
    yield Slot("attention.norm", Kind.VECTOR, (dim,))
    for letter, rows in heads.items():
        yield Slot(f"attention.{letter}", Kind.MATRIX, (rows, dim))
        if attention.qkv_bias:
            yield Slot(f"attention.{letter}.bias", Kind.VECTOR, (rows,))
    yield Slot("attention.o", Kind.MATRIX, (dim, heads["q"]))
    if attention.output_bias:
        yield Slot("attention.o.bias", Kind.VECTOR, (dim,))
    if attention.qk_norm is not QkNorm.NONE:
        whole = attention.qk_norm is QkNorm.PROJECTION
        for letter in ("q", "k"):
            width = heads[letter] if whole else attention.head_dim
            yield Slot(f"attention.{letter}_norm", Kind.VECTOR, (width,))
    yield Slot("ffn.norm", Kind.VECTOR, (dim,))
    if layer.router is None:
        yield Slot("ffn.dense", Kind.FFN, (dim, layer.ffn_dim))
    elif layer.router.kind is not RouterKind.ALL:
        yield Slot("router", Kind.MATRIX, (layer.router.num_experts, dim))
