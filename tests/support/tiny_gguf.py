"""A checkpoint of support.checkpoints as a GGUF file, written by the gguf library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
from gguf.constants import GGMLQuantizationType

from client.convert.transcode import encode
from shoal.families import rope_row_order
from shoal.quant import Format
from support.gguf_names import ARCHITECTURES, Values, gguf_tensors
from support.tiny_tokenizer import EOS_ID, MERGES, SPECIAL, tokenizer_json


def write_gguf(
    path: Path,
    folder: Path,
    config: Mapping[str, Any],
    formats: Mapping[str, Format] | None = None,
    *,
    architecture: str | None = None,
    raw: Mapping[str, tuple[GGMLQuantizationType, bytes]] | None = None,
) -> None:
    """Write the folder's weights (f32, one file) as a GGUF file, experts fused, q and k permuted.

    Args:
        formats: GGUF tensor name without `blk.N.` and `.weight` -> format; default F32.
        architecture: to write instead of the right one.
        raw: GGUF tensor name -> type and bytes to write instead of the right ones.
    """
    name = architecture or ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, name)
    _add_metadata(writer, config)
    _add_tokenizer(writer)
    for tensor, values in _tensors(folder, config).items():
        kind = tensor.removesuffix(".weight").split(".", 2)[-1] if tensor[:3] == "blk" else tensor
        fmt = (formats or {}).get(kind.removesuffix(".weight"), Format.F32)
        if raw and tensor in raw:
            data_type, data = raw[tensor]
            rows = np.frombuffer(data, np.uint8).reshape(*values.shape[:-1], -1)
            writer.add_tensor(tensor, rows, raw_dtype=data_type)
        elif fmt is Format.F32 or values.ndim == 1:
            writer.add_tensor(tensor, values)
        else:
            rows = encode(fmt, values.reshape(-1, values.shape[-1]))
            writer.add_tensor(
                tensor,
                rows.reshape(*values.shape[:-1], -1),
                raw_dtype=GGMLQuantizationType[fmt.name],
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocab = tokenizer_json()["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    special = gguf.TokenType.CONTROL
    writer.add_token_types([special if i < len(SPECIAL) else 1 for i in range(len(vocab))])
    writer.add_token_merges(MERGES.split("|"))
    writer.add_eos_token_id(EOS_ID)


def _tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, Values]:
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}

    def interleave(values: Values, which: str) -> Values:
        if config["model_type"] != "llama":
            return values
        order = rope_row_order(len(values), heads[which])
        return values[np.argsort(order)]  # ours[r] = theirs[order[r]]

    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        theirs = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    return gguf_tensors(theirs, interleave)
