"""Mixtral: softmax router, the chosen weights always renormalised; optional sliding window."""

from collections.abc import Mapping
from typing import Any

from shoal.families.common import decoder_spec, num_layers, softmax_router
from shoal.families.config import Config
from shoal.families.family import Family, FfnNames
from shoal.model_spec import LayerSpec, ModelSpec


class Mixtral(Family):
    name = "mixtral"
    architectures = ("MixtralForCausalLM",)
    default_rope_theta = 1e6
    # The usual trap: w1 is gate, w3 is up, w2 is down.
    expert_names = FfnNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        read = Config(config)
        layer = LayerSpec(
            window=read.optional_integer("sliding_window"),
            router=softmax_router(read, "num_local_experts", renormalise=True),
            ffn_dim=read.integer("intermediate_size"),
        )
        return decoder_spec(read, family=self.name, layers=(layer,) * num_layers(read))
