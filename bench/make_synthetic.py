"""Make a model of Qwen3-30B-A3B's geometry with random weights: for speed, not for sense.

python bench/make_synthetic.py FOLDER [--experts q4_0|q4_k|q8_0] [--layers 12] [--seed 0]

Writes FOLDER/NAME.gguf (the gguf library's writer, tensor by tensor, so that memory stays small)
and converts it to FOLDER/NAME.shoal: the same weights for every engine that reads either. Twelve
layers instead of 48 so that a small machine holds it; every matrix has its real shape. The quant
blocks are drawn directly, with scales that give weights of unit gain, so that activations stay
finite and routing spreads over the experts.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from numpy.typing import NDArray

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shapes of Qwen3-30B-A3B, from its config.json; layers are the caller's."""

    layers: int = 12
    dim: int = 2048
    ffn_dim: int = 768
    experts: int = 128
    experts_per_token: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 151936
    context: int = 40960


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write: shape with columns last; `gain` is the weights' standard deviation."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    gain: float


def tensors(geometry: Geometry, kind: gguf.GGMLQuantizationType) -> Iterator[Tensor]:
    """Yield the tensors of a qwen3moe GGUF file whose experts have that format."""
    g, types = geometry, gguf.GGMLQuantizationType
    dense = types.Q4_K if kind is types.Q4_K else types.Q8_0
    yield Tensor("token_embd.weight", (g.vocab, g.dim), types.Q8_0, 1.0)
    yield Tensor("output.weight", (g.vocab, g.dim), types.Q8_0, g.dim**-0.5)
    yield Tensor("output_norm.weight", (g.dim,), types.F32, 0.0)
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    for layer in range(g.layers):
        blk = f"blk.{layer}"
        yield Tensor(f"{blk}.attn_norm.weight", (g.dim,), types.F32, 0.0)
        yield Tensor(f"{blk}.attn_q.weight", (q, g.dim), dense, g.dim**-0.5)
        yield Tensor(f"{blk}.attn_k.weight", (kv, g.dim), dense, g.dim**-0.5)
        yield Tensor(f"{blk}.attn_v.weight", (kv, g.dim), dense, g.dim**-0.5)
        yield Tensor(f"{blk}.attn_output.weight", (g.dim, q), dense, q**-0.5)
        yield Tensor(f"{blk}.attn_q_norm.weight", (g.head_dim,), types.F32, 0.0)
        yield Tensor(f"{blk}.attn_k_norm.weight", (g.head_dim,), types.F32, 0.0)
        yield Tensor(f"{blk}.ffn_norm.weight", (g.dim,), types.F32, 0.0)
        yield Tensor(f"{blk}.ffn_gate_inp.weight", (g.experts, g.dim), types.F32, g.dim**-0.5)
        for part, rows, cols in (("gate", g.ffn_dim, g.dim), ("up", g.ffn_dim, g.dim)):
            shape = (g.experts, rows, cols)
            yield Tensor(f"{blk}.ffn_{part}_exps.weight", shape, kind, cols**-0.5)
        shape = (g.experts, g.dim, g.ffn_dim)
        yield Tensor(f"{blk}.ffn_down_exps.weight", shape, kind, g.ffn_dim**-0.5)


def random_blocks(
    kind: gguf.GGMLQuantizationType, num_blocks: int, gain: float, rng: np.random.Generator
) -> U8:
    """Return [num_blocks, bytes] quant blocks whose values have that standard deviation."""
    types = gguf.GGMLQuantizationType
    num_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (num_blocks, num_bytes), np.uint8)

    def scale(first: int, value: float) -> None:
        # A few different scales, so that a kernel that mixes them up is not flattered.
        spread = np.float32(value) * np.array([0.75, 1.0, 1.25], np.float32)
        chosen = spread.astype(np.float16)[rng.integers(0, 3, num_blocks)]
        blocks[:, first : first + 2] = chosen.view(np.uint8).reshape(-1, 2)

    match kind:
        case types.Q8_0:  # uniform int8: standard deviation 74
            scale(0, gain / 74)
        case types.Q4_0:  # uniform -8..7: 4.6
            scale(0, gain / 4.6)
        case types.Q4_K:  # d * 32 * (0..15) - dmin * 40, centred by dmin = 6 d
            blocks[:, 4:16] = np.repeat(np.array([0xA0, 0xA8, 0x80], np.uint8), 4)
            half = np.array([gain / 4.6 / 32, 6 * gain / 4.6 / 32], np.float16)
            blocks[:, 0:4] = half.view(np.uint8)
        case _:
            raise AssertionError(kind)
    return blocks


