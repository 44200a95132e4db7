"""The header of a safetensors file: build ours, read anybody's strictly (core).

    8 bytes   n, little-endian unsigned: bytes of the header text
    n bytes   JSON object: name -> {"dtype", "shape", "data_offsets": [begin, end]}, spaces after it
    the rest  the tensors, without holes, offsets counted from here

Source: the safetensors README, https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.artifact.canonical import MalformedJson, parse_object
from shoal.artifact.fields import Fields
from shoal.errors import CorruptArtifact
from shoal.limits import MAX_SAFETENSORS_HEADER_BYTES
from shoal.quant import round_up

PREFIX_BYTES = 8
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 8

_ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_DTYPES = {name: (name, bits) for name, bits in _ITEM_BITS.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...], int]], page: int) -> bytes:
    """Return prefix and header for (name, dtype, shape, num_bytes) in file order.

    Spaces pad it so that the first tensor starts at a multiple of `page`.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "shoal"}}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = round_up(PREFIX_BYTES + len(text), page) - PREFIX_BYTES
    assert length <= MAX_SAFETENSORS_HEADER_BYTES, "too many tensors for one file"
    return length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)


def header_bytes(prefix: bytes, file_bytes: int, where: str) -> int:
    """Return the bytes of prefix and header, from the first 8 bytes of a file of that size."""
    if len(prefix) < PREFIX_BYTES:
        raise CorruptArtifact(f"{where}: {file_bytes} bytes: too short for a safetensors file")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_SAFETENSORS_HEADER_BYTES:
        raise CorruptArtifact(
            f"{where}: a header of {length} bytes, more than {MAX_SAFETENSORS_HEADER_BYTES}:"
            " not a safetensors file"
        )
    if PREFIX_BYTES + length > file_bytes:
        raise CorruptArtifact(
            f"{where}: truncated: a header of {length} bytes in a file of {file_bytes}"
        )
    return PREFIX_BYTES + length


def parse_header(header: bytes, file_bytes: int, where: str) -> tuple[TensorInfo, ...]:
    """Read the tensors of a file, in the order of their bytes.

    Args:
        header: prefix and header text, `header_bytes` long.
        file_bytes: size of the whole file.

    Raises:
        CorruptArtifact: anything that the format does not allow; names the file and the tensor.
    """
    try:
        entries = parse_object(header[PREFIX_BYTES:])
    except MalformedJson as error:
        raise CorruptArtifact(f"{where}: not a safetensors header: {error}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptArtifact(f"{where}: __metadata__ must map names to text")
    if len(entries) > MAX_TENSORS:
        raise CorruptArtifact(f"{where}: {len(entries)} tensors, more than {MAX_TENSORS}")
    tensors = [_tensor(name, entry, len(header), where) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    end = len(header)
    for tensor in tensors:
        if tensor.offset != end:
            raise CorruptArtifact(f"{where}: tensor {tensor.name!r}: a hole or overlap before it")
        end += tensor.num_bytes
    if end != file_bytes:
        problem = "truncated" if end > file_bytes else "bytes after the last tensor"
        raise CorruptArtifact(f"{where}: {problem}: {file_bytes} bytes, the header says {end}")
    return tuple(tensors)


def _tensor(name: str, entry: object, data_start: int, where: str) -> TensorInfo:
    fields = Fields(entry, f"{where}: tensor {name!r}")
    dtype, bits = fields.choice("dtype", _DTYPES)
    shape = tuple(_extent(*item) for item in fields.items("shape", MAX_DIMENSIONS))
    offsets = [_extent(*item) for item in fields.items("data_offsets", 2)]
    fields.done()
    for extent in shape:
        bits *= extent
    if len(offsets) != 2 or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise CorruptArtifact(
            f"{where}: tensor {name!r}: data_offsets {offsets} do not fit {dtype} {list(shape)}"
        )
    return TensorInfo(name, dtype, shape, data_start + offsets[0], bits // 8)


def _extent(value: object, where: str) -> int:
    return Fields({"value": value}, where).integer("value", 0, 2**62)
