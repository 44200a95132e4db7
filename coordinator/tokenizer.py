"""Text to token ids and back, on the `tokenizers` library: raw and templated text, streamed ids."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from coordinator.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from shoal.errors import CorruptArtifact, RequestError


class Tokenizer:
    """A model's tokenizer.json, and the token ids that its generation_config.json names."""

    def __init__(self, tokenizer_json: str, generation_config: Mapping[str, Any]) -> None:
        """Raises: CorruptArtifact for a tokenizer or token ids that cannot be read."""
        self._json = tokenizer_json
        self._tokenizer = _parse(tokenizer_json)
        self._tokenizer.encode_special_tokens = True  # special tokens are plain text to it
        self._generation_config = generation_config
        self.eos_ids = frozenset(_token_ids(generation_config, "eos_token_id"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    @staticmethod
    def open(path: Path, generation_config: Mapping[str, Any]) -> "Tokenizer":
        """Read tokenizer.json. Raises: CorruptArtifact naming the file."""
        try:
            return Tokenizer(path.read_text(encoding="utf-8"), generation_config)
        except (OSError, UnicodeDecodeError, CorruptArtifact) as error:
            raise CorruptArtifact(f"{path}: {error}") from None

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the added ones included; a model's vocabulary may be padded beyond."""
        return self._tokenizer.get_vocab_size()

    def vocabulary(self) -> dict[str, int]:
        """Return every token, the added ones included, and its id."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of raw text: BOS if the tokenizer has one, special tokens not parsed.

        Raises: RequestError for text that is no Unicode (lone surrogates).
        """
        _check_text(text)
        return [*self.bos_ids, *self._tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_templated(self, text: str) -> list[int]:
        """Return the ids of a chat template's output: special tokens parsed, no BOS added.

        Raises: RequestError as `encode`.
        """
        _check_text(text)
        return self._special_parser.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens; bytes that are no UTF-8 as U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str | None:
        """Return the vocabulary's string of an id (`Ġthe`); None: there is no such token."""
        return self._tokenizer.id_to_token(token_id)

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text: one BOS, or nothing."""
        # Told by encoding: a post-processor is a small program. What it would put behind the
        # text is left out: a text to be continued has not ended.
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
        raise CorruptArtifact("tokenizer.json: its post-processor changes the text's own tokens")

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The strings that chat templates know as bos_token, eos_token, pad_token, unk_token."""
        found: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            for token_id in _token_ids(self._generation_config, f"{name}_id")[:1]:
                if (token := self.token(token_id)) is not None:
                    found[name] = token
        return found

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        """Return a decoder of generated ids that follow `context`; special tokens have no text."""
        if isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel):
            return ByteDetokenizer(self._token_bytes)
        return WindowDetokenizer(self.decode, context)

    @cached_property
    def _special_parser(self) -> tokenizers.Tokenizer:
        """The same tokenizer, parsing special tokens. Made when needed: it takes 0.1 s and more."""
        return _parse(self._json)

    def _token_bytes(self, token_id: int) -> bytes:
        token = None if token_id in self._special_ids else self.token(token_id)
        if token is None:  # special, or padding of the embedding table
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token is plain text
            return token.encode()


class NoTokenizer(Tokenizer):
    """For a model that was converted without one: ids have no text, and text has no ids."""

    def __init__(self, generation_config: Mapping[str, Any]) -> None:
        """Raises: CorruptArtifact for token ids that cannot be read."""
        super().__init__(_NO_WORDS, generation_config)

    def encode(self, text: str) -> list[int]:
        """Raise RequestError."""
        raise RequestError(
            "the model has no tokenizer: give --prompt-ids, or convert it with --tokenizer DIR"
        )

    def encode_templated(self, text: str) -> list[int]:
        """Raise RequestError."""
        return self.encode(text)


_NO_WORDS = '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'


def _parse(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself, nothing narrower
        raise CorruptArtifact(f"tokenizer.json cannot be read: {error}") from None


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a command line with bytes that are no UTF-8
        raise RequestError(
            f"the text is not valid Unicode at character {error.start}: it must be UTF-8"
        ) from None


def _token_ids(config: Mapping[str, Any], key: str) -> list[int]:
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in values):
        raise CorruptArtifact(f"generation_config.json: {key} = {value!r}: must be token ids")
    return values


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a printable character. Source: GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
