"""The --moe-shards grammar: what it takes, what it prints, and where its errors point."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import limits, shard_map
from shoal.errors import ShardMapError
from shoal.model_spec import AttentionSpec, LayerSpec, ModelSpec, QkNorm, RouterKind, RouterSpec
from shoal.shard_map import Endpoint, EndpointKind, ShardEntry, ShardMap, Span


def model(
    num_layers: int = 4, num_experts: int = 8, dense_layers: tuple[int, ...] = ()
) -> ModelSpec:
    router = RouterSpec(RouterKind.SOFTMAX, num_experts, 2, True)
    return ModelSpec(
        family="test",
        model_dim=32,
        vocab_size=16,
        norm_eps=1e-6,
        rotary_dim=8,
        rope_attention_factor=1.0,
        max_context=64,
        tie_embeddings=True,
        attention=AttentionSpec(4, 2, 8, QkNorm.NONE, False, None, 0.35),
        layers=tuple(
            LayerSpec(None, None if layer in dense_layers else router, 16)
            for layer in range(num_layers)
        ),
    )


def message(text: str, spec: ModelSpec | None = None) -> str:
    with pytest.raises(ShardMapError) as caught:
        parsed = shard_map.parse(text)
        shard_map.entry_of_expert(parsed, spec or model())
    return str(caught.value)


def pointed_at(text: str, error: str) -> str:
    """Return what the caret points at, up to the end of the text."""
    _, line, caret = error.splitlines()
    assert caret.strip() == "^"
    at = len(caret) - 1
    assert line[at:] in text + "..." or line[at:].removesuffix("...") in text, (line, caret)
    return line[at:]


def test_the_issue_s_example_parses() -> None:
    parsed = shard_map.parse("0-63=grpc://a:50051,64-127=grpc://b:50051")
    assert parsed.entries == (
        ShardEntry((Span(0, 63),), (), (Endpoint(EndpointKind.GRPC, "a:50051"),)),
        ShardEntry((Span(64, 127),), (), (Endpoint(EndpointKind.GRPC, "b:50051"),)),
    )


def test_every_form_of_the_grammar_parses_and_prints_canonically() -> None:
    text = (
        " 0-3 + 6 @ 0-1 + 3 = unix:///run/a b.sock , 4-5=grpc://[::1]:1|local,"
        "7-7=ray://pool,8=grpcs://h.example:65535"
    )
    assert str(shard_map.parse(text)) == (
        "0-3+6@0-1+3=unix:///run/a b.sock,4-5=grpc://[::1]:1|local,7=ray://pool,8=grpcs://h.example:65535"
    )


@pytest.mark.parametrize(
    ("text", "what", "at"),
    [
        ("", "found the end", ""),
        ("x=local", "a number of an expert, found 'x'", "x=local"),
        ("0-7", "'+', '@', '=' or '-', found the end", ""),
        ("0-=local", "a number of an expert, found '='", "=local"),
        ("0-7@=local", "a number of a layer, found '='", "=local"),
        ("0-7@1", "'+', '=' or '-', found the end", ""),
        ("7-0=local", "experts 7-0 are reversed: write 0-7", "7-0=local"),
        ("0-7@3-1=local", "layers 3-1 are reversed: write 1-3", "3-1=local"),
        ("0-99999=local", "expert 99999 is out of range: at most 4095", "99999=local"),
        ("0-7=", "expected an endpoint", ""),
        ("0-7=http://a:1", "expected an endpoint", "http://a:1"),
        ("0-7=grpc://a", "expected host:port", "a"),
        ("0-7=grpc://a:", "port in 1..65535", ""),
        ("0-7=grpc://a:70000", "port in 1..65535", "70000"),
        ("0-7=grpc://:5", "expected host:port", ":5"),
        ("0-7=unix://relative", "absolute path", "relative"),
        ("0-7=unix:///" + "p" * 120, "at most 103 bytes", "/" + "p" * 58 + "..."),
        ("0-7=ray://", "expected a namespace", ""),
        ("0-7=local|local", "local is listed twice", "local"),
        ("0-7=local,", "a number of an expert, found the end", ""),
        ("0-7=local extra", "expected an endpoint", "local extra"),
        (
            "0-3=local,4-8=local",
            "experts 4-8 are out of range: this model has experts 0-7",
            "4-8=local",
        ),
        ("0-7@0-4=local", "layers 0-4 are out of range: this model has layers 0-3", "0-4=local"),
        ("0-7=ray://pool", "Ray endpoints are not there yet", "ray://pool"),
        ("0-7=grpc://a:1|local", "`local` is no replica", "local"),
        ("0-3=local,4-7=local|grpc://a:1", "`local` is no replica", "local|grpc://a:1"),
        ("0-7=grpc://a:1|", "expected an endpoint", ""),
        ("0-7=grpc://a:1||grpc://b:1", "expected an endpoint", "|grpc://b:1"),
        ("0-7=grpc://a:1|grpc://a:1", "grpc://a:1 is listed twice", "grpc://a:1"),
        (
            "0-5=grpc://a:1,4-7@1=local",
            "experts 4-5 of layer 1 already belong to '0-5=grpc://a:1'",
            "4-7@1=local",
        ),
        ("0-5+5-7=local", "expert 5 of layers 0-3 already belong", "5-7=local"),
    ],
)
def test_an_error_says_what_and_points_at_the_character(text: str, what: str, at: str) -> None:
    error = message(text)
    assert what in error
    assert pointed_at(text, error) == at


def test_the_caret_of_a_long_map_stays_on_the_line() -> None:
    text = ",".join(f"{n}=grpc://node-{n}:50051" for n in range(100)) + ",oops=local"
    error = message(text)
    assert pointed_at(text, error) == "oops=local"
    assert max(map(len, error.splitlines()[1:])) <= 80


@pytest.mark.parametrize(
    ("text", "gap"),
    [
        ("0-5=local", "no endpoint for experts 6-7 of layers 0-3:"),
        ("0-7@0-2=local", "no endpoint for experts 0-7 of layer 3:"),
        ("0-2+4-7=local", "no endpoint for expert 3 of layers 0-3:"),
        (
            "0-7@1=local,0-3@0+2-3=local",
            "no endpoint for experts 4-7 of layers 0+2-3:",
        ),
        (
            "0-6@0-2=local,1-7@3=local",
            "no endpoint for expert 7 of layers 0-2; expert 0 of layer 3:",
        ),
    ],
)
def test_a_gap_names_the_missing_experts_and_layers(text: str, gap: str) -> None:
    assert gap in message(text)


def test_dense_layers_need_no_owner_and_may_be_covered() -> None:
    spec = model(dense_layers=(0, 2))
    for text in ("0-7@1+3=local", "0-7=local"):
        owner = shard_map.entry_of_expert(shard_map.parse(text), spec)
        np.testing.assert_array_equal(owner[[1, 3]], 0)


def test_a_model_without_experts_says_to_leave_the_flag_out() -> None:
    assert "leave the flag out" in message("0-7=local", model(dense_layers=(0, 1, 2, 3)))


def test_owners_follow_the_map() -> None:
    parsed = shard_map.parse("0-1=grpc://a:1,2-7@0-1=local,2-3+5@2-3=unix:///s,4+6-7@2-3=local")
    owner = shard_map.entry_of_expert(parsed, model())
    np.testing.assert_array_equal(owner[:2], [[0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    np.testing.assert_array_equal(owner[2:], [[0, 0, 2, 2, 3, 2, 3, 3]] * 2)


def test_a_map_file_says_the_same_as_the_flag() -> None:
    text = """
        [[shard]]
        experts = "0-3+6"
        layers = "0-1"
        endpoints = ["grpc://a:1"]

        [[shard]]
        experts = "7"
        endpoints = ["local", "unix:///s"]
    """
    parsed = shard_map.parse_toml(text, "map.toml")
    assert parsed == shard_map.parse("0-3+6@0-1=grpc://a:1,7=local|unix:///s")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[[shard", "map.toml: not valid TOML"),
        ("", "expected [[shard]] tables"),
        ("shard = 3", "expected [[shard]] tables"),
        ("shard = [3]", "shard 1: must be a table"),
        ("other = 1\n[[shard]]", "expected [[shard]] tables and nothing else"),
        ("[[shard]]\nexperts = '0'", "shard 1: wrong type or missing key"),
        ("[[shard]]\nexperts = 0\nendpoints = ['local']", "shard 1: wrong type"),
        ("[[shard]]\nexpert = '0'\nendpoints = ['local']", "unknown key 'expert'"),
        ("[[shard]]\nexperts = '0-x'\nendpoints = ['local']", "map.toml, character 3"),
    ],
)
def test_a_wrong_map_file_is_refused_by_name(text: str, what: str) -> None:
    with pytest.raises(ShardMapError, match=re.escape(what)):
        shard_map.parse_toml(text, "map.toml")


def spans(bound: int) -> st.SearchStrategy[tuple[Span, ...]]:
    number = st.integers(0, bound - 1)
    span = st.tuples(number, number).map(lambda ends: Span(min(ends), max(ends)))
    return st.lists(span, min_size=1, max_size=3).map(tuple)


endpoints = st.one_of(
    st.builds(
        lambda kind, host, port: Endpoint(EndpointKind(kind), f"{host}:{port}"),
        st.sampled_from(["grpc", "grpcs"]),
        st.sampled_from(["a", "node-1.example", "127.0.0.1", "[::1]", "[fe80::1]"]),
        st.integers(1, 65535),
    ),
    st.from_regex(r"/[A-Za-z0-9_./=@-]{0,20}[a-z]", fullmatch=True).map(
        lambda path: Endpoint(EndpointKind.UNIX, path)
    ),
    st.just(Endpoint(EndpointKind.LOCAL, "")),
    st.from_regex(r"[a-z0-9_.-]{1,10}", fullmatch=True).map(
        lambda name: Endpoint(EndpointKind.RAY, name)
    ),
)
entries = st.builds(
    ShardEntry,
    spans(limits.MAX_EXPERTS),
    st.one_of(st.just(()), spans(limits.MAX_LAYERS)),
    st.lists(endpoints, min_size=1, max_size=3, unique=True).map(tuple),
)
maps = st.lists(entries, min_size=1, max_size=4).map(lambda e: ShardMap(tuple(e), ""))


@given(maps)
def test_parsing_what_was_printed_gives_the_same_map(original: ShardMap) -> None:
    parsed = shard_map.parse(str(original))
    assert parsed == original
    assert str(parsed) == str(original)


@given(st.one_of(st.text(), st.text("0123456789-+@=,|: local/grpcunix[].", max_size=60)))
def test_any_text_is_a_map_or_a_shard_map_error(text: str) -> None:
    try:
        parsed = shard_map.parse(text)
    except ShardMapError as error:
        assert "character" in str(error)
        return
    assert shard_map.parse(str(parsed)) == parsed


@given(maps, st.data())
def test_a_damaged_map_is_a_map_or_a_shard_map_error(
    original: ShardMap, data: st.DataObject
) -> None:
    text = str(original)
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.text(max_size=2)) + text[at + data.draw(st.integers(0, 2)) :]
    try:
        shard_map.entry_of_expert(shard_map.parse(damaged), model())
    except ShardMapError as error:
        assert str(error)


@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
)
def test_any_assignment_comes_back_out_of_its_map(first: list[int], second: list[int]) -> None:
    """Layers 0-1 assign experts by `first`, layers 2-3 by `second`; the owners are the same."""
    texts, owners = [], []
    for layers, assignment in (("0-1", first), ("2-3", second)):
        for owner in sorted(set(assignment)):
            held = shard_map.spans_of(np.flatnonzero(np.array(assignment) == owner))
            texts.append(f"{shard_map.show_spans(held)}@{layers}=unix:///{owner}")
            owners.append(owner)
    entry = shard_map.entry_of_expert(shard_map.parse(",".join(texts)), model())
    expected = np.array([first, first, second, second])
    np.testing.assert_array_equal(np.array(owners)[entry], expected)
