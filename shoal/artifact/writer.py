"""Writes an artifact beside its final place, then renames it: it is there whole, or not at all.

    OUT's folder/
      .NAME.shoal.partial-1234/    while writing; its `lock` is held by the writing process
      NAME.shoal/                  appears by rename, after every file was flushed to the disk

A killed writer leaves the hidden folder, its lock free; the next writer of that name removes it.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.artifact.manifest import MANIFEST_NAME, Manifest, encode_manifest
from shoal.errors import CannotWrite, UsageError

_LOCK = "lock"
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this system allows",
}
_SLACK_BYTES = 4 << 20  # manifest, text files, directories


class ArtifactWriter:
    """A folder being written. Made by `new_artifact`, which commits or removes it."""

    def __init__(self, out: Path, partial: Path, removed: tuple[Path, ...]) -> None:
        self.out = out
        self.partial = partial
        self.removed = removed  # what killed writers had left

    @contextmanager
    def file(self, name: str, header: bytes = b"") -> Iterator["FileWriter"]:
        """Open a new file of the artifact, flushed to the disk when the block ends."""
        path = self.partial / name
        with _reported(self.out):
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("xb", buffering=0)
        with stream:
            writer = FileWriter(stream, self.out)
            writer.write(header)
            yield writer
            with _reported(self.out):
                os.fsync(stream.fileno())

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, which comes last: a folder without it is no artifact."""
        with self.file(MANIFEST_NAME) as file:
            file.write(encode_manifest(manifest))


class FileWriter:
    """One file being written; hashes what passes through."""

    def __init__(self, stream: BinaryIO, out: Path) -> None:
        self._stream = stream
        self._out = out
        self._hash = blake3()
        self.offset = 0

    def write(self, data: bytes | NDArray[np.uint8]) -> None:
        """Append bytes.

        Raises: CannotWrite when the disk is full or fails.
        """
        view = data.data.cast("B") if isinstance(data, np.ndarray) else memoryview(data)
        with _reported(self._out):
            while view:
                count = self._stream.write(view)
                self._hash.update(view[:count])
                self.offset += count
                view = view[count:]

    def take_hash(self) -> str:
        """Return the hash of what was written since the last call (or since the header)."""
        result = self._hash.hexdigest()
        self._hash = blake3()
        return result


@contextmanager
def new_artifact(out: Path, *, force: bool, needed_bytes: int) -> Iterator[ArtifactWriter]:
    """Write an artifact at `out`, all or nothing.

    The block writes every file and calls `finish`. When it ends, the folder is renamed to `out`;
    when it raises, nothing is left.

    Args:
        force: replace an artifact that is already there.
        needed_bytes: what it will hold; refused at once where the disk has less.

    Raises:
        UsageError: `out` exists, or another process is writing it.
        CannotWrite: the disk is full or not writable.
    """
    _check_free(out, force)
    with _reported(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        removed = _remove_leftovers(out)
        _check_space(out, needed_bytes)
        partial = out.parent / f"{_partial_prefix(out)}{os.getpid()}"
        partial.mkdir()
        lock = (partial / _LOCK).open("xb")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with lock:
            writer = ArtifactWriter(out, partial, removed)
            yield writer
            assert (partial / MANIFEST_NAME).exists(), "the block must call finish()"
            with _reported(out):
                _commit(writer)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_free(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise UsageError(f"{out} exists already: choose another name, or --force to replace it")
    is_ours = out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))
    if not is_ours or out.is_symlink():
        raise UsageError(f"{out} exists and is not an artifact: --force replaces artifacts only")


def _check_space(out: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes + _SLACK_BYTES:
        raise CannotWrite(
            f"cannot write {out}: it needs {needed_bytes + _SLACK_BYTES:,} bytes and the disk has"
            f" {free:,} free; nothing was written"
        )


def _partial_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _remove_leftovers(out: Path) -> tuple[Path, ...]:
    removed: list[Path] = []
    for folder in sorted(out.parent.glob(f"{_partial_prefix(out)}*")):
        if _is_being_written(folder):
            raise UsageError(f"{out} is being written by another process ({folder})")
        shutil.rmtree(folder)
        removed.append(folder)
    return tuple(removed)


def _is_being_written(folder: Path) -> bool:
    try:
        lock = (folder / _LOCK).open("rb")
    except FileNotFoundError:
        return False  # killed before it had a lock, or after it gave it up
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _commit(writer: ArtifactWriter) -> None:
    out, partial = writer.out, writer.partial
    (partial / _LOCK).unlink()
    for folder in (partial, *(p for p in partial.rglob("*") if p.is_dir())):
        _sync_folder(folder)
    if out.exists():
        old = out.parent / f"{_partial_prefix(out)}old-{os.getpid()}"
        out.rename(old)  # a folder cannot be renamed over a full one
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reported(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = _FULL.get(error.errno or 0)
        fix = "write elsewhere" if why is None else "free some space or write elsewhere"
        raise CannotWrite(
            f"cannot write {out}: {why or error.strerror or error}; nothing was left behind: {fix}"
        ) from error
