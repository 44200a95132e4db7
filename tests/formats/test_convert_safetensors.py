"""Convert from Hugging Face folders: every weight arrives, and what cannot is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from client.convert.pipeline import Options, convert, make_plan
from client.convert.safetensors_source import SafetensorsSource
from client.convert.transcode import encode
from shoal import ops
from shoal.artifact import Artifact
from shoal.errors import CorruptArtifact, NonFiniteWeights, UnsupportedModel, UsageError
from shoal.model_spec import RouterKind
from shoal.quant import Format, group_bytes, matrix_bytes, parse_format
from support.checkpoints import random_values, tiny_config, write_checkpoint
from support.tiny_model import make_tiny_artifact


def convert_folder(folder: Path, out: Path, **options: Any) -> Artifact:
    convert(make_plan(SafetensorsSource(folder), Options(**options)), out, lambda _num_bytes: None)
    return Artifact.open(out)


def checkpoint_values(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    values: dict[str, np.ndarray[Any, Any]] = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return values


def expert_matrices(artifact: Artifact, layer: int, index: int) -> list[np.ndarray[Any, Any]]:
    """Return gate, up and down of an expert as float32, unpacked by the kernels' own inverse."""
    layout = artifact.expert_layout(layer)
    data = artifact.read_expert(layer, index)
    groups = -(-layout.ffn_dim // 16)
    step = group_bytes(layout.gate_up, layout.dim)
    pairs = data[: 2 * groups * step].reshape(groups, 2, step)
    parts = []
    for which in range(2):
        part = ops.aligned_empty(groups * step)
        part[:] = pairs[:, which].reshape(-1)
        parts.append(
            ops.unpack_matrix(ops.Matrix(layout.gate_up, layout.ffn_dim, layout.dim, part))
        )
    down = ops.aligned_empty(matrix_bytes(layout.down, layout.dim, layout.ffn_dim))
    down[:] = data[2 * groups * step :][: len(down)]
    parts.append(ops.unpack_matrix(ops.Matrix(layout.down, layout.dim, layout.ffn_dim, down)))
    return parts


def test_every_dense_weight_arrives_unchanged_in_f32(tmp_path: Path) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, "qwen3_moe", "f32"))
    theirs = checkpoint_values(tmp_path / "tiny-checkpoint")
    pairs = {
        "embed": "model.embed_tokens.weight",
        "lm_head": "lm_head.weight",
        "layers.1.attention.q": "model.layers.1.self_attn.q_proj.weight",
        "layers.2.attention.o": "model.layers.2.self_attn.o_proj.weight",
        "layers.0.router": "model.layers.0.mlp.gate.weight",
    }
    for ours, name in pairs.items():
        np.testing.assert_array_equal(ops.unpack_matrix(artifact.matrix(ours)), theirs[name])
    vectors = {
        "norm": "model.norm.weight",
        "layers.1.attention.k_norm": "model.layers.1.self_attn.k_norm.weight",
        "layers.0.ffn.norm": "model.layers.0.post_attention_layernorm.weight",
    }
    for ours, name in vectors.items():
        np.testing.assert_array_equal(artifact.vector(ours), theirs[name])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_every_expert_arrives_as_gate_up_and_down(tmp_path: Path, family: str) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, family, "f32"))
    theirs = checkpoint_values(tmp_path / "tiny-checkpoint")
    mixtral = family == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if mixtral else "mlp"
    for index in (0, 7):
        stem = f"model.layers.2.{block}.experts.{index}"
        parts = expert_matrices(artifact, 2, index)
        for part, name in zip(parts, names, strict=True):
            np.testing.assert_array_equal(part, theirs[f"{stem}.{name}.weight"])


def test_packing_in_pieces_gives_what_packing_at_once_gives(tmp_path: Path) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, "mixtral", "q4_0"))
    theirs = checkpoint_values(tmp_path / "tiny-checkpoint")
    gate, up, down = (
        encode(Format.Q4_0, theirs[f"model.layers.1.block_sparse_moe.experts.3.{name}.weight"])
        for name in ("w1", "w3", "w2")
    )
    layout = artifact.expert_layout(1)
    whole = ops.aligned_empty(layout.num_bytes)
    ops.pack_expert(layout, gate, up, down, whole)
    np.testing.assert_array_equal(artifact.read_expert(1, 3)[: layout.num_bytes], whole)


