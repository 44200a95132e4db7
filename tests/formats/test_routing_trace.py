"""Routing traces: what was written reads back, and anything else is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import CorruptArtifact
from shoal.experts.routing_trace import (
    MAGIC,
    RoutingTrace,
    TraceSegment,
    decode_trace,
    encode_trace,
)

IDENTITY = "0f" * 32
TRACES = Path(__file__).resolve().parents[2] / "bench" / "traces"


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    num_experts = draw(st.integers(1, 70))
    top_k = draw(st.integers(1, min(num_experts, 8)))
    layers = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=4)))
    names = draw(st.lists(st.text("abcäß -", max_size=5), unique=True, max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    segments = []
    for name in names:
        tokens = draw(st.integers(0, 5))
        rows = [random.permutation(num_experts)[:top_k] for _ in range(tokens * len(layers))]
        experts = np.array(rows, np.uint16).reshape(tokens, len(layers), top_k)
        segments.append(TraceSegment(name, "kind", np.sort(experts, axis=-1)))
    return RoutingTrace(IDENTITY, num_experts, top_k, tuple(layers), tuple(segments))


def small() -> RoutingTrace:
    experts = np.array([[[0, 3]], [[1, 2]]], np.uint16)
    return RoutingTrace(IDENTITY, 4, 2, (5,), (TraceSegment("a", "fable", experts),))


@given(traces())
def test_a_trace_reads_back_as_it_was(trace: RoutingTrace) -> None:
    read = decode_trace(encode_trace(trace), "t")
    assert (read.identity, read.num_experts, read.top_k) == (
        IDENTITY,
        trace.num_experts,
        trace.top_k,
    )
    assert read.moe_layers == trace.moe_layers
    assert [(s.name, s.kind) for s in read.segments] == [(s.name, s.kind) for s in trace.segments]
    for ours, theirs in zip(read.segments, trace.segments, strict=True):
        np.testing.assert_array_equal(ours.experts, theirs.experts)
    assert encode_trace(read) == encode_trace(trace)


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(0, 7), st.integers(-1, 400))
def test_a_changed_or_cut_file_is_read_strictly_or_refused(at: int, bit: int, cut: int) -> None:
    data = bytearray(encode_trace(small()))
    data[at % len(data)] ^= 1 << bit
    damaged = bytes(data) if cut < 0 else bytes(data[:cut])
    try:
        read = decode_trace(damaged, "t.trace")
    except CorruptArtifact as error:
        assert "t.trace" in str(error)
    else:  # one letter for another in a name, one expert for another: still a trace
        assert decode_trace(encode_trace(read), "again").segments[0].experts.shape == (2, 1, 2)


@given(st.binary(max_size=200))
def test_noise_behind_the_magic_is_refused(noise: bytes) -> None:
    with pytest.raises(CorruptArtifact, match=r"t\.trace"):
        decode_trace(MAGIC + noise, "t.trace")


def with_header(**changes: Any) -> bytes:
    data = encode_trace(small())
    length = int.from_bytes(data[8:12], "little")
    header = json.loads(data[12 : 12 + length])
    header |= changes
    text = json.dumps({k: v for k, v in header.items() if v is not None}).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text + data[12 + length :]


def test_the_helper_of_these_tests_makes_valid_files() -> None:
    assert decode_trace(with_header(), "t").top_k == 2


SEGMENT = {"name": "a", "kind": "b", "tokens": 2}
MALFORMED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a routing trace"),
    "another version": (b"SHOALRT\x02" + bytes(40), "not a routing trace"),
    "header beyond the file": (MAGIC + b"\xff\0\0\0{}", "truncated"),
    "no JSON": (MAGIC + b"\x03\0\0\0{x}", "header"),
    "no identity": (with_header(identity=None), "identity"),
    "identity that is no hash": (with_header(identity="fables"), "64 hexadecimal"),
    "unknown field": (with_header(note="hello"), "unknown field"),
    "more chosen than there are": (with_header(num_experts=1), "top_k 2 of 1"),
    "an expert too large": (with_header(num_experts=3), "an expert beyond 2"),
    "no layers": (with_header(moe_layers=[]), "ascending"),
    "layers that descend": (with_header(moe_layers=[5, 4]), "ascending"),
    "a layer too deep": (with_header(moe_layers=[5000]), "layer"),
    "fewer bytes than tokens": (with_header(segments=[SEGMENT | {"tokens": 3}]), "truncated"),
    "bytes left over": (with_header(segments=[SEGMENT | {"tokens": 1}]), "after the last"),
    "a size that no machine has": (
        with_header(segments=[SEGMENT | {"tokens": 2**62}]),
        "tokens",
    ),
    "one name twice": (
        with_header(segments=[SEGMENT | {"tokens": 1}, SEGMENT | {"tokens": 1}]),
        "one name",
    ),
    "experts out of order": (encode_trace(small())[:-4] + b"\2\0\1\0", "must ascend"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_traces_are_refused_with_the_place(case: str) -> None:
    data, words = MALFORMED[case]
    with pytest.raises(CorruptArtifact, match=words) as caught:
        decode_trace(data, "t.trace")
    assert "t.trace" in str(caught.value)


def test_a_trace_that_cannot_be_is_not_made() -> None:
    rows = np.array([[[3, 0]]], np.uint16)
    with pytest.raises(ValueError, match="must ascend"):
        RoutingTrace(IDENTITY, 4, 2, (5,), (TraceSegment("a", "b", rows),))
    with pytest.raises(ValueError, match="expected uint16"):
        RoutingTrace(IDENTITY, 4, 2, (5, 6), (TraceSegment("a", "b", np.sort(rows)),))


def test_the_committed_traces_are_of_the_model_that_comes_with_shoal() -> None:
    from shoal.artifact import Artifact
    from shoal.paths import default_model

    trace = decode_trace((TRACES / "fables.trace").read_bytes(), "fables.trace")
    assert trace.identity == Artifact.open(default_model()).identity
    texts = [json.loads(line) for line in (TRACES / "texts.jsonl").read_text().splitlines()]
    assert [(s.name, s.kind) for s in trace.segments] == [(t["name"], t["kind"]) for t in texts]
    assert {s.kind for s in trace.segments} >= {"fable", "chat", "recipe", "code", "english"}
