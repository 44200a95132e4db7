"""A byte-level BPE tokenizer of a few hundred tokens, with special tokens and a chat template."""

import json
from pathlib import Path
from typing import Any

MERGES = (
    "t h|h e|th e|a n|i n|Ġ t|Ġt he|o n|e r|r e|Ġ a|Ġa n|Ġan d|Ġ s|Ġ c|Ġ o|Ġo f|i s|Ġ is|o u|a t|"
    "e n|Ġ w|a l|i t|i on|Ġ i|Ġ Ġ|ĠĠ ĠĠ|l l|e d|in g|e s"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|start|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte. Source: bytes_to_unicode() of GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable}
    character |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [character[byte] for byte in range(256)]


def _tokens() -> list[str]:
    merged = [pair.replace(" ", "") for pair in MERGES.split("|")]
    return [*SPECIAL, *byte_alphabet(), *merged]


VOCAB_SIZE = len(_tokens())
EOS_ID = SPECIAL.index("<|end|>")


def tokenizer_json() -> dict[str, Any]:
    added = [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(SPECIAL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(_tokens())},
            "merges": [pair.split(" ") for pair in MERGES.split("|")],
        },
    }


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(), ensure_ascii=False))
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|end|>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