def test_the_slices_of_a_dense_ffn_are_its_rows_and_columns(tmp_path: Path) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, "llama", "f32"))
    theirs = checkpoint_values(tmp_path / "tiny-checkpoint")
    router = artifact.spec.layers[0].router
    assert router is not None and router.kind is RouterKind.ALL
    assert router.num_experts == router.experts_per_token == 16
    parts = [expert_matrices(artifact, 1, index) for index in range(16)]
    stem = "model.layers.1.mlp"
    for which, (name, axis) in enumerate((("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))):
        whole = np.concatenate([part[which] for part in parts], axis=axis)
        np.testing.assert_array_equal(whole, theirs[f"{stem}.{name}.weight"])


def test_ffn_slices_are_whole_quant_blocks_unless_told_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, tiny_config("llama", intermediate_size=320), 0)
    for quant, expected in (("f32", 16), ("q8_0", 10), ("q4_k", 10)):
        artifact = convert_folder(folder, tmp_path / f"{quant}.shoal", quant=parse_format(quant))
        assert artifact.manifest.experts[0].num_experts == expected, quant
    chosen = convert_folder(folder, tmp_path / "two.shoal", quant=Format.Q8_0, ffn_slices=2)
    assert chosen.manifest.experts[0].num_experts == 2
    with pytest.raises(UnsupportedModel, match="--ffn-slices 3"):
        convert_folder(folder, tmp_path / "three.shoal", quant=Format.Q8_0, ffn_slices=3)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_without_quant_the_checkpoints_own_format_is_kept(tmp_path: Path, dtype: str) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, "olmoe", None, dtype=dtype))
    assert artifact.manifest.quantisation == dtype
    assert artifact.matrix("layers.0.attention.q").format is parse_format(dtype)
    assert artifact.matrix("layers.0.router").format is Format.F32
    assert artifact.manifest.notes == ()
    named = checkpoint_values(tmp_path / "tiny-checkpoint") if dtype == "f16" else {}
    if named:  # the library cannot hand bfloat16 to NumPy
        theirs = named["model.embed_tokens.weight"].astype(np.float32)
        np.testing.assert_array_equal(ops.unpack_matrix(artifact.matrix("embed")), theirs)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_1", "q4_k"])
def test_quantised_weights_stay_close_and_the_vocabulary_keeps_8_bits(
    tmp_path: Path, quant: str
) -> None:
    path = make_tiny_artifact(tmp_path, "qwen3_moe", quant, hidden_size=256, num_hidden_layers=1)
    artifact = Artifact.open(path)
    theirs = checkpoint_values(tmp_path / "tiny-checkpoint")
    assert artifact.matrix("embed").format is Format.Q8_0
    assert artifact.matrix("lm_head").format is Format.Q8_0
    assert artifact.matrix("layers.0.router").format is Format.F32
    query = artifact.matrix("layers.0.attention.q")
    assert query.format is parse_format(quant)
    wanted = theirs["model.layers.0.self_attn.q_proj.weight"]
    error = np.sqrt(np.mean((ops.unpack_matrix(query) - wanted) ** 2) / np.mean(wanted**2))
    assert error < (0.01 if quant == "q8_0" else 0.12), error


def test_a_k_quant_that_does_not_fit_is_q8_0_and_the_manifest_says_so(tmp_path: Path) -> None:
    path = make_tiny_artifact(tmp_path, "qwen3_moe", "q4_k", hidden_size=256, num_hidden_layers=1)
    artifact = Artifact.open(path)
    weights = artifact.manifest.experts[0].weights
    assert (weights.gate_up, weights.down) == (Format.Q4_K, Format.Q8_0)
    assert any("64 columns are not a multiple of 256" in n for n in artifact.manifest.notes)


