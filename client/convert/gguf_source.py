"""A GGUF file: the `gguf` library parses it, we view its tensors where they lie in the file."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from client.convert.gguf_tokenizer import gguf_text_files
from client.convert.source import F32, U8, Naming, SourceTensor, TextFiles, float_rows
from client.convert.text_files import read_text_files
from shoal.errors import CorruptArtifact, UnsupportedModel
from shoal.families import Family, family_of, gguf_model
from shoal.quant import Format

_FORMATS = {
    GGMLQuantizationType[fmt.name]: fmt
    for fmt in Format
    if fmt.name in GGMLQuantizationType.__members__  # the table formats are our own
}
_ROPE_FACTORS = "rope_freqs.weight"
# What the library raises on bytes that are no GGUF file.
_MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error, EOFError)


class GgufSource:
    """An opened GGUF file. Implements `client.convert.source.Source`.

    Raises:
        UnsupportedModel: an architecture or tensor type not ours, named.
        CorruptArtifact: not a GGUF file, or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
            self._found = {tensor.name: tensor for tensor in reader.tensors}
        except _MALFORMED as error:
            raise CorruptArtifact(
                f"{path}: not a whole GGUF file ({error}); fetch it again"
            ) from None
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise UnsupportedModel(
                f"{path} is one of {self.metadata['split.count']} parts of a model: join them with"
                " llama.cpp's `llama-gguf-split --merge`"
            )
        if reader.byte_order == "S":
            raise UnsupportedModel(f"{path} is a big-endian GGUF file: shoal reads little-endian")
        self._bytes = np.memmap(path, np.uint8, mode="r")
        self._model = gguf_model(self.metadata, set(self._found), self._rope_factors())
        self.config: Mapping[str, Any] = self._model.config
        self.family: Family = family_of(self.config)
        self.naming = Naming(self._model.naming, self._model.rope_interleaved)
        self.tensors: Mapping[str, SourceTensor] = {
            name: self._tensor(found) for name, found in self._found.items()
        }

    def text_files(self, tokenizer_folder: Path | None) -> TextFiles:
        """Make the tokenizer from the metadata, or read it from the folder that replaces it."""
        if tokenizer_folder is not None:
            return read_text_files(tokenizer_folder, self._token_ids(), tokenizer_folder)
        if self.metadata.get("tokenizer.ggml.model") in ("none", "no_vocab"):  # llama.cpp's words
            return TextFiles(None, None, {}, "the GGUF file says that it has none")
        return gguf_text_files(self.metadata)

    def _token_ids(self) -> dict[str, Any]:
        names = {"bos": "bos", "eos": "eos", "pad": "padding"}
        ids = {
            ours: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for ours, key in names.items()
        }
        return {f"{ours}_token_id": value for ours, value in ids.items() if value is not None}

    def _rope_factors(self) -> list[float] | None:
        if _ROPE_FACTORS not in self._found:
            return None
        factors = self._tensor(self._found[_ROPE_FACTORS])
        return [float(value) for value in factors.dequantise(factors.matrix(None))[0]]

    def _tensor(self, found: gguf.ReaderTensor) -> SourceTensor:
        kind = GGMLQuantizationType(found.tensor_type)
        block_cols, block_bytes = GGML_QUANT_SIZES[kind]
        shape = tuple(int(extent) for extent in reversed(found.shape.tolist()))
        start, size = int(found.data_offset), int(found.n_bytes)
        if start + size > len(self._bytes):
            raise CorruptArtifact(f"{self.path}: truncated inside tensor {found.name}")
        fmt = _FORMATS.get(kind)
        row_bytes = shape[-1] // block_cols * block_bytes
        return SourceTensor(
            name=found.name,
            type_name=kind.name,
            format=fmt,
            shape=shape,
            data=np.asarray(self._bytes[start : start + size]).reshape(*shape[:-1], row_bytes),
            block_cols=block_cols,
            dequantise=_dequantiser(kind, fmt, found.name),
        )


def _dequantiser(kind: GGMLQuantizationType, fmt: Format | None, name: str) -> Any:
    if fmt is not None and fmt.is_float:
        return float_rows(fmt)

    def dequantise(rows: U8) -> F32:
        try:
            # Element by element, one IEEE operation at a time: the same bits on every CPU.
            with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the values
                values: F32 = gguf.quants.dequantize(np.ascontiguousarray(rows), kind)
        except NotImplementedError:
            raise UnsupportedModel(
                f"tensor {name} is {kind.name}, a type that nobody here can read"
            ) from None
        return values

    return dequantise
