"""Reading an artifact: what is not as it was written is refused by file and tensor name."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from client.verify_cmd import verify
from shoal.artifact import Artifact
from shoal.artifact.canonical import digest
from shoal.artifact.reader import read_checked
from shoal.artifact.verify import find_problems, total_bytes
from shoal.errors import CorruptArtifact, NotOwned
from shoal.quant import Scheme
from support.tiny_model import make_tiny_artifact


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    return make_tiny_artifact(folder, "qwen3_moe", "q8_0", num_hidden_layers=2)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "m.shoal"))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def problems(model: Path) -> list[str]:
    seen = 0

    def count(num_bytes: int) -> None:
        nonlocal seen
        seen += num_bytes

    artifact = Artifact.open_unchecked(model)
    found = list(find_problems(artifact, count))
    assert seen == total_bytes(artifact)
    return found


def test_an_artifact_tells_what_the_coordinator_and_nodes_ask(original: Path) -> None:
    artifact = Artifact.open(original)
    assert artifact.name == "tiny"
    assert artifact.kv_dtype is np.float16
    assert artifact.scheme(0) is Scheme.INT8_32
    assert artifact.dense_scheme("layers.0.router") is Scheme.F32
    assert artifact.has("layers.0.router") and not artifact.has("layers.0.attention.q.bias")
    assert artifact.owned_experts == {0: tuple(range(16)), 1: tuple(range(16))}
    assert artifact.expert_layout(1).num_bytes <= artifact.expert_location(1, 0).num_bytes
    assert artifact.tokenizer_path.name == "tokenizer.json"
    assert artifact.chat_template_path is not None
    assert artifact.generation_config["eos_token_id"] is not None


def test_float_artifacts_keep_a_float32_cache(tmp_path: Path) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, "llama", None, dtype="bf16"))
    assert artifact.kv_dtype is np.float32
    assert artifact.scheme(0) is Scheme.F32


def test_weights_are_read_into_aligned_memory(original: Path) -> None:
    artifact = Artifact.open(original)
    assert artifact.matrix("layers.1.attention.k").data.ctypes.data % 64 == 0
    assert artifact.read_expert(0, 15).ctypes.data % 4096 == 0


def test_an_untouched_artifact_has_no_problem(original: Path) -> None:
    assert problems(original) == []


@pytest.mark.parametrize("name", ["dense.safetensors", "experts/layer-001.safetensors"])
def test_a_truncated_file_is_refused_at_opening(model: Path, name: str) -> None:
    data = (model / name).read_bytes()
    (model / name).write_bytes(data[:-1])
    with pytest.raises(CorruptArtifact, match=f"{name}: truncated") as caught:
        Artifact.open(model)
    assert caught.value.exit_code == 3
    assert [name in problem for problem in problems(model)] == [True]


@pytest.mark.parametrize(
    "name", ["dense.safetensors", "experts/layer-000.safetensors", "tokenizer.json"]
)
def test_a_missing_file_is_refused_at_opening(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(CorruptArtifact, match=f"{name} is missing"):
        Artifact.open(model)


def test_a_file_that_grew_is_refused_at_opening(model: Path) -> None:
    with (model / "dense.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptArtifact, match="too long"):
        Artifact.open(model)


def test_a_folder_without_a_manifest_is_no_artifact(model: Path) -> None:
    (model / "manifest.json").unlink()
    with pytest.raises(CorruptArtifact, match="is not an artifact"):
        Artifact.open(model)


def test_a_flipped_bit_of_a_matrix_is_refused_by_name(model: Path) -> None:
    manifest = Artifact.open(model).manifest
    tensor = next(t for t in manifest.dense if t.name == "layers.1.attention.v")
    flip(model / "dense.safetensors", tensor.offset + tensor.num_bytes - 1, bit=7)
    artifact = Artifact.open(model)
    with pytest.raises(CorruptArtifact, match=r"tensor layers\.1\.attention\.v"):
        artifact.matrix("layers.1.attention.v")
    artifact.matrix("layers.0.attention.v")  # its neighbours are fine
    assert len(problems(model)) == 1


def test_a_flipped_bit_of_an_expert_is_refused_by_name(model: Path) -> None:
    where = Artifact.open(model).expert_location(1, 9)
    flip(where.path, where.offset)
    with pytest.raises(CorruptArtifact, match=r"layer-001\.safetensors: expert 9 of layer 1"):
        Artifact.open(model).read_expert(1, 9)
    assert len(problems(model)) == 1


def test_a_flipped_bit_of_an_experts_padding_is_found(model: Path) -> None:
    where = Artifact.open(model).expert_location(0, 0)
    layout = Artifact.open(model).expert_layout(0)
    assert layout.num_bytes < where.num_bytes
    flip(where.path, where.offset + where.num_bytes - 1)
    assert ["expert 0 of layer 0" in problem for problem in problems(model)] == [True]


@pytest.mark.parametrize("offset", [0, 9, 60, 4095])
def test_a_flipped_bit_of_a_safetensors_header_is_found(model: Path, offset: int) -> None:
    flip(model / "dense.safetensors", offset, bit=1)
    assert ["header" in problem for problem in problems(model)] == [True]


def test_a_flipped_bit_of_the_tokenizer_is_refused(model: Path) -> None:
    flip(model / "tokenizer.json", 100)
    with pytest.raises(CorruptArtifact, match=r"tokenizer\.json"):
        _ = Artifact.open(model).tokenizer_path
    assert len(problems(model)) == 1


def test_a_flipped_bit_of_the_manifest_is_refused(model: Path) -> None:
    flip(model / "manifest.json", 300, bit=1)
    with pytest.raises(CorruptArtifact, match=r"manifest\.json"):
        Artifact.open(model)


def test_verify_names_everything_that_is_damaged(model: Path) -> None:
    artifact = Artifact.open(model)
    flip(model / "dense.safetensors", artifact.manifest.dense[0].offset)
    flip(model / "experts/layer-000.safetensors", artifact.expert_location(0, 3).offset)
    (model / "experts/layer-001.safetensors").unlink()
    with pytest.raises(CorruptArtifact) as caught:
        verify(str(model))
    said = str(caught.value)
    assert "3 damaged" in said
    for part in ("tensor embed", "expert 3 of layer 0", "layer-001.safetensors is missing"):
        assert part in said


def test_an_expert_that_the_model_lacks_is_not_owned(original: Path) -> None:
    artifact = Artifact.open(original)
    for layer, index in ((0, 16), (2, 0)):
        with pytest.raises(NotOwned, match=f"expert {index} of layer {layer}"):
            artifact.expert_location(layer, index)


def test_a_large_part_is_read_whole_and_checked_to_its_last_byte(tmp_path: Path) -> None:
    """Several threads read it, piece by piece; the last piece is no whole one."""
    path, skipped, num_bytes = tmp_path / "large", 5, (40 << 20) + 3
    data = np.random.default_rng(0).integers(0, 256, skipped + num_bytes, np.uint8)
    path.write_bytes(data.tobytes())
    expected = digest(data[skipped:].tobytes())
    out = np.zeros(num_bytes, np.uint8)
    read_checked(path, skipped, out, expected, "tensor x")
    assert np.array_equal(out, data[skipped:])
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptArtifact, match="tensor x: its bytes are not"):
        read_checked(path, skipped, out, expected, "tensor x")
    os.truncate(path, skipped + num_bytes - 1)
    with pytest.raises(CorruptArtifact, match="truncated inside tensor x"):
        read_checked(path, skipped, out, expected, "tensor x")