def test_shards_and_prefixes_give_the_same_identity(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe")
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "sharded": {"shards": 3},
        "nested": {"prefix": "model.language_model."},
    }
    identities: set[str] = set()
    for name, options in variants.items():
        write_checkpoint(tmp_path / name, config, 5, **options)
        identities.add(convert_folder(tmp_path / name, tmp_path / f"{name}.shoal").identity)
    assert len(identities) == 1


def test_fused_experts_are_gate_rows_then_up_rows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "fused", tiny_config("qwen3_moe"), 5, fused=True)
    artifact = convert_folder(tmp_path / "fused", tmp_path / "fused.shoal")
    theirs = checkpoint_values(tmp_path / "fused")
    both = theirs["model.layers.0.mlp.experts.gate_up_proj"][6]
    gate, up, down = expert_matrices(artifact, 0, 6)
    np.testing.assert_array_equal(np.concatenate([gate, up]), both)
    np.testing.assert_array_equal(down, theirs["model.layers.0.mlp.experts.down_proj"][6])


def test_two_converts_write_the_same_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tiny_config("mixtral"), 1)
    for out in ("a", "b"):
        convert_folder(tmp_path / "c", tmp_path / out / "m.shoal", quant=Format.Q4_1)
    first, second = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert first == second and len(first) >= 5


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


_PRINT_IDENTITIES = """
import sys
from pathlib import Path
sys.path[:0] = ["tests", "."]
from support.tiny_model import make_tiny_artifact
from shoal.artifact import Artifact
for quant in ("q8_0", "q4_0", "q4_1", "q4_k", "bf16"):
    path = make_tiny_artifact(Path(sys.argv[1]), "qwen3_moe", quant, name=quant, hidden_size=256,
                              num_hidden_layers=1)
    print(quant, Artifact.open(path).identity)
"""


@pytest.mark.processes
def test_the_identity_does_not_depend_on_the_cpu(tmp_path: Path) -> None:
    """Without NumPy's AVX2 and FMA code and on our scalar kernels: the same weights and grids."""
    outputs = set()
    for name, extra in {
        "native": {},
        "plain": {"NPY_DISABLE_CPU_FEATURES": "X86_V3 AVX2 FMA3 AVX512F", "SHOAL_ISA": "scalar"},
    }.items():
        (tmp_path / name).mkdir()
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PRINT_IDENTITIES, str(tmp_path / name)],
            env=os.environ | extra,
            check=True,
            capture_output=True,
            text=True,
        )
        outputs.add(ended.stdout)
    assert len(outputs) == 1, outputs
    assert outputs.pop().count("\n") == 5


def test_experts_start_on_pages_and_any_safetensors_tool_lists_them(tmp_path: Path) -> None:
    path = make_tiny_artifact(tmp_path, "qwen3_moe", "q4_0")
    artifact = Artifact.open(path)
    for layer in artifact.manifest.experts:
        for index in range(layer.num_experts):
            where = artifact.expert_location(layer.layer, index)
            assert where.offset % 4096 == where.num_bytes % 4096 == 0
        with safetensors.safe_open(path / layer.file, "numpy") as file:
            assert set(file.keys()) == {f"experts.{i}" for i in range(layer.num_experts)}
            third = file.get_tensor("experts.3")
        np.testing.assert_array_equal(third, artifact.read_expert(layer.layer, 3))


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "c", tiny_config("qwen3_moe"), 2)
    return tmp_path / "c"


