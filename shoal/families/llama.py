"""Llama: dense decoders, SmolLM2 among them. Convert cuts their FFNs into always-chosen experts."""

from collections.abc import Mapping
from typing import Any

from shoal.families.common import decoder_spec, full_attention_only, num_layers
from shoal.families.config import Config
from shoal.families.family import Family
from shoal.model_spec import LayerSpec, ModelSpec


class Llama(Family):
    name = "llama"
    architectures = ("LlamaForCausalLM",)

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        read = Config(config)
        read.require("mlp_bias", False, False)
        full_attention_only(read)
        layer = LayerSpec(window=None, router=None, ffn_dim=read.integer("intermediate_size"))
        return decoder_spec(
            read,
            family=self.name,
            layers=(layer,) * num_layers(read),
            bias=read.flag("attention_bias"),
        )
