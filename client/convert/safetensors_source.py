"""A Hugging Face folder: config.json, safetensors (one file, or shards and an index), tokenizer."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from client.convert.source import Naming, SourceTensor, TextFiles, as_rows, float_rows
from client.convert.text_files import read_text_files
from shoal.artifact.canonical import MalformedJson, parse_object
from shoal.artifact.safetensors_header import (
    PREFIX_BYTES,
    TensorInfo,
    header_bytes,
    parse_header,
)
from shoal.errors import CorruptArtifact, UnsupportedModel
from shoal.families import Family, family_of
from shoal.quant import Format

_FORMATS = {"F32": Format.F32, "F16": Format.F16, "BF16": Format.BF16}
_INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """An opened folder. Implements `client.convert.source.Source`.

    Raises:
        UnsupportedModel: no config.json or safetensors, a family or a tensor type not ours.
        CorruptArtifact: a malformed or truncated file, named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.family: Family = family_of(self.config)
        self.naming = Naming()
        self.tensors = self._open_tensors()

    def _open_tensors(self) -> Mapping[str, SourceTensor]:
        found: dict[str, SourceTensor] = {}
        for file in self._files():
            for tensor in _open_file(file):
                if tensor.name in found:
                    raise CorruptArtifact(f"{file}: tensor {tensor.name} is in another file too")
                found[tensor.name] = tensor
        self._check_index(found)
        return found

    def text_files(self, tokenizer_folder: Path | None) -> TextFiles:
        """Read the tokenizer, the template and the generation defaults."""
        return read_text_files(tokenizer_folder or self.path, self.config, self.path)

    def _files(self) -> list[Path]:
        if (self.path / _INDEX).is_file():
            return [self.path / name for name in sorted(set(self._weight_map().values()))]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            others = sorted(p.name for p in self.path.glob("*.bin"))
            hint = f" ({others[0]} is a pickle, which shoal does not run)" if others else ""
            raise UnsupportedModel(f"{self.path} has no .safetensors file{hint}")
        if len(files) > 1:
            raise CorruptArtifact(f"{self.path} has {len(files)} safetensors files and no {_INDEX}")
        return files

    def _weight_map(self) -> dict[str, str]:
        index = self.path / _INDEX
        entries = read_json(index).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise CorruptArtifact(f"{index}: weight_map must map tensor names to files")
        for name, file in entries.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CorruptArtifact(
                    f"{index}: weight_map: {name!r} is in {file!r}: not a file name"
                )
        return entries

    def _check_index(self, found: Mapping[str, SourceTensor]) -> None:
        if (self.path / _INDEX).is_file():
            absent = sorted(set(self._weight_map()) - set(found))
            if absent:
                raise CorruptArtifact(
                    f"{self.path / _INDEX} lists {len(absent)} tensors that no file has:"
                    f" {', '.join(absent[:4])}"
                )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UnsupportedModel (no such file) or CorruptArtifact, naming it."""
    try:
        return parse_object(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UnsupportedModel(f"{path} is missing: not a Hugging Face model folder") from None
    except MalformedJson as error:
        raise CorruptArtifact(f"{path}: not a JSON object: {error}") from None


def _open_file(path: Path) -> list[SourceTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(PREFIX_BYTES)
            header = prefix + file.read(header_bytes(prefix, size, str(path)) - len(prefix))
    except FileNotFoundError:
        raise CorruptArtifact(f"{path} is missing") from None
    infos = parse_header(header, size, str(path))
    mapped = np.memmap(path, np.uint8, mode="r")
    return [_tensor(path, info, mapped) for info in infos]


def _tensor(
    path: Path, info: TensorInfo, mapped: np.memmap[Any, np.dtype[np.uint8]]
) -> SourceTensor:
    fmt = _FORMATS.get(info.dtype)
    if fmt is None:
        raise UnsupportedModel(
            f"{path}: tensor {info.name} is {info.dtype}: shoal reads F32, F16 and BF16 safetensors"
        )
    if not 1 <= len(info.shape) <= 3 or math.prod(info.shape) == 0:
        raise UnsupportedModel(f"{path}: tensor {info.name} has shape {list(info.shape)}")
    data = np.asarray(mapped[info.offset : info.offset + info.num_bytes])
    return SourceTensor(
        name=info.name,
        type_name=info.dtype,
        format=fmt,
        shape=info.shape,
        data=as_rows(fmt, info.shape, data),
        block_cols=1,
        dequantise=float_rows(fmt),
    )
