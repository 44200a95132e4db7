"""Slices: a part of the bytes, the whole list, the same identity."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from client.inspect_cmd import inspect
from client.slice_cmd import Preset, slice_
from shoal.artifact import Artifact
from shoal.artifact.slicing import node_part, write_slice
from shoal.artifact.verify import find_problems
from shoal.errors import ArtifactError, CorruptArtifact, NotOwned, UsageError
from support.tiny_model import make_tiny_artifact


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("artifact"), "qwen3_moe", "q4_0")


def cut(whole: Path, out: Path, preset: str, **ranges: str) -> Artifact:
    slice_(str(whole), str(out), Preset(preset), **ranges)  # type: ignore[arg-type]
    artifact = Artifact.open(out)
    assert artifact.identity == Artifact.open(whole).identity
    assert list(find_problems(artifact, lambda _num_bytes: None)) == []
    return artifact


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_a_coordinator_slice_has_everything_but_the_experts(whole: Path, tmp_path: Path) -> None:
    part = cut(whole, tmp_path / "c.shoal", "coordinator")
    original = Artifact.open(whole)
    assert part.owned_experts == {}
    assert not (part.path / "experts").exists()
    for name in ("embed", "layers.2.attention.q", "layers.1.router"):
        np.testing.assert_array_equal(part.matrix(name).data, original.matrix(name).data)
    assert part.tokenizer_path.read_bytes() == original.tokenizer_path.read_bytes()
    assert part.grid(1) == original.grid(1)
    with pytest.raises(NotOwned, match="expert 0 of layer 0"):
        part.expert_location(0, 0)


def test_a_node_slice_has_its_experts_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    part = cut(whole, tmp_path / "n.shoal", "expert-node", experts="3-5+12", layers="1-2")
    original = Artifact.open(whole)
    assert part.owned_experts == {1: (3, 4, 5, 12), 2: (3, 4, 5, 12)}
    for index in (3, 5, 12):
        np.testing.assert_array_equal(part.read_expert(2, index), original.read_expert(2, index))
    for layer, index in ((0, 3), (1, 6), (1, 11), (2, 13)):
        with pytest.raises(NotOwned):
            part.read_expert(layer, index)
    with pytest.raises(ArtifactError, match=r"embed.*holds experts only"):
        part.matrix("embed")
    with pytest.raises(ArtifactError, match="holds experts only"):
        _ = part.tokenizer_path


def test_half_of_the_experts_are_half_of_the_bytes(whole: Path, tmp_path: Path) -> None:
    halves = [
        cut(whole, tmp_path / f"{span}.shoal", "expert-node", experts=span)
        for span in ("0-7", "8-15")
    ]
    expert_bytes = sum(e.num_experts * e.expert_bytes for e in halves[0].manifest.experts)
    for half in halves:
        held = sum(size for name, size in half.file_sizes().items() if name.startswith("experts"))
        assert held == expert_bytes // 2 + 3 * 4096  # and a header a file


def test_a_slice_of_a_slice_is_a_slice(whole: Path, tmp_path: Path) -> None:
    node = cut(whole, tmp_path / "n.shoal", "expert-node", experts="0-7")
    again = cut(node.path, tmp_path / "again.shoal", "expert-node", experts="2-3", layers="0")
    assert again.owned_experts == {0: (2, 3)}


def test_what_a_slice_lacks_cannot_be_cut_from_it(whole: Path, tmp_path: Path) -> None:
    node = cut(whole, tmp_path / "n.shoal", "expert-node", experts="0-7")
    with pytest.raises(UsageError, match="without the dense part"):
        cut(node.path, tmp_path / "x.shoal", "coordinator")
    with pytest.raises(UsageError, match="without experts 8 of layer 0"):
        cut(node.path, tmp_path / "x.shoal", "expert-node", experts="7-8")
    assert not (tmp_path / "x.shoal").exists()


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({"experts": "0-16"}, "--experts"),
        ({"experts": "5-2"}, "backwards"),
        ({"experts": "a"}, "--experts"),
        ({"layers": "3"}, "--layers"),
    ],
)
def test_a_wrong_range_is_refused(
    whole: Path, tmp_path: Path, ranges: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        cut(whole, tmp_path / "x.shoal", "expert-node", **ranges)


def test_ranges_do_not_go_with_a_coordinator(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expert-node"):
        cut(whole, tmp_path / "x.shoal", "coordinator", experts="0-3")


def test_a_range_without_experts_is_refused(tmp_path: Path) -> None:
    model = make_tiny_artifact(tmp_path, "qwen3_moe", "f32", mlp_only_layers=[1])
    manifest = Artifact.open(model).manifest
    with pytest.raises(UsageError, match="no expert"):
        node_part(manifest, None, (1,))
    assert set(node_part(manifest, None, (0, 1)).experts) == {0}


def test_a_model_is_never_replaced_by_its_own_slice(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "m.shoal"))
    with pytest.raises(UsageError, match="the model itself"):
        slice_(str(copy), str(copy), Preset.COORDINATOR, force=True)
    assert folder_bytes(copy) == folder_bytes(whole)


def test_a_damaged_source_is_found_while_cutting(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "m.shoal"))
    artifact = Artifact.open(copy)
    where = artifact.expert_location(2, 4)
    data = bytearray(where.path.read_bytes())
    data[where.offset] ^= 1
    where.path.write_bytes(data)
    part = node_part(artifact.manifest, range(4, 6), None)
    with pytest.raises(CorruptArtifact, match="expert 4 of layer 2"):
        write_slice(artifact, part, tmp_path / "n.shoal", lambda _num_bytes: None, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.shoal"]


def test_inspect_prints_one_json_object(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(whole), tensors=True, as_json=True)
    described = json.loads(capsys.readouterr().out)
    artifact = Artifact.open(whole)
    assert described["identity"] == artifact.identity
    assert described["is_whole"] is True
    assert described["quantisation"] == "q4_0"
    assert [entry["num_experts"] for entry in described["experts"]] == [16, 16, 16]
    assert described["bytes_here"] == folder_bytes(whole) - (whole / "manifest.json").stat().st_size
    assert {t["name"] for t in described["tensors"]} == {t.name for t in artifact.manifest.dense}


def test_inspect_shows_people_what_a_slice_holds(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(whole, tmp_path / "n.shoal", "expert-node", experts="0-3", layers="1")
    inspect(str(tmp_path / "n.shoal"))
    shown = capsys.readouterr().out
    assert "dense part not here" in shown
    assert "4 of 16" in shown and "0 of 16" in shown
