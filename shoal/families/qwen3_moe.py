"""Qwen3-MoE: explicit head_dim, RMSNorm over each head of q and k, some layers dense."""

from collections.abc import Mapping
from typing import Any

from shoal.families.common import decoder_spec, num_layers, softmax_router
from shoal.families.config import Config
from shoal.families.family import Family
from shoal.model_spec import LayerSpec, ModelSpec, QkNorm


class Qwen3Moe(Family):
    name = "qwen3_moe"
    architectures = ("Qwen3MoeForCausalLM",)

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        read = Config(config)
        window = read.optional_integer("sliding_window")
        if not read.flag("use_sliding_window"):
            window = None
        # false unless the config says so; hub models do say true.
        router = softmax_router(read, "num_experts", renormalise=read.flag("norm_topk_prob"))
        sparse = LayerSpec(window, router, read.integer("moe_intermediate_size"))
        dense_layers = set(read.integers("mlp_only_layers"))
        step = read.integer("decoder_sparse_step", 1)
        layers: list[LayerSpec] = []
        for index in range(num_layers(read)):
            if index in dense_layers or (index + 1) % step:
                layers.append(LayerSpec(window, None, read.integer("intermediate_size")))
            else:
                layers.append(sparse)
        return decoder_spec(
            read,
            family=self.name,
            layers=tuple(layers),
            qk_norm=QkNorm.HEAD,
            bias=read.flag("attention_bias"),
        )
