"""Artifacts in float formats tell transformers' logits and greedy tokens: DESIGN.md section 2.

The checkpoints are written anew from their seeds; tests/goldens holds what transformers computed
from them in float32 (tools/make_goldens.py).
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.convert.gguf_source import GgufSource
from client.convert.pipeline import Options, convert, make_plan
from client.convert.safetensors_source import SafetensorsSource
from shoal.artifact import Artifact
from support.checkpoints import checkpoint_tensors, tiny_config, write_safetensors
from support.forward_passes import ForwardPasses
from support.golden_cases import (
    CASES,
    GGUF_CASES,
    NUM_GREEDY,
    PROMPT_LENGTHS,
    GoldenCase,
    prompt_ids,
)
from support.golden_gguf import write_gguf

GOLDENS = Path(__file__).parent.parent / "goldens"
TOLERANCE = 1e-3  # on logits of size 1 to 10: DESIGN.md section 2


def _golden(name: str) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads((GOLDENS / f"{name}.json").read_text())
    return golden


def _converted(case: GoldenCase, folder: Path) -> Path:
    case.write(folder / "checkpoint")
    out = folder / "model.shoal"
    convert(make_plan(SafetensorsSource(folder / "checkpoint"), Options()), out, lambda _: None)
    return out


def _rows(prompt: dict[str, Any]) -> dict[int, NDArray[np.float32]]:
    return {
        int(position): np.frombuffer(base64.b64decode(row), "<f4")
        for position, row in prompt["logits"].items()
    }


def _differences(passes: ForwardPasses, prompt: dict[str, Any]) -> tuple[float, list[int]]:
    """Run prompt and greedy tokens; return the largest error of a logit and the wrong tokens."""
    expected = _rows(prompt)
    ids = prompt["prompt_ids"] + prompt["greedy_ids"]
    num_prompt = len(prompt["prompt_ids"])
    sequence = passes.sequence(ids)
    worst, done = 0.0, 0
    wrong: list[int] = []
    for position in [*(p for p in expected if p < num_prompt), *range(num_prompt, len(ids))]:
        logits = passes.run((sequence, position + 1 - done))[0]
        done = position + 1
        if position in expected:
            worst = max(worst, float(np.abs(logits - expected[position]).max()))
        if num_prompt - 1 <= position < len(ids) - 1 and logits.argmax() != ids[position + 1]:
            wrong.append(position + 1 - num_prompt)
        if (top := prompt["top5"].get(str(position))) is not None:
            near = np.abs(logits[top["ids"]] - top["logits"]).max()
            worst = max(worst, float(near), abs(_logsumexp(logits) - top["logsumexp"]))
    return worst, wrong


def _logsumexp(logits: NDArray[np.float32]) -> float:
    exact = logits.astype(np.float64)
    return float(np.log(np.exp(exact - exact.max()).sum()) + exact.max())


def _check_against_golden(case: GoldenCase, artifact: Path) -> None:
    passes = ForwardPasses(artifact)
    golden = _golden(case.name)
    assert [len(prompt["prompt_ids"]) for prompt in golden["prompts"]] == list(PROMPT_LENGTHS)
    for prompt in golden["prompts"]:
        length = len(prompt["prompt_ids"])
        assert prompt["prompt_ids"] == prompt_ids(length, case.config["vocab_size"])
        assert len(prompt["greedy_ids"]) == NUM_GREEDY
        worst, wrong_tokens = _differences(passes, prompt)
        assert not wrong_tokens and worst < TOLERANCE, f"prompt of {length} tokens"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    case: GoldenCase, tmp_path: Path
) -> None:
    _check_against_golden(case, _converted(case, tmp_path))


@pytest.mark.parametrize("case", GGUF_CASES, ids=lambda case: case.name)
def test_the_same_model_as_a_gguf_file_tells_the_same(case: GoldenCase, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", case.config, case.seed)
    out = tmp_path / "model.shoal"
    convert(make_plan(GgufSource(tmp_path / "model.gguf"), Options()), out, lambda _: None)
    _check_against_golden(case, out)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_fused_experts_make_the_same_artifact_as_single_ones(family: str, tmp_path: Path) -> None:
    single = GoldenCase("single", tiny_config(family), seed=5)
    single.write(tmp_path / "single")
    tensors = dict(checkpoint_tensors(single.config, 5))
    for layer in range(single.config["num_hidden_layers"]):
        _fuse_experts(tensors, f"layers.{layer}.")
    (tmp_path / "fused").mkdir()
    for file in (tmp_path / "single").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "fused" / file.name).write_bytes(file.read_bytes())
    write_safetensors(tmp_path / "fused" / "model.safetensors", tensors)
    identities = set[str]()
    for name in ("single", "fused"):
        out = tmp_path / f"{name}.shoal"
        convert(make_plan(SafetensorsSource(tmp_path / name), Options()), out, lambda _: None)
        identities.add(Artifact.open(out).identity)
    assert len(identities) == 1


def _fuse_experts(tensors: dict[str, NDArray[np.float32]], layer: str) -> None:
    parts: dict[str, list[NDArray[np.float32]]] = {}
    block = ""
    for name in [name for name in tensors if name.startswith(layer) and ".experts." in name]:
        block, rest = name.split(".experts.")
        parts.setdefault(rest.split(".")[1], []).append(tensors.pop(name))
    gate, up, down = (np.stack(parts[key]) for key in parts)  # in the order of the checkpoint
    tensors[f"{block}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
    tensors[f"{block}.experts.down_proj"] = down


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral-window", {"sliding_window": 13}),
        ("qwen3-moe", {"norm_topk_prob": False}),
        ("qwen3-moe-sparse-step", {"norm_topk_prob": True}),
        ("olmoe", {"clip_qkv": None}),
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe-linear-rope", {"rope_scaling": None}),
        ("llama-llama3-rope", {"rope_parameters": {"rope_theta": 500000.0}}),
    ],
)
def test_a_config_misread_in_one_field_does_not_pass(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == name)
    wrong = GoldenCase(name, {**case.config, **changes}, case.seed, case.dtype, case.shards)
    passes = ForwardPasses(_converted(wrong, tmp_path))
    worst, _ = _differences(passes, _golden(name)["prompts"][-1])
    assert worst > 5 * TOLERANCE


def test_goldens_are_of_the_seeds_that_the_tests_write() -> None:
    for case in CASES:
        assert _golden(case.name)["seed"] == case.seed, case.name
        assert _golden(case.name)["margin"] > 2 * TOLERANCE, case.name
