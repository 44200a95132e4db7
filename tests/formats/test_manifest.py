"""The manifest: what one says is what it reads back, and any other bytes are refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.artifact import (
    DenseTensor,
    ExpertLayer,
    Manifest,
    TextFile,
    Weights,
    decode_manifest,
    dense_slots,
    encode_manifest,
)
from shoal.artifact.canonical import canonical_json, digest
from shoal.artifact.inventory import Kind
from shoal.artifact.layout import manifest_dense_header, manifest_expert_header
from shoal.artifact.manifest import slot_bytes
from shoal.errors import ArtifactError, CorruptArtifact, UnsupportedModel
from shoal.model_spec import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    QkNorm,
    RouterKind,
    RouterSpec,
)
from shoal.quant import Format

Change = Callable[[dict[str, Any]], object]


def make_spec(*, num_layers: int = 3, tie: bool = False) -> ModelSpec:
    router = RouterSpec(RouterKind.SOFTMAX, num_experts=4, experts_per_token=2, renormalise=True)
    layers = tuple(
        LayerSpec(
            window=7 if i % 2 else None,
            router=None if i == 1 else router,
            ffn_dim=40 + 24 * (i == 1),
        )
        for i in range(num_layers)
    )
    attention = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        qk_norm=QkNorm.HEAD,
        qkv_bias=True,
        clip_qkv=None,
        scale=0.35355339059327373,
    )
    return ModelSpec("mixtral", 32, 100, 1e-5, 8, 1.0, 512, tie, attention, layers)


def make_manifest(spec: ModelSpec | None = None) -> Manifest:
    """A manifest whose hashes stand for no bytes."""
    spec = spec or make_spec()
    dense: list[DenseTensor] = []
    offset = 4096
    for slot in dense_slots(spec):
        fmt = Format.F32 if slot.always_f32 else Format.Q8_0
        down = Format.Q4_0 if slot.kind is Kind.FFN else None
        dense.append(DenseTensor(slot, fmt, down, offset, digest(slot.name.encode())))
        offset += slot_bytes(slot, fmt, down)
    experts = tuple(
        ExpertLayer(
            layer=index,
            weights=Weights(spec.model_dim, layer.ffn_dim, Format.Q4_0, Format.Q8_0),
            grid=17,
            blake3=tuple(digest(f"{index}.{e}".encode()) for e in range(layer.router.num_experts)),
            present=((0, layer.router.num_experts - 1),),
            offset=4096,
        )
        for index, layer in enumerate(spec.layers)
        if layer.router is not None
    )
    files = (TextFile("tokenizer.json", 12, digest(b"tokenizer"), True),)
    return Manifest(spec, "source", ("a note",), tuple(dense), True, experts, files)


def reseal(value: dict[str, Any]) -> bytes:
    """Write a changed manifest the way that a careful forger would: with its own hash renewed."""
    value.pop("manifest_blake3", None)
    value["manifest_blake3"] = digest(canonical_json(value))
    return canonical_json(value)


def changed(change: Change) -> bytes:
    value = json.loads(encode_manifest(make_manifest()))
    change(value)
    return reseal(value)


def test_a_manifest_reads_back_as_it_was_written() -> None:
    manifest = make_manifest()
    data = encode_manifest(manifest)
    assert decode_manifest(data, "m") == manifest
    assert encode_manifest(decode_manifest(data, "m")) == data


def test_the_identity_of_a_known_manifest_never_changes() -> None:
    # A new value here is a new format version: every artifact in the world would be refused.
    assert make_manifest().identity == GOLDEN_IDENTITY


GOLDEN_IDENTITY = "391655ae9178e097118901b21e1baa6ea8a709fa3be47acaea306f1dbc560eff"


def test_slice_fields_and_provenance_do_not_enter_the_identity() -> None:
    whole = make_manifest()
    part = replace(
        whole,
        source="elsewhere",
        notes=(),
        has_dense=False,
        experts=tuple(replace(layer, present=(), offset=0) for layer in whole.experts),
        files=tuple(replace(file, present=False) for file in whole.files),
    )
    assert part.identity == whole.identity
    assert not part.is_whole and whole.is_whole


@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace(m, spec=replace(m.spec, norm_eps=2e-5)),
        lambda m: replace(m, experts=(replace(m.experts[0], grid=18), *m.experts[1:])),
        lambda m: replace(m, dense=(replace(m.dense[0], blake3=digest(b"other")), *m.dense[1:])),
        lambda m: replace(m, files=(replace(m.files[0], blake3=digest(b"other")),)),
    ],
)
def test_whatever_changes_the_computed_function_changes_the_identity(
    change: Callable[[Manifest], Manifest],
) -> None:
    assert change(make_manifest()).identity != make_manifest().identity


def _drop(*path: Any) -> Change:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return change


def _put(new: Any, *path: Any) -> Change:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = new

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "another format": (_put("gguf", "format"), "no artifact"),
    "no version": (_drop("format_version"), "format_version"),
    "version as text": (_put("1", "format_version"), "format_version"),
    "missing field": (_drop("dense"), "'dense' is missing"),
    "unknown field": (_put(1, "surplus"), "'surplus'"),
    "short hash": (_put("ab", "identity"), "identity"),
    "upper-case hash": (_put("A" * 64, "dense", 0, "blake3"), "dense[0].blake3"),
    "another identity": (_put("0" * 64, "identity"), "another identity"),
    "another quantisation": (_put("f32", "quantisation"), "quantisation"),
    "spec without layers": (_put([], "spec", "layers"), "spec.layers"),
    "spec with a real for an integer": (_put(32.0, "spec", "model_dim"), "spec.model_dim"),
    "spec with true for an integer": (_put(True, "spec", "model_dim"), "spec.model_dim"),
    "spec beyond a limit": (_put(10**9, "spec", "model_dim"), "spec.model_dim"),
    "spec of an unknown router": (
        _put("magic", "spec", "layers", 0, "router", "kind"),
        "router.kind",
    ),
    "more experts a token than experts": (
        _put(5, "spec", "layers", 0, "router", "experts_per_token"),
        "experts_per_token",
    ),
    "heads that do not divide": (_put(3, "spec", "attention", "num_kv_heads"), "num_kv_heads"),
    "rotary dim beyond the head": (_put(10, "spec", "rotary_dim"), "rotary_dim"),
    "missing tensor": (lambda v: v["dense"].pop(), "is missing"),
    "surplus tensor": (lambda v: v["dense"].append(v["dense"][0]), "expected nothing"),
    "tensors out of order": (lambda v: v["dense"].reverse(), "dense[0].name"),
    "unknown tensor format": (_put("q2_k", "dense", 0, "format"), "dense[0].format"),
    "wrong scheme": (_put("f32", "dense", 0, "scheme"), "dense[0].scheme"),
    "wrong shape": (_put([1, 2], "dense", 0, "shape"), "dense[0].shape"),
    "wrong size": (_put(64, "dense", 0, "bytes"), "dense[0].bytes"),
    "another file": (_put("../etc/passwd", "dense", 0, "file"), "dense[0].file"),
    "tensor off the page": (_put(4100, "dense", 0, "offset"), "dense[0].offset"),
    "hole between tensors": (_put(8192, "dense", 1, "offset"), "dense[1].offset"),
    "a matrix with a down format": (_put("f32", "dense", 0, "down_format"), "down_format"),
    "a layer's experts missing": (lambda v: v["experts"].pop(), "experts"),
    "experts of a dense layer": (_put(1, "experts", 0, "layer"), "no experts"),
    "an expert hash missing": (lambda v: v["experts"][0]["blake3"].pop(), "3 hashes for 4"),
    "grid beyond float32": (_put(200, "experts", 0, "grid"), "experts[0].grid"),
    "reversed range": (_put([[2, 1]], "experts", 0, "present"), "present[0]"),
    "overlapping ranges": (_put([[0, 1], [1, 3]], "experts", 0, "present"), "present[1]"),
    "touching ranges": (_put([[0, 1], [2, 3]], "experts", 0, "present"), "present[1]"),
    "range beyond the experts": (_put([[0, 4]], "experts", 0, "present"), "present[0]"),
    "offset without experts": (_put([], "experts", 0, "present"), "experts[0].offset"),
    "expert off the page": (_put(4097, "experts", 0, "offset"), "experts[0].offset"),
    "path outside the folder": (_put("/etc/passwd", "experts", 0, "file"), "experts[0].file"),
    "unknown text file": (_put("../x", "files", 0, "name"), "files[0].name"),
    "text file twice": (lambda v: v["files"].append(v["files"][0]), "twice"),
    "note with a line break": (_put(["a\nb"], "notes"), "notes[0]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_way_of_being_wrong_is_refused_by_field(name: str) -> None:
    change, said = WRONG[name]
    with pytest.raises(CorruptArtifact) as caught:
        decode_manifest(changed(change), "m")
    assert said in str(caught.value), str(caught.value)


def test_a_router_that_is_not_f32_is_refused() -> None:
    value = json.loads(encode_manifest(make_manifest()))
    router = next(entry for entry in value["dense"] if entry["name"].endswith("router"))
    router["format"] = "q8_0"
    with pytest.raises(CorruptArtifact, match="always f32"):
        decode_manifest(reseal(value), "m")


def test_another_format_version_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModel, match=r"format version 2.*convert the model again"):
        decode_manifest(changed(_put(2, "format_version")), "m")


def test_a_changed_note_is_found_by_the_manifests_own_hash() -> None:
    data = encode_manifest(make_manifest())
    with pytest.raises(CorruptArtifact, match="changed after it was written"):
        decode_manifest(data.replace(b"a note", b"b note"), "m")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format":"shoal","format":"shoal"}',
        b'{"format":NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format":"shoal","format_version":' + b"1" * 5000 + b"}",
        b'{"format":"shoal","format_version":1,"spec":"\\ud800"}',
    ],
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        decode_manifest(data, "m")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_is_refused(data: st.DataObject) -> None:
    raw = bytearray(encode_manifest(make_manifest()))
    bit = data.draw(st.integers(0, 8 * (len(raw) - 1) - 1))  # the newline may become a space
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ArtifactError):
        decode_manifest(bytes(raw), "m")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_in_any_field_is_read_or_refused_but_nothing_else(data: st.DataObject) -> None:
    value = json.loads(encode_manifest(make_manifest()))
    place: Any = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    try:
        decoded = decode_manifest(json.dumps(value).encode(), "m")
    except ArtifactError:
        return
    assert decoded == make_manifest()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_refused_without_another_error(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        decode_manifest(data, "m")


def test_headers_follow_from_the_manifest_and_end_on_a_page() -> None:
    manifest = make_manifest()
    assert len(manifest_dense_header(manifest)) % 4096 == 0
    for layer in manifest.experts:
        assert len(manifest_expert_header(layer)) % 4096 == 0
        assert layer.expert_bytes % 4096 == 0
