"""The tiny checkpoints of support.checkpoints as GGUF files, as llama.cpp's converter writes them.

llama.cpp has read these very files and told the goldens' logits: tools/check_golden_gguf.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from support.checkpoints import checkpoint_tensors
from support.gguf_names import ARCHITECTURES, gguf_tensors
from support.vocabularies import boundary_metadata

F32 = NDArray[np.float32]


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    seed: int,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write an F32 file; `metadata` adds or replaces keys, a value of None removes one."""
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    keys = _tokenizer(config["vocab_size"]) | _hyperparameters(architecture, config)
    for key, value in (keys | dict(metadata or {})).items():
        _add_key(writer, key, value)
    for name, values in _gguf_tensors(config, seed).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """As much of the boundary vocabulary as there are rows in the embedding table."""
    metadata = boundary_metadata("smollm")
    tokens = metadata["tokenizer.ggml.tokens"][:vocab_size]
    merges = [m for m in metadata["tokenizer.ggml.merges"] if m.replace(" ", "") in tokens]
    types = metadata["tokenizer.ggml.token_type"][:vocab_size]
    return metadata | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }


def _hyperparameters(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    experts = config.get("num_experts") or config.get("num_local_experts")
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
    }
    if experts:
        values |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
    if architecture == "qwen3moe":
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _gguf_tensors(config: Mapping[str, Any], seed: int) -> dict[str, F32]:
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}

    def interleave(values: F32, which: str) -> F32:
        is_llama = ARCHITECTURES[config["model_type"]] == "llama"
        return _interleaved(values, heads[which]) if is_llama else values

    return gguf_tensors(checkpoint_tensors(config, seed), interleave)


def _interleaved(values: F32, heads: int) -> F32:
    """permute() of llama.cpp's convert_hf_to_gguf.py."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_string(key, value)
