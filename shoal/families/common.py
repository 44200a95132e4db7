"""What the config pages of plain decoder families share: geometry, attention, limits."""

import math
from typing import Any

from shoal import limits
from shoal.errors import UnsupportedModel
from shoal.families.config import Config
from shoal.families.rope import checked_rope_type
from shoal.model_spec import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    QkNorm,
    RouterKind,
    RouterSpec,
)


def decoder_spec(
    config: Config,
    *,
    family: str,
    layers: tuple[LayerSpec, ...],
    qk_norm: QkNorm = QkNorm.NONE,
    bias: bool = False,
    clip_qkv: float | None = None,
    default_tie: bool = False,
) -> ModelSpec:
    """Return the spec of a decoder with RMSNorm, rotate-half RoPE and SwiGLU.

    Args:
        bias: q, k, v and o projections have biases.
        default_tie: tie_word_embeddings where config.json does not say.

    Raises: UnsupportedModel for a value that we do not implement or that contradicts another.
    """
    _refuse_quantised(config)
    config.require("hidden_act", "silu", "silu")
    config.require("partial_rotary_factor", 1.0, 1.0)
    config.section("rope_parameters").require("partial_rotary_factor", 1.0, 1.0)
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    dim = config.integer("hidden_size")
    head_dim = config.optional_integer("head_dim") or dim // heads
    if heads % kv_heads:
        raise UnsupportedModel(
            f"config: {heads} query heads do not share {kv_heads} key heads evenly"
        )
    if head_dim < 2 or head_dim % 2:
        raise UnsupportedModel(f"config: head_dim = {head_dim}: RoPE needs an even number")
    if dim > limits.MAX_MODEL_DIM:
        raise UnsupportedModel(f"config: hidden_size = {dim}: at most {limits.MAX_MODEL_DIM}")
    checked_rope_type(config)
    return ModelSpec(
        family=family,
        model_dim=dim,
        vocab_size=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps"),
        rotary_dim=head_dim,
        rope_attention_factor=1.0,
        max_context=config.integer("max_position_embeddings"),
        tie_embeddings=config.flag("tie_word_embeddings", default_tie),
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            qkv_bias=bias,
            clip_qkv=clip_qkv,
            scale=1.0 / math.sqrt(head_dim),  # IEEE on every CPU; pow is not
            output_bias=bias,
        ),
        layers=layers,
    )


def num_layers(config: Config) -> int:
    count = config.integer("num_hidden_layers")
    if count > limits.MAX_LAYERS:
        raise UnsupportedModel(f"config: num_hidden_layers = {count}: at most {limits.MAX_LAYERS}")
    return count


def softmax_router(config: Config, experts_key: str, *, renormalise: bool) -> RouterSpec:
    """Return a softmax router of config[experts_key] experts, `num_experts_per_tok` a token."""
    experts = config.integer(experts_key)
    chosen = config.integer("num_experts_per_tok")
    if experts > limits.MAX_EXPERTS:
        raise UnsupportedModel(f"config: {experts_key} = {experts}: at most {limits.MAX_EXPERTS}")
    if chosen > min(experts, limits.MAX_EXPERTS_PER_TOKEN):
        most = min(experts, limits.MAX_EXPERTS_PER_TOKEN)
        raise UnsupportedModel(f"config: num_experts_per_tok = {chosen}: at most {most}")
    return RouterSpec(RouterKind.SOFTMAX, experts, chosen, renormalise)


def full_attention_only(config: Config) -> None:
    """Refuse `layer_types` that name anything but full attention."""
    types: Any = config.values.get("layer_types")
    if types is not None and types != ["full_attention"] * num_layers(config):
        raise UnsupportedModel(
            f"config: layer_types = {types!r}: only full_attention is implemented here"
        )


def _refuse_quantised(config: Config) -> None:
    quantisation = config.section("quantization_config").values
    if quantisation:
        method = quantisation.get("quant_method")
        raise UnsupportedModel(
            f"config: the checkpoint is quantised ({method!r}): convert the BF16 or GGUF one"
        )
