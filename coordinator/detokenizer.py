"""Token ids to text, one id at a time: never half a character, never later than needed (core)."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what stands for bytes that are no UTF-8
CONTEXT_TOKENS = 6  # enough for decoders that look at their neighbours: as in vLLM
MAX_HELD_TOKENS = 4  # a character has at most four bytes, a token at least one


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """Return the text that has become certain; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """Return the rest: U+FFFD for a character that was left incomplete."""
        ...


class ByteDetokenizer:
    """For vocabularies of bytes: every token is some bytes, whatever its neighbours are."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder: decode a window with and without the newest tokens, and compare.

    `context` is what stands before: a decoder that drops the space at the start of a text must
    not take the first generated token for the start.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(context[-CONTEXT_TOKENS:])
        self._begin = 0  # of the window
        self._told = len(self._ids)  # tokens whose text has been returned

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._fresh_text()
        is_whole = bool(text) and not text.endswith(REPLACEMENT)
        if not is_whole and len(self._ids) - self._told < MAX_HELD_TOKENS:
            return ""
        self._begin, self._told = self._told, len(self._ids)
        return text

    def finish(self) -> str:
        text = self._fresh_text()
        self._told = len(self._ids)
        return text

    def _fresh_text(self) -> str:
        before = self._decode(self._ids[self._begin : self._told])
        return self._decode(self._ids[self._begin :])[len(before) :]
