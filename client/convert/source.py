"""Sources of convert: what a checkpoint must be able to say about itself and its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UnsupportedModel
from shoal.families import Family
from shoal.families.plan import canonical_name
from shoal.quant import Format, row_bytes

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a checkpoint, mapped from its file: looking at it costs no anonymous memory.

    name: the checkpoint's own.
    type_name: its type as the checkpoint calls it, for messages: BF16, Q6_K.
    format: ours, or None where we cannot keep the type (only `dequantise` can read it then).
    shape: in torch order, [out, in] for a matrix, [E, out, in] for fused experts, [n] for a vector.
    data: [..., rows, row bytes] uint8, row-major blocks or little-endian numbers, read-only.
    """

    name: str
    type_name: str
    format: Format | None
    shape: tuple[int, ...]
    data: U8
    block_cols: int  # columns that share a scale
    dequantise: Callable[[U8], F32]  # [n, row bytes] of whole blocks -> [n, cols]

    def matrix(self, index: int | None) -> U8:
        """Return [rows, row bytes]; a vector is one row."""
        data = self.data if index is None else self.data[index]
        return data.reshape(1, -1) if len(self.shape) == 1 else data

    def require_format(self, name: str) -> Format:
        """Return our format of it. Raises UnsupportedModel naming tensor and type."""
        if self.format is None:
            raise UnsupportedModel(
                f"tensor {self.name} ({name}) is {self.type_name}, a type that shoal has no kernels"
                " for: name another with --quant (q8_0 keeps the most), or use another file"
            )
        return self.format


@dataclass(frozen=True, slots=True)
class TextFiles:
    """tokenizer.json, chat_template.jinja and generation_config.json; None: not there."""

    tokenizer: bytes | None
    chat_template: bytes | None
    generation_config: dict[str, Any]
    missing_why: str = "the checkpoint has no tokenizer.json"  # told when `tokenizer` is None


class Source(Protocol):
    """An opened checkpoint."""

    @property
    def path(self) -> Path: ...
    @property
    def family(self) -> Family: ...
    @property
    def config(self) -> Mapping[str, Any]:
        """What config.json says."""
        ...

    @property
    def naming(self) -> "Naming": ...
    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...
    def text_files(self, tokenizer_folder: Path | None) -> TextFiles:
        """Read or make the text files; `tokenizer_folder` replaces the checkpoint's own."""
        ...


@dataclass(frozen=True, slots=True)
class Naming:
    """How a checkpoint's tensor names and row orders relate to Hugging Face's."""

    to_huggingface: Callable[[str], str] = field(default=canonical_name)
    rope_interleaved: bool = False


def float_rows(fmt: Format) -> Callable[[U8], F32]:
    """Return the exact widening of rows in a float format to float32."""

    def widen(rows: U8) -> F32:
        match fmt:
            case Format.F32:
                return rows.view("<f4").astype(np.float32, copy=False)
            case Format.F16:
                return rows.view("<f2").astype(np.float32)
            case _:
                return (rows.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)

    assert fmt.is_float
    return widen


def as_rows(fmt: Format, shape: tuple[int, ...], data: U8) -> U8:
    """Return flat bytes as [..., rows, row bytes]."""
    cols = shape[-1]
    return data.reshape(*shape[:-1], row_bytes(fmt, cols))
