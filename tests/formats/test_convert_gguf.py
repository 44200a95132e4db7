"""Convert from GGUF: the same weights give the same tensors as from safetensors, block by block."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from client.convert.gguf_source import GgufSource
from client.convert.open_source import open_source
from client.convert.pipeline import Options, convert, make_plan
from client.convert.safetensors_source import SafetensorsSource
from client.convert.source import Source
from shoal.artifact import Artifact
from shoal.errors import (
    ArtifactError,
    CorruptArtifact,
    NonFiniteWeights,
    UnsupportedModel,
    UsageError,
)
from shoal.quant import Format
from support.checkpoints import tiny_config, write_checkpoint
from support.tiny_gguf import write_gguf

QUANTISED = (Format.Q8_0, Format.Q4_0, Format.Q4_1, Format.Q4_K, Format.F16, Format.BF16)


def run(source: Source, out: Path, **options: Any) -> Artifact:
    convert(make_plan(source, Options(**options)), out, lambda _num_bytes: None)
    return Artifact.open(out)


def tensor_hashes(artifact: Artifact) -> dict[str, object]:
    """Hash, format and grid of everything: what must not depend on where the weights came from."""
    found: dict[str, object] = {
        t.name: (t.format, t.down, t.blake3) for t in artifact.manifest.dense
    }
    for layer in artifact.manifest.experts:
        found[f"experts of {layer.layer}"] = (layer.weights, layer.grid, layer.blake3)
    return found


def big_config(family: str) -> dict[str, Any]:
    """Wide enough for every format: columns are multiples of 256."""
    return tiny_config(
        family,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        **(
            {"moe_intermediate_size": 256, "num_experts": 4, "head_dim": 64}
            if family == "qwen3_moe"
            else {}
        ),
    )


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_f32_weights_give_the_same_tensors_as_from_safetensors(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    write_checkpoint(tmp_path / "c", config, 3)
    write_gguf(tmp_path / "m.gguf", tmp_path / "c", config)
    ours = run(SafetensorsSource(tmp_path / "c"), tmp_path / "a.shoal")
    theirs = run(GgufSource(tmp_path / "m.gguf"), tmp_path / "b.shoal")
    assert tensor_hashes(theirs) == tensor_hashes(ours)
    assert theirs.spec.layers == ours.spec.layers
    assert theirs.spec.attention == ours.spec.attention


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("fmt", QUANTISED, ids=lambda fmt: fmt.label)
def test_quantised_blocks_are_rearranged_and_never_changed(
    tmp_path: Path, family: str, fmt: Format
) -> None:
    """
    The file's blocks were made by the function that convert quantises with. So converting the
    file as it is must give what quantising the float checkpoint gives: permuted, cut, fused alike.
    """
    config = big_config(family)
    write_checkpoint(tmp_path / "c", config, 4)
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    fused = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    vocabulary = fmt if fmt.is_float else Format.Q8_0
    formats = dict.fromkeys((*kinds, *fused), fmt)
    formats |= {"token_embd": vocabulary, "output": vocabulary}
    write_gguf(tmp_path / "m.gguf", tmp_path / "c", config, formats)
    quantised = run(SafetensorsSource(tmp_path / "c"), tmp_path / "a.shoal", quant=fmt)
    rearranged = run(GgufSource(tmp_path / "m.gguf"), tmp_path / "b.shoal")
    assert rearranged.manifest.quantisation == fmt.label
    assert rearranged.manifest.notes == ()
    assert tensor_hashes(rearranged) == tensor_hashes(quantised)


def test_another_quant_transcodes_and_the_manifest_says_so(tmp_path: Path) -> None:
    config = big_config("llama")
    write_checkpoint(tmp_path / "c", config, 4)
    write_gguf(tmp_path / "m.gguf", tmp_path / "c", config, {"attn_q": Format.Q4_1})
    artifact = run(GgufSource(tmp_path / "m.gguf"), tmp_path / "m.shoal", quant=Format.Q8_0)
    assert artifact.manifest.notes == ("attention.q: transcoded from Q4_1 to q8_0",)
    assert artifact.matrix("layers.0.attention.q").format is Format.Q8_0


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def config() -> dict[str, Any]:
    return big_config("llama")


@pytest.fixture
def folder(tmp_path: Path, config: dict[str, Any]) -> Path:
    write_checkpoint(tmp_path / "c", config, 4)
    return tmp_path / "c"


def blocks_of(kind: GGMLQuantizationType, rows: int, cols: int) -> bytes:
    columns, size = GGML_QUANT_SIZES[kind]
    return bytes(rows * cols // columns * size)


def test_a_type_without_kernels_is_refused_by_name_unless_transcoded(
    tmp_path: Path, folder: Path, config: dict[str, Any]
) -> None:
    kind = GGMLQuantizationType.Q6_K
    raw = {"blk.0.ffn_down.weight": (kind, blocks_of(kind, 256, 512))}
    write_gguf(tmp_path / "m.gguf", folder, config, raw=raw)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_down\.weight.*Q6_K.*--quant"):
        run(GgufSource(tmp_path / "m.gguf"), tmp_path / "m.shoal")
    artifact = run(GgufSource(tmp_path / "m.gguf"), tmp_path / "m.shoal", quant=Format.Q8_0)
    assert "experts' down: transcoded from Q6_K to q8_0" in artifact.manifest.notes


def test_an_architecture_that_is_not_ours_is_refused_by_name(
    tmp_path: Path, folder: Path, config: dict[str, Any]
) -> None:
    write_gguf(tmp_path / "m.gguf", folder, config, architecture="mamba")
    with pytest.raises(UnsupportedModel, match="'mamba' is not supported"):
        GgufSource(tmp_path / "m.gguf")


def test_a_scale_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, folder: Path, config: dict[str, Any]
) -> None:
    kind = GGMLQuantizationType.Q8_0
    blocks = bytearray(blocks_of(kind, 512, 256))
    blocks[34 * 9 : 34 * 9 + 2] = b"\x00\x7c"  # infinity in float16
    write_gguf(
        tmp_path / "m.gguf", folder, config, raw={"blk.0.ffn_up.weight": (kind, bytes(blocks))}
    )
    for quant in (None, Format.Q4_0):
        with pytest.raises(NonFiniteWeights, match=r"blk\.0\.ffn_up\.weight"):
            run(GgufSource(tmp_path / "m.gguf"), tmp_path / "m.shoal", quant=quant)


@pytest.mark.parametrize("keep", [0, 3, 24, 1000, 5000, -1])
def test_a_truncated_file_is_refused(
    tmp_path: Path, folder: Path, config: dict[str, Any], keep: int
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, folder, config)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptArtifact, match=r"m\.gguf"):
        GgufSource(path)


def test_what_is_neither_gguf_nor_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnsupportedModel, match="neither a GGUF file nor"):
        open_source(str(tmp_path / "notes.txt"))
    with pytest.raises(UsageError, match="no such file"):
        open_source(str(tmp_path / "absent"))


def test_any_damage_to_the_header_is_refused_without_another_error(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", num_hidden_layers=1, num_experts=2, num_experts_per_tok=1)
    write_checkpoint(tmp_path / "c", config, 1)
    path = tmp_path / "m.gguf"
    write_gguf(path, tmp_path / "c", config)
    whole = path.read_bytes()
    header_bytes = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
    random = np.random.Generator(np.random.PCG64(7))
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        place = int(random.integers(header_bytes))
        damaged[place] ^= 1 << int(random.integers(8)) if random.random() < 0.5 else 0xFF
        path.write_bytes(damaged)
        try:
            make_plan(GgufSource(path), Options())
        except ArtifactError:
            refused += 1
    assert refused > 10, "the damage must hit something"


def test_a_folder_of_gguf_files_asks_for_one_of_them(
    tmp_path: Path, folder: Path, config: dict[str, Any]
) -> None:
    (tmp_path / "files").mkdir()
    write_gguf(tmp_path / "files" / "m.gguf", folder, config)
    with pytest.raises(UsageError, match=r"m\.gguf"):
        open_source(str(tmp_path / "files"))
