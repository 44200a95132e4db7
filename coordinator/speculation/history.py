"""History: the token ids of the user's own texts, on disk, for lookup. Only with `--history`.

    HISTORY/TOKENIZER.texts     magic, blake3 of the rest, tokenizer, texts: the oldest first
    HISTORY/TOKENIZER.lock      held while the file is replaced

A tokenizer has a file of its own, whatever the model. The file is replaced whole, under the lock,
with what other processes added meanwhile: a crash leaves the old one or the new one. It is bounded:
the oldest texts go. A damaged file is set aside and told of; one that cannot be written costs a
sentence, never a request. It holds what was typed and answered, so only its owner can read it.
"""

import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from shoal import limits

_MAGIC = b"shoal history 1\n"
_HASH_BYTES = 32
_HEAD_BYTES = len(_MAGIC) + _HASH_BYTES + _HASH_BYTES
_COUNT = struct.Struct("<I")
# Every text costs its length too, so no file is longer than this.
_MAX_BYTES = _HEAD_BYTES + 4 * limits.MAX_HISTORY_TOKENS
_PRIVATE = 0o600
_LOCK_TRIES, _LOCK_PAUSE_S = (
    25,
    0.02,
)  # who holds it writes 128 KiB; a stopped process is not awaited

Text = tuple[int, ...]


class History:
    """Texts of one tokenizer. Used by one thread; the file by any number of processes."""

    def __init__(self, folder: Path, tokenizer_hash: str, notify: Callable[[str], None]) -> None:
        """Read what is there. Never fails: what is wrong is told.

        Args:
            folder: made at the first text. tokenizer_hash: blake3 of tokenizer.json, in hex.
            notify: told, in a sentence, what could not be read or written.
        """
        self._hash = bytes.fromhex(tokenizer_hash)
        assert len(self._hash) == _HASH_BYTES, tokenizer_hash
        self._path = folder / f"{tokenizer_hash[:16]}.texts"
        self._notify = notify
        self._unwritten: list[Text] = []
        self._has_failed = False
        self._texts: tuple[Text, ...] = ()
        with self._told("read"):
            try:
                self._texts = _decode(self._bytes(), self._hash)
            except ValueError:
                with self._locked(_LOCK_TRIES) as is_ours:
                    self._texts = self._read() if is_ours else ()

    @property
    def path(self) -> Path:
        return self._path

    @property
    def texts(self) -> tuple[Text, ...]:
        """All texts as of the last reading or writing, the oldest first."""
        return self._texts

    def add(self, token_ids: Sequence[int]) -> None:
        """Keep a text; of one that is too long, its end. Written at once, where that is possible.

        While another process writes, the text waits for the next `add` or `close`.
        """
        if len(token_ids) == 0:
            return
        text = tuple(token_ids[-(limits.MAX_HISTORY_TOKENS - 1) :])
        self._texts = _bounded((*self._texts, text))
        self._unwritten = list(_bounded((*self._unwritten, text)))
        self._write(1)

    def close(self) -> None:
        """Write what still waits."""
        if self._unwritten and not self._has_failed:
            self._write(_LOCK_TRIES)

    def _write(self, lock_tries: int) -> None:
        with self._told("written"):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked(lock_tries) as is_ours:
                if is_ours:
                    texts = _bounded((*self._read(), *self._unwritten))
                    self._replace(_encode(self._hash, texts))
                    self._texts, self._unwritten, self._has_failed = texts, [], False

    @contextmanager
    def _locked(self, tries: int) -> Iterator[bool]:
        """Hold the lock while the block runs; False: somebody else does, however often we asked."""
        lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, _PRIVATE)
        try:
            for left in reversed(range(tries)):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if left:
                        time.sleep(_LOCK_PAUSE_S)
                    continue
                yield True
                return
            yield False
        finally:
            os.close(lock)

    def _bytes(self) -> bytes:
        """Return the file; what a file without texts holds where there is none."""
        try:
            with self._path.open("rb") as stream:
                return stream.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return _encode(self._hash, ())

    def _read(self) -> tuple[Text, ...]:
        """Return the texts, under the lock; a damaged file is set aside."""
        try:
            return _decode(self._bytes(), self._hash)
        except ValueError as error:
            aside = self._path.with_suffix(".damaged")
            self._path.replace(aside)
            self._notify(f"the history {self._path} is damaged ({error}): it is now {aside.name}")
            return ()

    def _replace(self, data: bytes) -> None:
        partial = self._path.with_suffix(".partial")
        with suppress(FileNotFoundError):
            partial.unlink()  # of a process that was killed: we hold the lock
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self._path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._has_failed:  # once: a full disk would say so after every answer
                self._has_failed = True
                reason = error.strerror or str(error)
                self._notify(
                    f"the history {self._path} cannot be {what}: {reason}; answers are the same"
                )


def _bounded(texts: Sequence[Text]) -> tuple[Text, ...]:
    """Drop the oldest until lengths and ids together fit."""
    room, start = limits.MAX_HISTORY_TOKENS, len(texts)
    while start and room >= 1 + len(texts[start - 1]):
        start -= 1
        room -= 1 + len(texts[start])
    return tuple(texts[start:])


def _encode(tokenizer_hash: bytes, texts: Sequence[Text]) -> bytes:
    body = tokenizer_hash + b"".join(
        _COUNT.pack(len(text)) + struct.pack(f"<{len(text)}I", *text) for text in texts
    )
    return _MAGIC + blake3(body).digest() + body


def _decode(data: bytes, tokenizer_hash: bytes) -> tuple[Text, ...]:
    """Raises ValueError saying what is wrong."""
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    if not data.startswith(_MAGIC) or len(data) < _HEAD_BYTES:
        raise ValueError("its head is not one of ours")
    digest, body = data[len(_MAGIC) :][:_HASH_BYTES], data[len(_MAGIC) + _HASH_BYTES :]
    if blake3(body).digest() != digest:
        raise ValueError("its hash differs")
    if body[:_HASH_BYTES] != tokenizer_hash:
        raise ValueError("it belongs to another tokenizer")
    texts, offset = [], _HASH_BYTES
    while offset < len(body):
        if len(body) - offset < _COUNT.size:
            raise ValueError("it ends within a length")
        (count,) = _COUNT.unpack_from(body, offset)
        offset += _COUNT.size
        if count > (len(body) - offset) // 4:
            raise ValueError("it ends within a text")
        texts.append(struct.unpack_from(f"<{count}I", body, offset))
        offset += 4 * count
    return tuple(texts)
