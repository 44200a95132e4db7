"""Convert never holds more than a piece of a tensor and one expert: enforced by the kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.limits import MIB
from support.checkpoints import tiny_config
from support.tiny_tokenizer import write_tokenizer

# One big table and big experts; the files are sparse, so they cost no disk.
CONFIG = tiny_config(
    "mixtral",
    hidden_size=2048,
    vocab_size=100_000,
    intermediate_size=4096,
    num_local_experts=2,
    num_hidden_layers=1,
    tie_word_embeddings=True,
)
TABLE_BYTES = CONFIG["vocab_size"] * CONFIG["hidden_size"] * 2  # bfloat16: 390 MiB
EXPERT_BYTES = 3 * CONFIG["hidden_size"] * CONFIG["intermediate_size"] * 2  # 48 MiB
ALLOWED_BYTES = 2 * EXPERT_BYTES + 250 * MIB

# RLIMIT_DATA bounds private writable memory: what /proc calls RssAnon cannot exceed it.
_CONVERT = """
import resource, sys
from pathlib import Path
from client.convert.open_source import open_source
from client.convert.pipeline import Options, convert, make_plan
from shoal.quant import parse_format
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
options = Options(quant=parse_format(sys.argv[4]))
convert(make_plan(open_source(sys.argv[2]), options), Path(sys.argv[3]), lambda _: None)
"""


def write_sparse_checkpoint(folder: Path) -> None:
    dim, width, heads = CONFIG["hidden_size"], CONFIG["intermediate_size"], 2048
    kv = heads // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": [CONFIG["vocab_size"], dim],
        "model.norm.weight": [dim],
        f"{layer}.input_layernorm.weight": [dim],
        f"{layer}.post_attention_layernorm.weight": [dim],
        f"{layer}.self_attn.q_proj.weight": [heads, dim],
        f"{layer}.self_attn.k_proj.weight": [kv, dim],
        f"{layer}.self_attn.v_proj.weight": [kv, dim],
        f"{layer}.self_attn.o_proj.weight": [dim, heads],
        f"{layer}.block_sparse_moe.gate.weight": [2, dim],
    }
    for index in range(2):
        stem = f"{layer}.block_sparse_moe.experts.{index}"
        shapes |= {f"{stem}.w1.weight": [width, dim], f"{stem}.w3.weight": [width, dim]}
        shapes[f"{stem}.w2.weight"] = [dim, width]
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
@pytest.mark.parametrize("quant", ["bf16", "q8_0"])
def test_peak_anonymous_memory_is_below_two_experts_and_250_mb(tmp_path: Path, quant: str) -> None:
    assert TABLE_BYTES > ALLOWED_BYTES, "a convert that loads the table whole must fail"
    write_sparse_checkpoint(tmp_path / "c")
    paths = (str(tmp_path / "c"), str(tmp_path / "m.shoal"))
    ended = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(ALLOWED_BYTES), *paths, quant],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # its buffers count, and nobody uses them
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "m.shoal" / "manifest.json").exists()
