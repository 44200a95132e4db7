"""Pre-gate matrices: what they compute, where they are, and that no identity knows of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from client.slice_cmd import Preset, slice_
from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.pregate import PREGATE_FILE
from shoal.artifact.verify import find_problems
from shoal.errors import CorruptArtifact
from support.pregates import without_pregates
from support.tiny_model import make_tiny_artifact


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("artifact"), "qwen3_moe", "q4_0")


@pytest.mark.parametrize(
    ("quant", "tolerance"),
    # Largest error over spread of the scores: bf16 keeps 8 bits; int8 rows and q8_0 weights lose
    # about 1 %; two parts of q4_k about as much as one of q8_0 (one part alone: 0.15 and more).
    [("f32", 0.01), ("q8_0", 0.04), ("q4_k", 0.06)],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_it_scores_as_the_next_layers_router_scores_the_same_hidden_state(
    tmp_path: Path, quant: str, tolerance: float, layer: int
) -> None:
    path = make_tiny_artifact(tmp_path, "qwen3_moe", quant, hidden_size=256, num_experts=24)
    artifact = Artifact.open(path)
    hidden = np.random.default_rng(layer).standard_normal((16, 256), np.float32)
    eps = artifact.spec.norm_eps

    def normed(index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return ops.rms_norm(hidden, artifact.vector(f"layers.{index}.ffn.norm"), eps)

    [entry] = [e for e in artifact.manifest.pregates if e.plan.layer == layer]
    assert entry.plan.target == layer + 1
    rows = ops.quantise_rows(artifact.scheme(layer), normed(layer))
    parts = ops.matmul(artifact.read_pregate(entry), rows).reshape(16, entry.plan.parts, 24)
    found = parts.sum(axis=1)
    router = ops.unpack_matrix(artifact.matrix(f"layers.{layer + 1}.router"))
    wanted = normed(layer + 1) @ router.T
    error = np.abs(found - wanted).max() / wanted.std()
    assert error < tolerance
    # The check can fail: the norm of the wrong layer, or none, is far away.
    assert np.abs(normed(layer) @ router.T - wanted).max() / wanted.std() > 4 * tolerance


def test_a_dead_column_of_the_norm_is_left_out_and_blows_nothing_up(tmp_path: Path) -> None:
    from shoal.artifact.pregate import PregatePlan
    from shoal.artifact.pregate_build import build_pregate
    from shoal.quant import Format

    plan = PregatePlan(0, 1, 16, 32, Format.Q8_0, 1)
    norm = np.ones(32, np.float32)
    norm[3], norm[5] = 0.0, 1e-5
    values = {
        "layers.0.ffn.norm": norm,
        "layers.1.ffn.norm": np.full(32, 2, np.float32),
        "layers.1.router": np.ones((16, 32), np.float32),
    }
    matrix = ops.Matrix(Format.Q8_0, 16, 32, build_pregate(plan, values.__getitem__))
    expected = np.full((16, 32), 2, np.float32)
    expected[:, [3, 5]] = 0
    np.testing.assert_allclose(ops.unpack_matrix(matrix), expected, rtol=1e-2)


def test_the_identity_does_not_know_of_them_and_old_artifacts_are_read(
    whole: Path, tmp_path: Path
) -> None:
    old = without_pregates(whole, tmp_path / "old.shoal")
    assert old.identity == Artifact.open(whole).identity
    assert old.manifest.pregates == ()
    assert b"pregate" not in (old.path / "manifest.json").read_bytes()


def test_a_models_always_chosen_experts_need_no_guessing(tmp_path: Path) -> None:
    dense = Artifact.open(make_tiny_artifact(tmp_path, "llama", "f32"))
    assert dense.manifest.pregates == ()
    assert not (dense.path / PREGATE_FILE).exists()


def test_layers_without_a_router_are_stepped_over(tmp_path: Path) -> None:
    model = make_tiny_artifact(
        tmp_path, "qwen3_moe", "f32", num_hidden_layers=4, mlp_only_layers=[1]
    )
    plans = [entry.plan for entry in Artifact.open(model).manifest.pregates]
    assert [(plan.layer, plan.target) for plan in plans] == [(0, 2), (2, 3)]


@pytest.mark.parametrize("is_old", [False, True])
def test_a_nodes_slice_carries_them_and_makes_them_where_the_source_has_none(
    whole: Path, tmp_path: Path, is_old: bool
) -> None:
    source = without_pregates(whole, tmp_path / "old.shoal").path if is_old else whole
    slice_(str(source), str(tmp_path / "n.shoal"), Preset.EXPERT_NODE, experts="0-3")
    part = Artifact.open(tmp_path / "n.shoal")
    assert part.manifest.pregates == Artifact.open(whole).manifest.pregates
    assert (part.path / PREGATE_FILE).read_bytes() == (whole / PREGATE_FILE).read_bytes()
    slice_(str(part.path), str(tmp_path / "again.shoal"), Preset.EXPERT_NODE, experts="1")
    again = Artifact.open(tmp_path / "again.shoal")
    assert again.manifest.pregates == part.manifest.pregates
    assert list(find_problems(again, lambda _num_bytes: None)) == []
    slice_(str(whole), str(tmp_path / "c.shoal"), Preset.COORDINATOR)
    assert Artifact.open(tmp_path / "c.shoal").manifest.pregates == ()


def test_a_flipped_bit_is_found_by_name(whole: Path, tmp_path: Path) -> None:
    slice_(str(whole), str(tmp_path / "n.shoal"), Preset.EXPERT_NODE, experts="0-3")
    artifact = Artifact.open(tmp_path / "n.shoal")
    entry = artifact.manifest.pregates[1]
    file = artifact.path / PREGATE_FILE
    data = bytearray(file.read_bytes())
    data[entry.offset + 7] ^= 1
    file.write_bytes(data)
    [problem] = find_problems(artifact, lambda _num_bytes: None)
    assert "layers.1.pregate" in problem
    with pytest.raises(CorruptArtifact, match=r"layers\.1\.pregate"):
        artifact.read_pregate(entry)
    file.unlink()
    with pytest.raises(CorruptArtifact, match=r"pregate\.safetensors is missing"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": 2}, r"pregate\[0\].target: expected 1"),
        ({"parts": 2}, r"pregate\[0\].parts"),
        ({"format": "q4_0"}, r"pregate\[0\].format"),
        ({"offset": 4160}, "offset"),
        ({"extra": 1}, "unknown field"),
    ],
)
def test_a_manifest_that_lies_about_them_is_refused(
    whole: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    from shoal.artifact import decode_manifest

    value = json.loads((whole / "manifest.json").read_bytes())
    value["pregate"][0] |= change
    with pytest.raises(CorruptArtifact, match=said):
        decode_manifest(json.dumps(value).encode(), "manifest.json")
