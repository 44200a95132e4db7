"""ModelSpec: what every family's model is made of, without weights (core).

A family page (`shoal/families/`) turns a checkpoint's config into one of these; nothing after that
asks for the family's name. The spec is part of the artifact's identity.
"""

from dataclasses import dataclass
from enum import StrEnum


class RouterKind(StrEnum):
    SOFTMAX = "softmax"  # softmax over all experts, the A largest
    ALL = "all"  # every expert with weight 1: slices of a dense FFN


class QkNorm(StrEnum):
    NONE = "none"
    HEAD = "head"  # RMSNorm over each head [head_dim] (Qwen3)
    PROJECTION = "projection"  # RMSNorm over the whole projection (OLMoE)


@dataclass(frozen=True, slots=True)
class RouterSpec:
    kind: RouterKind
    num_experts: int  # E
    experts_per_token: int  # A
    renormalise: bool  # divide the chosen weights by their sum


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: QkNorm
    qkv_bias: bool
    clip_qkv: float | None  # OLMoE: clamp q, k, v to [-clip, clip]
    scale: float  # of the scores, usually head_dim ** -0.5
    output_bias: bool = False  # a bias on the output projection


@dataclass(frozen=True, slots=True)
class LayerSpec:
    window: int | None  # keys a row sees, itself included; None: all
    router: RouterSpec | None  # None: one dense FFN, kept by the coordinator
    ffn_dim: int  # I of one expert, or of the dense FFN


@dataclass(frozen=True, slots=True)
class ModelSpec:
    family: str  # for people; nothing branches on it
    model_dim: int  # D
    vocab_size: int  # V
    norm_eps: float
    rotary_dim: int  # dimensions of a head that rope turns; frequencies: tensor `rope.inv_freq`
    rope_attention_factor: float  # multiplies cos and sin (YaRN); 1.0 elsewhere
    max_context: int
    tie_embeddings: bool
    attention: AttentionSpec
    layers: tuple[LayerSpec, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)
