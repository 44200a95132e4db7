"""Hugging Face's tensors as GGUF names and fuses them: the table that the GGUF fixtures share."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]
ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down"}
_EXPERT = re.compile(r"layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight")
_OTHER = re.compile(r"(?:layers\.(\d+)\.)?(.*)\.(weight|bias)")


def gguf_tensors(
    tensors: Iterable[tuple[str, Values]], interleave: Callable[[Values, str], Values]
) -> dict[str, Values]:
    """Return them by their GGUF names, the experts of a layer stacked by index.

    Args:
        interleave: called with a llama-like q or k projection and "q" or "k".
    """
    found: dict[str, Values] = {}
    experts: dict[str, dict[int, Values]] = {}
    for name, values in tensors:
        name = name.removeprefix("model.")
        if match := _EXPERT.fullmatch(name):
            layer, index, part = match.groups()
            part = _EXPERT_PARTS.get(part, part.removesuffix("_proj"))
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", {})[int(index)] = values
            continue
        match = _OTHER.fullmatch(name)
        assert match is not None, name
        layer, kind, suffix = match.groups()
        if rotated := re.fullmatch(r"self_attn\.([qk])_proj", kind):
            values = interleave(values, rotated[1])
        prefix = "" if layer is None else f"blk.{layer}."
        found[f"{prefix}{_NAMES[kind]}.{suffix}"] = values
    for name, parts in experts.items():
        found[name] = np.stack([parts[index] for index in range(len(parts))])
    return found
