"""Safetensors headers: ours are the library's, and a malformed one is a CorruptArtifact by name."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.artifact.safetensors_header import (
    PREFIX_BYTES,
    TensorInfo,
    build_header,
    header_bytes,
    parse_header,
)
from shoal.errors import CorruptArtifact


def read(data: bytes) -> tuple[TensorInfo, ...]:
    size = header_bytes(data[:PREFIX_BYTES], len(data), "f")
    return parse_header(data[:size], len(data), "f")


def file_of(header: Any, body: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: str = "F32", shape: Any = (4,), begin: int = 0, end: int = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_built_header_ends_on_a_page_and_reads_back() -> None:
    header = build_header([("a", "U8", (100,), 100), ("b", "F32", (3,), 12)], 4096)
    assert len(header) == 4096
    a, b = read(header + bytes(112))
    assert (a.name, a.dtype, a.shape, a.offset, a.num_bytes) == ("a", "U8", (100,), 4096, 100)
    assert (b.name, b.dtype, b.shape, b.offset, b.num_bytes) == ("b", "F32", (3,), 4196, 12)


def test_the_safetensors_library_reads_what_we_build(tmp_path: Path) -> None:
    values = np.arange(3, dtype=np.float32)
    header = build_header([("a", "U8", (64,), 64), ("b", "F32", (3,), 12)], 4096)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(range(64)) + values.tobytes())
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == {"a", "b"}
        np.testing.assert_array_equal(file.get_tensor("a"), np.arange(64, dtype=np.uint8))
        np.testing.assert_array_equal(file.get_tensor("b"), values)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "header beyond the file": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "header of a terabyte": ((1 << 40).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header that is no JSON": (file_of(b"{x"), "not a safetensors header"),
    "header that is a list": (file_of([]), "not an object"),
    "a name twice": (file_of(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}'), "twice"),
    "metadata that is no text": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry that is no object": (file_of({"a": 7}), "'a'"),
    "unknown dtype": (file_of({"a": entry("F31")}), "dtype"),
    "negative extent": (file_of({"a": entry(shape=(-4,))}), "shape"),
    "extent that is text": (file_of({"a": entry(shape=("4",))}), "shape"),
    "nine dimensions": (file_of({"a": entry(shape=(1,) * 9)}), "shape"),
    "missing offsets": (file_of({"a": {"dtype": "F32", "shape": [4]}}), "data_offsets"),
    "unknown field": (file_of({"a": entry() | {"x": 1}}), "'x'"),
    "offsets that do not fit the shape": (file_of({"a": entry(end=12)}), "do not fit"),
    "reversed offsets": (file_of({"a": entry(begin=16, end=0)}), "do not fit"),
    "one offset": (file_of({"a": entry() | {"data_offsets": [0]}}), "do not fit"),
    "hole before a tensor": (file_of({"a": entry(begin=4, end=20)}, bytes(20)), "hole"),
    "overlap": (file_of({"a": entry(), "b": entry(begin=8, end=24)}, bytes(24)), "overlap"),
    "truncated data": (file_of({"a": entry()}, bytes(15)), "truncated"),
    "bytes after the last tensor": (file_of({"a": entry()}, bytes(17)), "after the last"),
    "sizes beyond 64 bits": (file_of({"a": entry(shape=(2**62,) * 8)}), "do not fit"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_each_way_of_being_malformed_is_refused_by_name(name: str) -> None:
    data, said = MALFORMED[name]
    with pytest.raises(CorruptArtifact) as caught:
        read(data)
    assert said in str(caught.value), str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_without_another_error(data: bytes) -> None:
    with contextlib.suppress(CorruptArtifact):
        read(data)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F4", "U8", "X"]) | st.integers(),
                "shape": st.lists(st.integers(-1, 2**70) | st.booleans(), max_size=9),
                "data_offsets": st.lists(st.integers(-1, 2**70), max_size=3),
            }
        ),
        max_size=3,
    )
)
def test_any_header_of_the_right_form_is_read_or_refused(header: dict[str, Any]) -> None:
    try:
        tensors = read(file_of(header))
    except CorruptArtifact:
        return
    assert sum(tensor.num_bytes for tensor in tensors) == 16
