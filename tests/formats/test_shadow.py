"""Shadows: made of a model's experts, found by name, refused where they are not the model's."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from client.inspect_cmd import inspect
from client.shadow_cmd import shadow as shadow_verb
from client.slice_cmd import Preset, slice_
from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.shadow import (
    SHADOW_FORMATS,
    expert_bytes,
    find_or_make,
    find_shadow,
    open_shadow,
    shadow_place,
)
from shoal.artifact.shadow_build import make_shadow
from shoal.artifact.text_pass import TextPass
from shoal.artifact.verify import find_problems
from shoal.errors import ArtifactError, CannotWrite, CorruptArtifact, UsageError
from shoal.paths import default_model
from support.forward_passes import ForwardPasses
from support.tiny_model import make_tiny_artifact


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("artifact"), "qwen3_moe", "bf16")


@pytest.fixture
def target(model: Path, tmp_path: Path) -> Artifact:
    copied = tmp_path / "tiny.shoal"
    shutil.copytree(model, copied)
    return Artifact.open(copied)


@contextmanager
def unseen(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _num_bytes: None


def relative_error(target: Artifact, shadow: Artifact, layer: int, index: int) -> float:
    squares, errors = 0.0, 0.0
    for own, copy in zip(
        ops.unpack_expert(target.expert_layout(layer), target.read_expert(layer, index)),
        ops.unpack_expert(shadow.expert_layout(layer), shadow.read_expert(layer, index)),
        strict=True,
    ):
        squares += float((own.astype(np.float64) ** 2).sum())
        errors += float(((own.astype(np.float64) - copy) ** 2).sum())
    return float((errors / squares) ** 0.5)


@pytest.mark.parametrize("name, most", [("q4", 0.09), ("q3", 0.18)])
def test_a_shadow_is_a_coarser_copy_of_every_expert(
    target: Artifact, name: str, most: float
) -> None:
    before = target.identity, sorted(target.path.rglob("*"))
    shadow = find_or_make(target, name, unseen)
    assert shadow.owned_experts == target.owned_experts
    assert shadow.manifest.shadow_of == target.identity != shadow.identity
    assert not shadow.manifest.has_dense
    assert shadow.path == target.path / "shadows" / f"{name}.shoal"
    assert list(find_problems(shadow, lambda _num_bytes: None)) == []
    errors = [relative_error(target, shadow, *place) for place in ((0, 0), (1, 7), (2, 15))]
    assert all(most / 3 < error < most for error in errors), errors
    again = Artifact.open(target.path)
    assert (again.identity, list(find_problems(again, lambda _: None))) == (before[0], [])


def test_a_made_shadow_is_found_and_not_made_again(target: Artifact) -> None:
    made = find_or_make(target, "q4", unseen)
    stamp = (made.path / "manifest.json").stat().st_mtime_ns
    assert find_or_make(target, "q4", unseen).identity == made.identity
    assert open_shadow(target, "q4").identity == open_shadow(target, str(made.path)).identity
    assert (made.path / "manifest.json").stat().st_mtime_ns == stamp


def test_making_it_twice_gives_the_same_bytes(target: Artifact, tmp_path: Path) -> None:
    identities = set()
    for name in ("a", "b"):
        manifest, _ = make_shadow(
            target, SHADOW_FORMATS["q3"], tmp_path / name, lambda _num_bytes: None, force=False
        )
        identities.add(manifest.identity)
    assert len(identities) == 1


def test_a_slice_with_its_shadow_needs_nothing_else(target: Artifact, tmp_path: Path) -> None:
    slice_(str(target.path), str(tmp_path / "laptop.shoal"), Preset.COORDINATOR, shadow="q4")
    laptop = Artifact.open(tmp_path / "laptop.shoal")
    assert laptop.identity == target.identity
    shutil.rmtree(target.path)
    shadow = open_shadow(laptop, "q4")
    assert shadow.path.parent.parent == laptop.path
    assert list(find_problems(shadow, lambda _num_bytes: None)) == []


def test_slice_takes_a_shadow_for_coordinators_only(target: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shadow goes with --preset coordinator"):
        slice_(str(target.path), str(tmp_path / "n.shoal"), Preset.EXPERT_NODE, shadow="q4")


def test_a_missing_shadow_says_how_to_make_one(target: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no q3 shadow.*shoal shadow .*--format q3"):
        open_shadow(target, "q3")
    slice_(str(target.path), str(tmp_path / "c.shoal"), Preset.COORDINATOR)
    part = Artifact.open(tmp_path / "c.shoal")
    with pytest.raises(UsageError, match=r"no experts to make one.*--preset coordinator --shadow"):
        find_or_make(part, "q4", unseen)
    with pytest.raises(UsageError, match="without experts 0-15 of layer 0"):
        make_shadow(part, SHADOW_FORMATS["q4"], tmp_path / "x", lambda _: None, force=False)
    assert not (tmp_path / "x").exists()


def test_too_few_bits_are_no_shadow(target: Artifact) -> None:
    with pytest.raises(UsageError, match="no shadow format 'q2': q4 or q3"):
        find_or_make(target, "q2", unseen)


def test_what_is_not_this_models_shadow_is_refused(target: Artifact, tmp_path: Path) -> None:
    other = Artifact.open(make_tiny_artifact(tmp_path, "qwen3_moe", "bf16", 1, name="other"))
    foreign = find_or_make(other, "q4", unseen)
    with pytest.raises(ArtifactError, match="is the shadow of another model"):
        open_shadow(target, str(foreign.path))
    with pytest.raises(ArtifactError, match="is a model, not a shadow"):
        open_shadow(target, str(other.path))
    with pytest.raises(UsageError, match="is a shadow itself"):
        make_shadow(foreign, SHADOW_FORMATS["q4"], tmp_path / "x", lambda _: None, force=False)
    with pytest.raises(UsageError, match="no model 'elsewhere'"):
        open_shadow(target, "elsewhere")


def test_damage_is_named(target: Artifact) -> None:
    made = find_or_make(target, "q4", unseen)
    where = made.expert_location(1, 3)
    data = bytearray(where.path.read_bytes())
    data[where.offset + 100] ^= 1
    where.path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match="expert 3 of layer 1"):
        open_shadow(target, "q4").read_expert(1, 3)
    where.path.write_bytes(data[:-1])
    with pytest.raises(CorruptArtifact, match=r"layer-001.safetensors: truncated"):
        open_shadow(target, "q4")


def test_nothing_is_left_of_a_shadow_whose_making_failed(target: Artifact) -> None:
    where = target.expert_location(2, 15)  # the last that is read
    data = bytearray(where.path.read_bytes())
    data[where.offset] ^= 1
    where.path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match="expert 15 of layer 2"):
        find_or_make(target, "q4", unseen)
    assert find_shadow(target, "q4") is None
    assert list((target.path / "shadows").iterdir()) == []


def test_the_model_that_comes_with_shoal_has_its_shadows_at_home(home: Path) -> None:
    fables = Artifact.open(default_model())
    assert shadow_place(fables, "q4").parent == home / "shadows"
    assert find_shadow(fables, "q4") is None
    shadow_place(fables, "q4").mkdir(parents=True)
    (shadow_place(fables, "q4") / "manifest.json").touch()
    assert find_shadow(fables, "q4") == shadow_place(fables, "q4")
    assert fables.identity.startswith("16fff5889f37eda9"), "the model itself has changed"


def test_a_full_disk_is_said_before_anything_is_written(
    target: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(target.path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(CannotWrite, match="nothing was written"):
        find_or_make(target, "q4", unseen)


def test_the_verb_makes_it_where_run_finds_it_and_inspect_tells_whose_it_is(
    target: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow_verb(str(target.path), None, "q3")
    said = capsys.readouterr().err
    made = open_shadow(target, "q3")
    share = 100 * expert_bytes(made.manifest) / expert_bytes(target.manifest)
    assert f"{share:.1f} % of the model's experts, q3_t" in said
    with pytest.raises(UsageError, match="exists already"):
        shadow_verb(str(target.path), None, "q3")
    inspect(str(made.path), as_json=True)
    assert json.loads(capsys.readouterr().out)["shadow_of"] == target.identity
    inspect(str(target.path), as_json=True)
    assert json.loads(capsys.readouterr().out)["shadows"] == ["q3"]


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmoe"])
def test_the_text_pass_runs_every_family_as_the_engine_does(family: str, tmp_path: Path) -> None:
    """Its hidden rows after the last layer give the logits that a forward pass gives."""
    target = Artifact.open(make_tiny_artifact(tmp_path, family, "f32"))
    ids = np.random.default_rng(3).integers(0, target.spec.vocab_size, 70).astype(np.int32)
    text = TextPass(target, ids)
    for layer in range(target.spec.num_layers):
        text.enter(layer)
        for index in target.owned_experts.get(layer, ()):
            packed = target.read_expert(layer, index)
            text.through_expert(index, *ops.unpack_expert(target.expert_layout(layer), packed))
        text.leave()
    normed = ops.rms_norm(text.hidden[-1:], target.vector("norm"), target.spec.norm_eps)
    head = target.dense_values("embed" if target.spec.tie_embeddings else "lm_head")
    passes = ForwardPasses(target.path)
    expected = passes.run((passes.sequence(ids.tolist()), len(ids)))
    assert np.abs(expected).max() > 0.1, "inputs are degenerate"
    np.testing.assert_allclose(normed @ head.T, expected, rtol=1e-3, atol=1e-4)
