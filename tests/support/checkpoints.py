"""Tiny random Hugging Face checkpoints, the same bytes on every machine: no torch, no libm.

Every weight is splitmix64 of (seed, tensor name, position), scaled by one IEEE multiplication.
Norms and biases are random too: defaults of 1 and 0 hide mistakes. The goldens of
tools/make_goldens.py were computed from these folders by transformers.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.tiny_tokenizer import EOS_ID, VOCAB_SIZE, write_tokenizer

F32 = NDArray[np.float32]

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "torch_dtype": "float32",
}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 128,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": 160,
        "moe_intermediate_size": 64,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
}


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """Return a tiny config.json of that family; a change to `...` removes the key."""
    config = {"model_type": family} | _COMMON | _FAMILY[family] | changes
    return {key: value for key, value in config.items() if value is not ...}


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    seed: int,
    *,
    dtype: str = "f32",
    shards: int = 1,
    fused: bool = False,
    prefix: str = "model.",
) -> None:
    """Write config.json, weights and tokenizer files into `folder`, which is made.

    Args:
        dtype: f32, f16 or bf16.
        shards: more than one writes an index beside that many files.
        fused: experts as 3-D `experts.gate_up_proj` and `experts.down_proj`.
        prefix: of every tensor but lm_head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"eos_token_id": config.get("eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(folder)
    named: list[tuple[str, F32]] = []
    for name, values in checkpoint_tensors(config, seed, fused):
        named.append((name if name == "lm_head.weight" else prefix + name, values))
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files):
        part = dict(named[i::shards])
        weight_map |= dict.fromkeys(part, file)
        write_safetensors(folder / file, part, dtype)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def checkpoint_shapes(config: Mapping[str, Any], fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, without prefix."""
    return {name: values.shape for name, values in checkpoint_tensors(config, 0, fused)}


def random_values(seed: int, name: str, shape: tuple[int, ...]) -> F32:
    """Return uniform float32 multiples of 2^-23 in [-1, 1)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    z = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(int.from_bytes(digest[:8], "little"))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    integers = (z >> np.uint64(40)).astype(np.int32) - np.int32(2**23)
    return (integers.astype(np.float32) * np.float32(2.0**-23)).reshape(shape)


def to_bf16(values: F32) -> NDArray[np.uint16]:
    """Round to bfloat16, ties to even, as bits."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16).astype(
        np.uint16
    )


def write_safetensors(path: Path, tensors: Mapping[str, F32], dtype: str = "f32") -> None:
    """Write one file; `dtype` is f32, f16 or bf16, to which the values are rounded."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, values in tensors.items():
        stored: NDArray[Any] = values
        if dtype == "bf16":
            stored = to_bf16(values)
        elif dtype == "f16":
            stored = values.astype(np.float16)
        blobs.append(stored.tobytes())
        end = offset + len(blobs[-1])
        header[name] = {
            "dtype": dtype.upper(),
            "shape": list(values.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(blobs))


def checkpoint_tensors(
    config: Mapping[str, Any], seed: int, fused: bool = False
) -> Iterator[tuple[str, F32]]:
    """Yield the name, without prefix, and values of every tensor."""

    def matrix(name: str, *shape: int, gain: float = 1.5) -> tuple[str, F32]:
        # uniform in [-1, 1) has variance 1/3: outputs keep about the inputs' size
        scale = np.float32(gain / math.sqrt(shape[-1]))
        return name, random_values(seed, name, shape) * scale

    def norm(name: str, dim: int) -> tuple[str, F32]:
        spread = random_values(seed, name, (dim,)) * np.float32(0.5)
        return name, spread + np.float32(1.0)

    dim, vocab = config["hidden_size"], config["vocab_size"]
    table = random_values(seed, "embed_tokens.weight", (vocab, dim))
    yield "embed_tokens.weight", table * np.float32(1 / 2)
    yield norm("norm.weight", dim)
    if not config["tie_word_embeddings"]:
        yield matrix("lm_head.weight", vocab, dim, gain=3.0)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or dim // heads
    q_dim, kv_dim = heads * head_dim, kv_heads * head_dim
    for layer in range(config["num_hidden_layers"]):
        stem = f"layers.{layer}"
        yield norm(f"{stem}.input_layernorm.weight", dim)
        yield norm(f"{stem}.post_attention_layernorm.weight", dim)
        rows = {"q": q_dim, "k": kv_dim, "v": kv_dim, "o": dim}
        for key, num_rows in rows.items():
            name = f"{stem}.self_attn.{key}_proj"
            cols = q_dim if key == "o" else dim
            yield matrix(f"{name}.weight", num_rows, cols, gain=2.5 if key in "qk" else 1.5)
            if config.get("attention_bias"):
                bias = random_values(seed, f"{name}.bias", (num_rows,))
                yield f"{name}.bias", bias * np.float32(0.25)
        if config["model_type"] in ("qwen3_moe", "olmoe"):
            per_head = config["model_type"] == "qwen3_moe"
            yield norm(f"{stem}.self_attn.q_norm.weight", head_dim if per_head else q_dim)
            yield norm(f"{stem}.self_attn.k_norm.weight", head_dim if per_head else kv_dim)
        for name, shape in _ffn_shapes(config, layer, fused):
            yield matrix(
                f"{stem}.{name}", *shape, gain=5.0 if name.endswith("gate.weight") else 2.0
            )


def _ffn_shapes(
    config: Mapping[str, Any], layer: int, fused: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim = config["hidden_size"]
    experts = config.get("num_experts") or config.get("num_local_experts")
    sparse_step = config.get("decoder_sparse_step", 1)
    if not experts or layer in config.get("mlp_only_layers", ()) or (layer + 1) % sparse_step:
        width = config["intermediate_size"]
        for key in ("gate", "up"):
            yield f"mlp.{key}_proj.weight", (width, dim)
        yield "mlp.down_proj.weight", (dim, width)
        return
    mixtral = config["model_type"] == "mixtral"
    block = "block_sparse_moe" if mixtral else "mlp"
    keys = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    yield f"{block}.gate.weight", (experts, dim)
    if fused:
        yield f"{block}.experts.gate_up_proj", (experts, 2 * width, dim)
        yield f"{block}.experts.down_proj", (experts, dim, width)
        return
    for expert in range(experts):
        for key, shape in zip(keys, ((width, dim), (width, dim), (dim, width)), strict=True):
            yield f"{block}.experts.{expert}.{key}.weight", shape