def values(tensor: Tensor, rng: np.random.Generator) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Return a whole tensor as GGUF stores it."""
    if tensor.gain == 0.0:  # a norm
        return rng.uniform(0.9, 1.1, tensor.shape).astype(np.float32)
    if tensor.kind is gguf.GGMLQuantizationType.F32:
        return rng.standard_normal(tensor.shape, np.float32) * np.float32(tensor.gain)
    cols, _ = gguf.GGML_QUANT_SIZES[tensor.kind]
    blocks = int(np.prod(tensor.shape)) // cols
    data = random_blocks(tensor.kind, blocks, tensor.gain, rng)
    return data.reshape(*tensor.shape[:-1], -1)


def write_gguf(path: Path, geometry: Geometry, kind: str, seed: int) -> None:
    """Write the model; the same seed gives the same bytes."""
    g = geometry
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_name(path.stem)
    writer.add_block_count(g.layers)
    writer.add_context_length(g.context)
    writer.add_embedding_length(g.dim)
    writer.add_feed_forward_length(6144)
    writer.add_expert_feed_forward_length(g.ffn_dim)
    writer.add_expert_count(g.experts)
    writer.add_expert_used_count(g.experts_per_token)
    writer.add_head_count(g.heads)
    writer.add_head_count_kv(g.kv_heads)
    writer.add_key_length(g.head_dim)
    writer.add_value_length(g.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(g.vocab)
    writer.add_tokenizer_model("none")
    planned = list(tensors(g, gguf.GGMLQuantizationType[kind.upper()]))
    for tensor in planned:
        cols, num_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        size = int(np.prod(tensor.shape)) // cols * num_bytes
        writer.add_tensor_info(
            tensor.name, list(tensor.shape), np.dtype(np.float32), size, tensor.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, tensor in enumerate(planned):
        writer.write_tensor_data(values(tensor, np.random.default_rng([seed, index])))
    writer.close()


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write a tokenizer whose token i is the word `ti`: the ids can be read off the text."""
    folder.mkdir(exist_ok=True)
    model = tokenizers.models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def make(folder: Path, stem: str, geometry: Geometry, kind: str, seed: int) -> tuple[Path, Path]:
    """Write the GGUF file and convert it, unless they are there; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    source, artifact = folder / f"{stem}.gguf", folder / f"{stem}.shoal"
    if not source.exists():
        partial = folder / f"{stem}.partial"
        write_gguf(partial, geometry, kind, seed)
        partial.rename(source)
    if not artifact.exists():
        words = folder / f"{stem}-words"
        write_tokenizer(words, geometry.vocab)
        convert = ["convert", str(source), str(artifact), "--tokenizer", str(words)]
        subprocess.run([sys.executable, "-P", "-m", "client.cli", *convert], check=True)
    return source, artifact


def main() -> None:
    """Make the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", choices=["q4_0", "q4_k", "q8_0"], default="q4_0")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    stem = f"qwen3-30b-a3b-{chosen.layers}-layers-{chosen.experts}-seed-{chosen.seed}"
    geometry = Geometry(layers=chosen.layers)
    source, artifact = make(chosen.folder, stem, geometry, chosen.experts, chosen.seed)
    print(f"{source}\n{artifact}")


if __name__ == "__main__":
    main()
