"""OLMoE: RMSNorm over the whole q and k projections, clipping, weights not renormalised."""

from collections.abc import Mapping
from typing import Any

from shoal.families.common import decoder_spec, num_layers, softmax_router
from shoal.families.config import Config
from shoal.families.family import Family
from shoal.model_spec import LayerSpec, ModelSpec, QkNorm


class Olmoe(Family):
    name = "olmoe"
    architectures = ("OlmoeForCausalLM",)

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        read = Config(config)
        clips = read.values.get("clip_qkv") is not None
        layer = LayerSpec(
            window=None,
            router=softmax_router(
                read, "num_experts", renormalise=read.flag("norm_topk_prob", default=False)
            ),
            ffn_dim=read.integer("intermediate_size"),  # of one expert
        )
        return decoder_spec(
            read,
            family=self.name,
            layers=(layer,) * num_layers(read),
            qk_norm=QkNorm.PROJECTION,
            bias=read.flag("attention_bias"),
            clip_qkv=read.number("clip_qkv") if clips else None,
        )
