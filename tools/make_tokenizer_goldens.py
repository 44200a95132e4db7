"""Ask llama.cpp for token ids, and for greedy text of SmolLM2.

    VENV/bin/pip install -r tools/requirements-goldens.txt
    VENV/bin/python tools/make_tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf

Writes tests/goldens/llama_cpp_tokens.json: for a made vocabulary and for SmolLM2's, under each
pre-tokenizer, the ids of every string with special tokens unparsed and parsed; and
tests/goldens/llama_cpp_smollm2.json: ten prompts, 32 greedy tokens each with their margins.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from support.vocabularies import PRE_TOKENIZERS, STRINGS, boundary_metadata  # noqa: E402

# Not in the development environment, so nothing checks their types.
gguf: Any = importlib.import_module("gguf")
llama_cpp: Any = importlib.import_module("llama_cpp")

NUM_GREEDY = 32
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "The three primary colors are",
    "To make a cup of tea, first",
    "In 1969, the first humans",
    "Q: What is the largest planet in the solar system?\nA:",
    "My favourite thing about the sea is",
    "1, 2, 3, 4, 5,",
)
_ARRAYS = ("tokens", "token_type", "merges")


def main() -> None:
    path = Path(sys.argv[1])
    goldens = ROOT / "tests" / "goldens"
    real = _tokenizer_metadata(path)
    answers: dict[str, Any] = {"llama_cpp": llama_cpp.__version__}
    for pre_tokenizer in PRE_TOKENIZERS:
        answers[f"boundaries {pre_tokenizer}"] = _ids(boundary_metadata(pre_tokenizer))
        answers[f"smollm2 {pre_tokenizer}"] = _ids(
            real | {"tokenizer.ggml.pre": pre_tokenizer, "tokenizer.ggml.add_bos_token": False}
        )
    _write(goldens / "llama_cpp_tokens.json", answers)
    _write(
        goldens / "llama_cpp_smollm2.json",
        {"llama_cpp": llama_cpp.__version__, "prompts": _continuations(path)},
    )


def _write(path: Path, value: Any) -> None:
    lines = json.dumps(value, indent=0).replace(",\n", ", ").replace("[\n", "[").replace("\n]", "]")
    path.write_text(lines.replace("], ", "],\n") + "\n")
    assert json.loads(path.read_text()) == value


def _tokenizer_metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.ggml.")}


def _ids(metadata: dict[str, Any]) -> dict[str, list[list[int]]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        _write_vocabulary(path, metadata)
        llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        found = {
            key: [llama.tokenize(text.encode(), add_bos=True, special=parsed) for text in STRINGS]
            for key, parsed in (("unparsed", False), ("parsed", True))
        }
        llama.close()
    return found


def _write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 32)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_uint32("llama.feed_forward_length", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _continuations(path: Path) -> list[dict[str, Any]]:
    llama = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    found: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        llama.reset()
        ids = llama.tokenize(prompt.encode(), add_bos=True, special=False)
        llama.eval(ids)
        greedy, margins = [], []
        for _ in range(NUM_GREEDY):
            row = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            logits = np.ctypeslib.as_array(row, (llama.n_vocab(),)).copy()
            order = np.argsort(-logits, kind="stable")[:2]
            greedy.append(int(order[0]))
            margins.append(round(float(logits[order[0]] - logits[order[1]]), 4))
            llama.eval([greedy[-1]])
        text = llama.detokenize(greedy).decode(errors="replace")
        found.append(
            {"text": prompt, "ids": ids, "greedy": greedy, "margins": margins, "greedy_text": text}
        )
    return found


if __name__ == "__main__":
    main()
