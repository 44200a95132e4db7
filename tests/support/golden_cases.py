"""The tiny checkpoints whose logits and tokens transformers has told us: tools/make_goldens.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.checkpoints import random_values, tiny_config, write_checkpoint

NUM_GREEDY = 24  # tokens
PROMPT_LENGTHS = (1, 7, 90)  # the last is longer than every window and one KV block


@dataclass(frozen=True)
class GoldenCase:
    """One checkpoint. `seed` is the first whose greedy margins make_goldens.py accepted."""

    name: str
    config: Mapping[str, Any]
    seed: int
    dtype: str = "f32"
    shards: int = 1

    def write(self, folder: Path, seed: int | None = None) -> None:
        write_checkpoint(
            folder,
            self.config,
            self.seed if seed is None else seed,
            dtype=self.dtype,
            shards=self.shards,
        )


def prompt_ids(length: int, vocab_size: int) -> list[int]:
    """Return a prompt of that many pseudo-random ids."""
    uniform = random_values(length, "prompt", (length,)).astype(np.float64)
    return [int(u) for u in (uniform + 1.0) / 2.0 * vocab_size]


def _new_style(**rope: Any) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters` and `dtype`."""
    return {"rope_theta": ..., "torch_dtype": ..., "dtype": "float32", "rope_parameters": rope}


CASES = (
    GoldenCase(
        "llama",
        tiny_config(
            "llama",
            hidden_size=48,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=80,
            attention_bias=True,
        ),
        seed=0,
    ),
    GoldenCase(
        "llama-llama3-rope",
        tiny_config(
            "llama",
            head_dim=24,
            tie_word_embeddings=True,
            **_new_style(
                rope_type="llama3",
                rope_theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        seed=1,
    ),
    GoldenCase(
        "mixtral",
        tiny_config("mixtral", head_dim=None, rope_theta=1e6),
        seed=1,
    ),
    GoldenCase(
        "mixtral-window",
        tiny_config(
            "mixtral",
            head_dim=32,
            sliding_window=12,
            tie_word_embeddings=True,
            intermediate_size=80,
            **_new_style(rope_type="default", rope_theta=1e6),
        ),
        seed=1,
    ),
    GoldenCase(
        "qwen3-moe",
        tiny_config("qwen3_moe", mlp_only_layers=[1], rms_norm_eps=1e-6, rope_theta=1e6),
        seed=0,
    ),
    GoldenCase(
        "qwen3-moe-sparse-step",
        tiny_config(
            "qwen3_moe",
            hidden_size=80,
            num_attention_heads=5,
            num_key_value_heads=5,
            moe_intermediate_size=48,
            decoder_sparse_step=2,
            norm_topk_prob=False,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=20,
            max_window_layers=0,
        ),
        seed=0,
    ),
    GoldenCase(
        "qwen3-moe-bf16",
        tiny_config("qwen3_moe", torch_dtype="bfloat16"),
        seed=1,
        dtype="bf16",
        shards=3,
    ),
    GoldenCase("qwen3-moe-plain", tiny_config("qwen3_moe", rope_theta=1e6), seed=0),
    GoldenCase("olmoe-plain", tiny_config("olmoe", num_key_value_heads=4), seed=0),
    GoldenCase("olmoe", tiny_config("olmoe", clip_qkv=0.75), seed=0),
    GoldenCase(
        "olmoe-linear-rope",
        tiny_config(
            "olmoe",
            norm_topk_prob=True,
            num_key_value_heads=4,
            rope_scaling={"type": "linear", "factor": 4.0},
        ),
        seed=0,
    ),
)

# What llama.cpp can run: it knows no clipping, no dense layers, no choice of renormalisation.
GGUF_CASES = tuple(
    case for case in CASES if case.name in ("llama", "mixtral", "qwen3-moe-plain", "olmoe-plain")
)
