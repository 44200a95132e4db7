"""GGUF metadata and tensor names, told in Hugging Face's terms."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import UnsupportedModel
from shoal.families.family import FfnNames
from shoal.families.mixtral import Mixtral

GGUF_ARCHITECTURES = ("llama", "qwen3moe", "olmoe")
SOFTMAX_GATING = 1  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX

_OUTER = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file's header as the families read it.

    config: what config.json would say.
    naming: GGUF tensor name -> Hugging Face name without prefix; an unknown name maps to itself.
    rope_interleaved: q and k rows lie in llama.cpp's order.
    """

    config: dict[str, Any]
    naming: Callable[[str], str]
    rope_interleaved: bool


def gguf_model(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_factors: Sequence[float] | None = None,
) -> GgufModel:
    """Read a GGUF file's header.

    Args:
        metadata: every key of the file with its Python value, `general.architecture` among them.
        rope_factors: the values of tensor `rope_freqs.weight`, where the file has it.

    Raises: UnsupportedModel naming an architecture that is not ours, or a missing or odd key.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise UnsupportedModel(
            f"GGUF architecture {architecture!r} is not supported: shoal reads {known}"
        )
    keys = _Keys(metadata, architecture)
    config = _common(keys, metadata, tensor_names)
    config.update(_rope(keys, config["head_dim"], rope_factors))
    match architecture:
        case "llama" if keys.get("expert_count"):
            config.update(model_type="mixtral", num_local_experts=config.pop("num_experts"))
            config["sliding_window"] = keys.get("attention.sliding_window")
        case "llama":
            config["model_type"] = "llama"
            if keys.get("attention.sliding_window"):
                raise UnsupportedModel(
                    "GGUF: a dense llama with a sliding window is not implemented"
                )
        case "qwen3moe":
            config.update(model_type="qwen3_moe", norm_topk_prob=True)  # llama.cpp: always
            config["moe_intermediate_size"] = keys.need("expert_feed_forward_length")
            config.setdefault("intermediate_size", config["moe_intermediate_size"])
        case _:
            config.update(model_type="olmoe", norm_topk_prob=False)  # llama.cpp: never
            config["clip_qkv"] = keys.get("attention.clamp_kqv")
            config.setdefault("intermediate_size", keys.get("expert_feed_forward_length"))
    experts = Mixtral.expert_names if config["model_type"] == "mixtral" else FfnNames()
    return GgufModel(config, lambda name: _canonical(name, experts), architecture == "llama")


@dataclass(frozen=True, slots=True)
class _Keys:
    metadata: Mapping[str, Any]
    architecture: str

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise UnsupportedModel(f"GGUF metadata: {self.architecture}.{key} is missing")
        return value

    def count(self, key: str) -> int:
        value = self.need(key)
        if type(value) is not int or value < 1:
            raise UnsupportedModel(
                f"GGUF metadata: {self.architecture}.{key} = {value!r}: must be a positive integer"
            )
        return value


def _common(
    keys: _Keys, metadata: Mapping[str, Any], tensor_names: Collection[str]
) -> dict[str, Any]:
    if keys.get("expert_shared_count"):
        raise UnsupportedModel("GGUF: shared experts are not implemented for this architecture")
    if keys.get("expert_gating_func") not in (None, 0, SOFTMAX_GATING):
        raise UnsupportedModel("GGUF: only softmax routers are implemented for this architecture")
    if keys.get("expert_weights_scale") not in (None, 0.0, 1.0):
        raise UnsupportedModel(
            "GGUF: scaled expert weights are not implemented for this architecture"
        )
    kv_heads = keys.get("attention.head_count_kv")
    if isinstance(kv_heads, list):
        raise UnsupportedModel("GGUF: layers with different numbers of heads are not implemented")
    heads, dim = keys.count("attention.head_count"), keys.count("embedding_length")
    head_dim = keys.get("attention.key_length") or dim // heads
    if keys.get("attention.value_length") not in (None, head_dim):
        raise UnsupportedModel("GGUF: keys and values of different length are not implemented")
    tokens = metadata.get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "hidden_size": dim,
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": head_dim,
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.need("context_length"),
        "vocab_size": keys.get("vocab_size") or len(tokens if isinstance(tokens, list) else []),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "attention_bias": "blk.0.attn_q.bias" in tensor_names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if (width := keys.get("feed_forward_length")) is not None:
        config["intermediate_size"] = width
    if keys.get("expert_count"):
        config["num_experts"] = keys.need("expert_count")
        config["num_experts_per_tok"] = keys.need("expert_used_count")
    return config


def _rope(keys: _Keys, head_dim: int, factors: Sequence[float] | None) -> dict[str, Any]:
    if keys.get("rope.dimension_count") not in (None, head_dim):
        raise UnsupportedModel("GGUF: RoPE over a part of the head is not implemented")
    theta = keys.get("rope.freq_base")
    rope: dict[str, Any] = {
        "rope_theta": 10000.0 if theta is None else theta
    }  # llama.cpp's default
    kind = keys.get("rope.scaling.type")
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear")
    if factors is not None:
        if kind not in (None, "none"):
            raise UnsupportedModel(f"GGUF: rope_freqs.weight beside RoPE scaling {kind!r}")
        rope["rope_scaling"] = {"rope_type": "factors", "factors": [float(f) for f in factors]}
    elif kind not in (None, "none"):
        rope["rope_scaling"] = {"rope_type": kind, "factor": factor}
    elif keys.get("rope.scale_linear"):
        rope["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return rope


def _canonical(name: str, experts: FfnNames) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?\.(weight|bias)", name)
    if match is None:
        return name
    layer, kind, index, suffix = match.groups()
    stem = f"layers.{layer}."
    fused = {f"ffn_{key}_exps": getattr(experts, key) for key in ("gate", "up", "down")}
    single = {f"ffn_{key}": getattr(experts, key) for key in ("gate", "up", "down")}
    if kind == "ffn_gate_inp" and index is None:
        return f"{stem}{experts.block}.gate.{suffix}"
    if kind in fused and index is None:
        return f"{stem}{experts.block}.experts.{fused[kind]}.{suffix}"
    if kind in single and index is not None:  # files from before experts were fused
        return f"{stem}{experts.block}.experts.{index}.{single[kind]}.{suffix}"
    if kind in _IN_LAYER and index is None:
        return f"{stem}{_IN_LAYER[kind]}.{suffix}"
    return name