def overwrite(folder: Path, tensor: str, values: bytes, at: int = 0) -> None:
    """Replace bytes of a tensor of model.safetensors."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin = 8 + size + json.loads(data[8 : 8 + size])[tensor]["data_offsets"][0] + at
    data[begin : begin + len(values)] = values
    path.write_bytes(data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", [None, Format.BF16, Format.Q8_0, Format.Q4_K])
@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.mlp.experts.5.down_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_name(
    folder: Path, tmp_path: Path, tensor: str, quant: Format | None, value: float
) -> None:
    overwrite(folder, tensor, np.float32(value).tobytes(), at=4 * 40)
    with pytest.raises(NonFiniteWeights, match=tensor.replace(".", r"\.")) as caught:
        convert_folder(folder, tmp_path / "m.shoal", quant=quant)
    assert caught.value.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("quant", [Format.F16, Format.Q8_0, Format.Q4_0, Format.Q4_1])
def test_a_weight_too_large_for_the_format_is_refused(
    folder: Path, tmp_path: Path, quant: Format
) -> None:
    overwrite(folder, "model.layers.0.self_attn.q_proj.weight", np.float32(1e30).tobytes())
    with pytest.raises(NonFiniteWeights, match=f"too large for {quant.label}"):
        convert_folder(folder, tmp_path / "m.shoal", quant=quant)


def test_tiny_weights_become_zeros_without_a_warning() -> None:
    values = random_values(0, "tiny", (4, 256)) * np.float32(1e-38)
    for fmt in (Format.Q8_0, Format.Q4_0, Format.Q4_1, Format.Q4_K):
        assert ops.check_finite(fmt, encode(fmt, values))


def rewrite_header(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_a_tensor_type_that_is_not_ours_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    rewrite_header(folder, lambda h: h["model.norm.weight"].update(dtype="I32"))
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight is I32"):
        convert_folder(folder, tmp_path / "m.shoal")


def test_a_truncated_shard_is_refused_by_file(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors: truncated"):
        convert_folder(folder, tmp_path / "m.shoal")


def test_a_missing_tensor_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    rewrite_header(folder, lambda h: h.update(other=h.pop("model.norm.weight")))
    with pytest.raises(UnsupportedModel, match=r"missing: norm\.weight"):
        convert_folder(folder, tmp_path / "m.shoal")


def test_a_missing_shard_is_refused_by_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tiny_config("qwen3_moe"), 2, shards=2)
    (tmp_path / "c" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match=r"model-00002-of-00002\.safetensors is missing"):
        convert_folder(tmp_path / "c", tmp_path / "m.shoal")


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tiny_config("qwen3_moe"), 2, shards=2)
    index = tmp_path / "c" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))
    with pytest.raises(CorruptArtifact, match="not a file name"):
        convert_folder(tmp_path / "c", tmp_path / "m.shoal")


def test_a_model_type_that_is_not_ours_is_refused_by_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba9"}))
    with pytest.raises(UnsupportedModel, match="mamba9"):
        SafetensorsSource(folder)


def test_a_folder_of_pickles_is_refused_with_the_reason(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        SafetensorsSource(folder)


def test_no_tokenizer_is_refused_unless_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match="--tokenizer DIR"):
        convert_folder(folder, tmp_path / "m.shoal")
    artifact = convert_folder(folder, tmp_path / "m.shoal", allow_no_tokenizer=True)
    assert artifact.text_file("tokenizer.json") is None


def test_the_tokenizer_of_another_folder_replaces_the_checkpoints(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = (folder / "tokenizer.json").read_text().replace('"version": "1.0"', '"version":  "1.0"')
    (other / "tokenizer.json").write_text(text)
    own = convert_folder(folder, tmp_path / "own.shoal")
    replaced = convert_folder(folder, tmp_path / "replaced.shoal", tokenizer=other)
    assert replaced.text("tokenizer.json") == text != own.text("tokenizer.json")
    assert replaced.identity != own.identity


def test_token_ids_come_from_the_config_where_only_it_has_them(
    folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 3}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    artifact = convert_folder(folder, tmp_path / "m.shoal")
    assert artifact.generation_config == {"bos_token_id": 3, "eos_token_id": [0, 2]}


def test_slices_of_a_model_that_has_experts_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="experts of its own"):
        convert_folder(folder, tmp_path / "m.shoal", ffn_slices=4)


def test_a_tokenizer_that_is_no_text_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CorruptArtifact, match=r"tokenizer\.json is not UTF-8"):
        convert_folder(folder, tmp_path / "m.shoal")


def test_values_too_large_for_q4_k_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tiny_config("llama", hidden_size=256), 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    overwrite(tmp_path / "c", name, np.float32(1e30).tobytes())
    with pytest.raises(NonFiniteWeights, match="too large for q4_k"):
        convert_folder(tmp_path / "c", tmp_path / "m.shoal", quant=Format.Q4_K)
