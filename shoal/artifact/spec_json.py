"""ModelSpec as the JSON of a manifest, read strictly (core)."""

from dataclasses import asdict
from typing import Any

from shoal.artifact.fields import Fields
from shoal.errors import CorruptArtifact
from shoal.limits import MAX_EXPERTS, MAX_EXPERTS_PER_TOKEN, MAX_LAYERS, MAX_MODEL_DIM
from shoal.model_spec import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    QkNorm,
    RouterKind,
    RouterSpec,
)

_MAX = 2**31 - 1
_ROUTERS = {kind.value: kind for kind in RouterKind}
_QK_NORMS = {kind.value: kind for kind in QkNorm}


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """Return the spec as a JSON object; its enumerations become their labels."""
    value = asdict(spec)
    value["layers"] = list(value["layers"])
    return value


def spec_from_json(value: object, where: str) -> ModelSpec:
    """Read a spec. Raises CorruptArtifact naming the field that is wrong."""
    fields = Fields(value, where)
    layers = tuple(_layer(*item) for item in fields.items("layers", MAX_LAYERS))
    if not layers:
        raise fields.fail("layers", "a model has at least one layer")
    spec = ModelSpec(
        family=fields.text("family", 64),
        model_dim=fields.integer("model_dim", 1, MAX_MODEL_DIM),
        vocab_size=fields.integer("vocab_size", 1, _MAX),
        norm_eps=fields.real("norm_eps"),
        rotary_dim=fields.integer("rotary_dim", 2, MAX_MODEL_DIM),
        rope_attention_factor=fields.real("rope_attention_factor"),
        max_context=fields.integer("max_context", 1, _MAX),
        tie_embeddings=fields.boolean("tie_embeddings"),
        attention=_attention(fields.object("attention")),
        layers=layers,
    )
    fields.done()
    if spec.rotary_dim % 2 or spec.rotary_dim > spec.attention.head_dim:
        raise CorruptArtifact(
            f"{where}.rotary_dim: {spec.rotary_dim} must be even and at most"
            f" head_dim = {spec.attention.head_dim}"
        )
    return spec


def _attention(fields: Fields) -> AttentionSpec:
    attention = AttentionSpec(
        num_heads=fields.integer("num_heads", 1, 4096),
        num_kv_heads=fields.integer("num_kv_heads", 1, 4096),
        head_dim=fields.integer("head_dim", 1, 4096),
        qk_norm=fields.choice("qk_norm", _QK_NORMS),
        qkv_bias=fields.boolean("qkv_bias"),
        clip_qkv=fields.real("clip_qkv") if fields.optional("clip_qkv") else None,
        scale=fields.real("scale"),
        output_bias=fields.boolean("output_bias"),
    )
    fields.done()
    if attention.num_heads % attention.num_kv_heads:
        raise fields.fail("num_kv_heads", f"does not divide num_heads = {attention.num_heads}")
    return attention


def _layer(value: object, where: str) -> LayerSpec:
    fields = Fields(value, where)
    layer = LayerSpec(
        window=fields.integer("window", 1, _MAX) if fields.optional("window") else None,
        router=_router(fields.object("router")) if fields.optional("router") else None,
        ffn_dim=fields.integer("ffn_dim", 1, _MAX),
    )
    fields.done()
    return layer


def _router(fields: Fields) -> RouterSpec:
    router = RouterSpec(
        kind=fields.choice("kind", _ROUTERS),
        num_experts=fields.integer("num_experts", 1, MAX_EXPERTS),
        experts_per_token=fields.integer("experts_per_token", 1, MAX_EXPERTS_PER_TOKEN),
        renormalise=fields.boolean("renormalise"),
    )
    fields.done()
    if router.experts_per_token > router.num_experts:
        raise fields.fail("experts_per_token", f"exceeds num_experts = {router.num_experts}")
    return router
