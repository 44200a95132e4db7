"""GGUF tokenizers: our ids are llama.cpp's, and what we do not have is refused by name."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from client.convert.gguf_tokenizer import gguf_text_files
from coordinator.tokenizer import Tokenizer
from shoal.errors import UnsupportedModel
from support.smollm2 import smollm2_gguf
from support.vocabularies import PRE_TOKENIZERS, STRINGS, boundary_metadata

GOLDEN_FILE = Path(__file__).parent.parent / "goldens" / "llama_cpp_tokens.json"


def _golden(name: str) -> dict[str, list[list[int]]]:
    golden: dict[str, list[list[int]]] = json.loads(GOLDEN_FILE.read_text())[name]
    return golden


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    files = gguf_text_files(metadata)
    assert files.tokenizer is not None
    return Tokenizer(files.tokenizer.decode(), files.generation_config)


def _check_ids(tokenizer: Tokenizer, golden: dict[str, list[list[int]]]) -> None:
    assert len(STRINGS) >= 50 and len(golden["parsed"]) == len(golden["unparsed"]) == len(STRINGS)
    for text, unparsed, parsed in zip(STRINGS, golden["unparsed"], golden["parsed"], strict=True):
        assert tokenizer.encode(text) == unparsed, text
        assert [*tokenizer.bos_ids, *tokenizer.encode_templated(text)] == parsed, text


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_ids_of_a_vocabulary_that_shows_every_cut_are_llama_cpps(pre_tokenizer: str) -> None:
    tokenizer = _tokenizer(boundary_metadata(pre_tokenizer))
    _check_ids(tokenizer, _golden(f"boundaries {pre_tokenizer}"))


@pytest.mark.weights
def test_ids_of_smollm2s_vocabulary_are_llama_cpps() -> None:
    fields = gguf.GGUFReader(smollm2_gguf()).fields
    metadata = {name: field.contents() for name, field in fields.items()}
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    for pre_tokenizer in PRE_TOKENIZERS:
        tokenizer = _tokenizer(metadata | {"tokenizer.ggml.pre": pre_tokenizer})
        _check_ids(tokenizer, _golden(f"smollm2 {pre_tokenizer}"))


def test_the_strings_tell_the_pre_tokenizers_apart() -> None:
    first, second, third = (_golden(f"boundaries {name}") for name in PRE_TOKENIZERS)
    assert first != second and second != third and first != third


@pytest.mark.parametrize("wrong", [name for name in PRE_TOKENIZERS if name != "qwen2"])
def test_another_pre_tokenizer_fails_the_comparison(wrong: str) -> None:
    with pytest.raises(AssertionError):
        _check_ids(_tokenizer(boundary_metadata(wrong)), _golden("boundaries qwen2"))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("tokenizer.ggml.model", "llama", "'llama' is not byte-level BPE"),
        ("tokenizer.ggml.pre", "deepseek-llm", "'deepseek-llm' is none of gpt-2, smollm, qwen2"),
        ("tokenizer.ggml.pre", None, "None is none of gpt-2, smollm, qwen2"),
        ("tokenizer.ggml.tokens", None, "tokens must be a list"),
        ("tokenizer.ggml.tokens", ["a", "a"], "token_type must have 2 entries"),
        ("tokenizer.ggml.merges", ["ab"], "merge 'ab' is no pair"),
        ("tokenizer.ggml.merges", ["zq zq"], "`zq` out of vocabulary"),
    ],
)
def test_a_tokenizer_that_is_not_ours_is_refused_with_the_way_out(
    key: str, value: object, named: str
) -> None:
    metadata = boundary_metadata("qwen2") | {key: value}
    with pytest.raises(UnsupportedModel, match="--tokenizer DIR") as refusal:
        gguf_text_files(metadata)
    assert named in str(refusal.value)


def test_a_token_id_beyond_the_vocabulary_is_refused() -> None:
    metadata = boundary_metadata("qwen2") | {"tokenizer.ggml.eos_token_id": 10**6}
    with pytest.raises(UnsupportedModel, match="eos_token_id = 1000000"):
        gguf_text_files(metadata)


def test_eos_is_the_metadatas_and_every_well_known_end_token() -> None:
    files = gguf_text_files(boundary_metadata("smollm"))
    assert files.generation_config["eos_token_id"] == [2, 0]  # <|im_end|>, <|endoftext|>
    assert files.generation_config["bos_token_id"] == 0


def test_bos_is_added_only_where_the_metadata_say_so() -> None:
    metadata = boundary_metadata("smollm")
    assert _tokenizer(metadata).bos_ids == (0,)
    assert _tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False}).bos_ids == ()
