"""Tokenizer and TextStream: raw and templated text in, streamed text out."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.text_stream import TextStream
from coordinator.tokenizer import Tokenizer
from shoal.errors import CorruptArtifact, RequestError
from support.tiny_tokenizer import EOS_ID, SPECIAL, tokenizer_json


def _tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer(json.dumps(tokenizer_json() | changes), {"eos_token_id": EOS_ID})


def _sentencepiece_like() -> Tokenizer:
    """A vocabulary of words with ▁ and of bytes `<0xAB>`, as Llama 2 and Mixtral have."""
    words = ["<unk>", "▁hello", "▁world", "!", "▁"]
    tokens = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    model = tokenizer_json()["model"] | {
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [],
        "byte_fallback": True,
        "unk_token": "<unk>",
    }
    return _tokenizer(model=model, decoder=decoder, pre_tokenizer=None, added_tokens=[])


def test_raw_text_does_not_parse_special_tokens_and_templated_text_does() -> None:
    tokenizer = _tokenizer()
    text = "a<|end|>"
    assert tokenizer.encode_templated(text)[-1] == EOS_ID
    assert EOS_ID not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_comes_from_the_post_processor_and_what_it_appends_is_left_out() -> None:
    pieces = [
        {"SpecialToken": {"id": "<|start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
    ]
    special = {
        token: {"id": token, "ids": [SPECIAL.index(token)], "tokens": [token]}
        for token in ("<|start|>", "<|end|>")
    }
    processor = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": special,
    }
    tokenizer = _tokenizer(post_processor=processor)
    start = SPECIAL.index("<|start|>")
    assert tokenizer.encode("the") == [start, *_tokenizer().encode("the")]
    assert tokenizer.encode("") == [start]
    assert tokenizer.encode_templated("the") == _tokenizer().encode("the")


@given(st.text(max_size=40))
def test_streamed_text_is_the_whole_text_and_every_piece_is_whole_characters(text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, [])
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    tokenizer = _tokenizer()
    ids = tokenizer.encode("a🎉b")
    assert len(ids) == 6
    stream = TextStream(tokenizer, [])
    assert [stream.push(token_id) for token_id in ids] == ["a", "", "", "", "🎉", "b"]


def test_bytes_that_are_no_text_become_replacement_characters_and_nothing_is_lost() -> None:
    tokenizer = _tokenizer()
    party = tokenizer.encode("🎉")
    stream = TextStream(tokenizer, [])
    told = "".join(stream.push(token_id) for token_id in [*party[:2], *tokenizer.encode("ok")])
    assert told == "\ufffdok"
    assert stream.push(party[0]) == "" and stream.finish() == "\ufffd"


def test_special_tokens_and_padding_ids_have_no_text() -> None:
    tokenizer = _tokenizer()
    stream = TextStream(tokenizer, [])
    assert stream.push(EOS_ID) == "" and stream.push(tokenizer.num_tokens + 5) == ""
    assert stream.finish() == ""


def test_a_sentencepiece_decoder_keeps_the_space_between_prompt_and_answer() -> None:
    tokenizer = _sentencepiece_like()
    hello, world, mark = 1, 2, 3
    assert tokenizer.decode([hello, world]) == "hello world"
    stream = TextStream(tokenizer, [], context=[hello])
    assert [stream.push(world), stream.push(mark)] == [" world", "!"]
    assert TextStream(tokenizer, []).push(world) == "world"


def test_a_sentencepiece_decoder_holds_the_bytes_of_half_a_character() -> None:
    tokenizer = _sentencepiece_like()
    party = [5 + byte for byte in "🎉".encode()]
    stream = TextStream(tokenizer, [], context=[1])
    assert [stream.push(token_id) for token_id in [*party, 3]] == ["", "", "", "🎉", "!"]
    stray = TextStream(tokenizer, [], context=[1])
    pieces = [stray.push(party[1]), stray.push(2), stray.finish()]
    assert "".join(pieces) == "\ufffd world"


def test_a_stop_string_ends_the_text_across_tokens() -> None:
    tokenizer = _tokenizer()
    stream = TextStream(tokenizer, ["END"])
    told = [stream.push(token_id) for token_id in tokenizer.encode("go EN ENDless")]
    assert "".join(told) == "go EN " and stream.is_stopped and stream.finish() == ""


def test_what_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    tokenizer = _tokenizer()
    stream = TextStream(tokenizer, ["END"])
    told = "".join(stream.push(token_id) for token_id in tokenizer.encode("the EN"))
    assert told == "the " and stream.finish() == "EN" and not stream.is_stopped


def test_eos_ids_and_template_tokens_come_from_the_generation_config() -> None:
    source = json.dumps(tokenizer_json())
    several = Tokenizer(source, {"eos_token_id": [2, 0], "bos_token_id": 3})
    assert several.eos_ids == {0, 2}
    assert several.special_tokens == {"eos_token": "<|assistant|>", "bos_token": "<|start|>"}
    assert Tokenizer(source, {}).eos_ids == frozenset()
    with pytest.raises(CorruptArtifact, match="eos_token_id"):
        Tokenizer(source, {"eos_token_id": "</s>"})


def test_text_that_is_no_unicode_is_refused() -> None:
    for encode in (_tokenizer().encode, _tokenizer().encode_templated):
        with pytest.raises(RequestError, match="not valid Unicode at character 2"):
            encode("ab\udcff")


def test_a_broken_tokenizer_is_refused() -> None:
    with pytest.raises(CorruptArtifact, match=r"tokenizer\.json cannot be read"):
        Tokenizer("{}", {})
