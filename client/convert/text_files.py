"""The text files of an artifact, from a Hugging Face folder: tokenizer, template, generation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.convert.source import TextFiles
from shoal.artifact.canonical import MalformedJson, canonical_json, parse_object
from shoal.errors import CorruptArtifact, UsageError

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_text_files(folder: Path, config: Mapping[str, Any], model: Path) -> TextFiles:
    """Read them from `folder`; token ids also from the model's config and generation config.

    Raises:
        UsageError: `folder` is not there; CorruptArtifact: a malformed file, named.
    """
    if not folder.is_dir():
        raise UsageError(f"--tokenizer {folder}: no such folder")
    generation = _optional_json(model / "generation_config.json")
    if folder != model:
        generation |= _optional_json(folder / "generation_config.json")
    return TextFiles(
        tokenizer=_tokenizer(folder / "tokenizer.json"),
        chat_template=_chat_template(folder),
        generation_config=merge_token_ids(generation, config),
        missing_why=f"{folder} has no tokenizer.json",
    )


def merge_token_ids(generation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation config, with the token ids that only config.json has."""
    merged = dict(generation)
    nested = config.get("text_config")
    for key in _TOKEN_IDS:
        value = config.get(key)
        if value is None and isinstance(nested, Mapping):
            value = nested.get(key)
        if merged.get(key) is None and value is not None:
            merged[key] = value
    return merged


def encode_generation_config(value: Mapping[str, Any]) -> bytes:
    """Return the bytes of generation_config.json: the same for the same values."""
    return canonical_json(value) + b"\n"


def _tokenizer(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    data = path.read_bytes()
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError:
        raise CorruptArtifact(f"{path} is not UTF-8 text") from None
    except ValueError as error:
        raise CorruptArtifact(f"{path}: not a tokenizer: {error}") from None
    if not isinstance(value, dict) or "model" not in value:
        raise CorruptArtifact(f"{path}: not a tokenizer: it has no field 'model'")
    return data


def _chat_template(folder: Path) -> bytes | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_bytes()
    template = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {
            item.get("name"): item.get("template") for item in template if isinstance(item, dict)
        }
        template = named.get("default")
    return template.encode() if isinstance(template, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return parse_object(path.read_bytes())
    except MalformedJson as error:
        raise CorruptArtifact(f"{path}: not a JSON object: {error}") from None
