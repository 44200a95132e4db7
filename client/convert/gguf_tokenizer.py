"""GGUF tokenizer metadata to tokenizer.json, chat template and generation config.

Byte-level BPE with one of three pre-tokenizers; everything else is refused by name. The ids are
llama.cpp's: tests compare them with committed ones.
"""

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import tokenizers

from client.convert.source import TextFiles
from shoal.errors import UnsupportedModel

WAY_OUT = "name a folder that has the model's tokenizer.json with --tokenizer DIR"
# Tokens that end a text whatever the metadata say, as llama.cpp recognises them by name.
_END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>")
_QWEN2_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _TokenType(IntEnum):  # ggml's llama_token_type
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def gguf_text_files(metadata: Mapping[str, Any]) -> TextFiles:
    """Make the text files from a GGUF file's metadata.

    Raises: UnsupportedModel naming a tokenizer that is not ours, or what is wrong with this one.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UnsupportedModel(f"GGUF tokenizer {model!r} is not byte-level BPE (gpt2): {WAY_OUT}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = _token_types(metadata, len(tokens))
    built = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": None,  # llama.cpp has none: Qwen2's own tokenizer.json composes (NFC)
        "pre_tokenizer": _pre_tokenizer(metadata.get("tokenizer.ggml.pre")),
        "post_processor": _post_processor(metadata, tokens),
        "decoder": _byte_level(use_regex=True),
        "model": _bpe(tokens, _strings(metadata, "tokenizer.ggml.merges")),
    }
    encoded = json.dumps(built, ensure_ascii=False)
    try:
        tokenizers.Tokenizer.from_str(encoded)
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise UnsupportedModel(f"GGUF tokenizer: {error}: {WAY_OUT}") from None
    template = metadata.get("tokenizer.chat_template")
    return TextFiles(
        tokenizer=encoded.encode(),
        chat_template=template.encode() if isinstance(template, str) else None,
        generation_config=_generation_config(metadata, tokens, types),
    )


def _pre_tokenizer(name: object) -> dict[str, Any]:
    """Source: llama.cpp's src/llama-vocab.cpp, the regular expressions of each pre-tokenizer."""
    match name:
        case "gpt-2":
            return _byte_level(use_regex=True)
        case "smollm":
            digits = {"type": "Digits", "individual_digits": True}
            return _sequence(digits, _byte_level(use_regex=True))
        case "qwen2":
            split = {
                "type": "Split",
                "pattern": {"Regex": _QWEN2_PATTERN},
                "behavior": "Isolated",
                "invert": False,
            }
            return _sequence(split, _byte_level(use_regex=False))
        case _:
            raise UnsupportedModel(
                f"GGUF pre-tokenizer {name!r} is none of gpt-2, smollm, qwen2: {WAY_OUT}"
            )


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **options}


def _bpe(tokens: list[str], merges: list[str]) -> dict[str, Any]:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UnsupportedModel(
            f"GGUF tokenizer: a token appears twice in its vocabulary: {WAY_OUT}"
        )
    pairs: list[list[str]] = []
    for merge in merges:
        space = merge.find(" ", 1)  # as llama.cpp: a pair's first part has at least one character
        if space < 0:
            raise UnsupportedModel(f"GGUF tokenizer: merge {merge!r} is no pair: {WAY_OUT}")
        pairs.append([merge[:space], merge[space + 1 :]])
    options = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **options, **flags, "vocab": vocabulary, "merges": pairs}


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Tokens that are matched whole: control tokens only where special tokens are parsed."""
    special = (_TokenType.CONTROL, _TokenType.UNKNOWN)
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": token_id, "content": token, "special": kind in special, **options}
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (*special, _TokenType.USER_DEFINED) and token
    ]


def _post_processor(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    if not metadata.get("tokenizer.ggml.add_bos_token", False):
        return None
    bos_id = _token_id(metadata, "bos", len(tokens))
    if bos_id is None:
        raise UnsupportedModel(f"GGUF tokenizer: add_bos_token without bos_token_id: {WAY_OUT}")
    bos = tokens[bos_id]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": which, "type_id": 0}} for which in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [start, text[0]],
        "pair": [start, *text],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _generation_config(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    ends = [_token_id(metadata, key, len(tokens)) for key in ("eos", "eot", "eom")]
    named = (token_id for token_id, token in enumerate(tokens) if token in _END_TOKENS)
    ends += (token_id for token_id in named if types[token_id] == _TokenType.CONTROL)
    config: dict[str, Any] = {
        # The metadata's own end first: templates call it eos_token.
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))
    }
    for key, name in (("bos", "bos"), ("padding", "pad"), ("unknown", "unk")):
        if (token_id := _token_id(metadata, key, len(tokens))) is not None:
            config[f"{name}_token_id"] = token_id
    return config


def _token_id(metadata: Mapping[str, Any], key: str, num_tokens: int) -> int | None:
    name = f"tokenizer.ggml.{key}_token_id"
    value = metadata.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise UnsupportedModel(f"GGUF metadata: {name} = {value!r}: must be in 0..{num_tokens - 1}")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UnsupportedModel(f"GGUF metadata: {key} must be a list of strings: {WAY_OUT}")
    return value


def _token_types(metadata: Mapping[str, Any], num_tokens: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type", [int(_TokenType.NORMAL)] * num_tokens)
    if not isinstance(types, list) or len(types) != num_tokens:
        raise UnsupportedModel(
            f"GGUF metadata: tokenizer.ggml.token_type must have {num_tokens} entries: {WAY_OUT}"
        )
    return types
