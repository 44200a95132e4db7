"""The forward pass comes close to a float64 decoder that shares no code with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.checkpoints import random_values
from support.forward_passes import ForwardPasses
from support.reference_transformer import load_checkpoint, reference_logits
from support.tiny_model import make_tiny_artifact

TOLERANCE = 1e-3  # of DESIGN.md section 2, on logits of size 1 to 5; float32 leaves about 1e-5
NUM_TOKENS = 90  # more than a KV block and than every window below

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias-tied": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "mixtral-window": ("mixtral", {"sliding_window": 11, "head_dim": 32}),
    "qwen3-moe-one-dense-layer": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "olmoe-clip": ("olmoe", {"clip_qkv": 0.75}),
    "odd-dimensions": (
        "qwen3_moe",
        {"hidden_size": 72, "moe_intermediate_size": 40, "head_dim": 24, "num_attention_heads": 6},
    ),
}


def some_ids(seed: int) -> list[int]:
    return [int(abs(u) * 250) for u in random_values(seed, "ids", (NUM_TOKENS,)).tolist()]


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_float_artifact_match_the_reference(case: str, tmp_path: Path) -> None:
    family, geometry = CASES[case]
    path = make_tiny_artifact(tmp_path, family, "f32", seed=7, **geometry)
    ids = some_ids(11)
    spec, weights = load_checkpoint(tmp_path / "tiny-checkpoint")
    expected = reference_logits(spec, weights, ids)
    assert np.std(expected) > 0.5, "logits without variety prove nothing"

    logits = ForwardPasses(path).logits_of_every_prefix(ids)

    assert np.abs(logits - expected).max() < TOLERANCE


def test_the_reference_would_notice_a_wrong_window(tmp_path: Path) -> None:
    path = make_tiny_artifact(tmp_path, "mixtral", "f32", seed=7, sliding_window=11)
    make_tiny_artifact(tmp_path, "mixtral", "f32", seed=7, sliding_window=12, name="other")
    ids = some_ids(11)
    spec, weights = load_checkpoint(tmp_path / "other-checkpoint")
    logits = ForwardPasses(path).logits_of_every_prefix(ids)
    difference = np.abs(logits - reference_logits(spec, weights, ids)).max(axis=1)
    assert difference[:11].max() < TOLERANCE, "rows that see everything agree"
    assert difference[11:].max() > 10 * TOLERANCE, "rows beyond the window must not"
