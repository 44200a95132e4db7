"""The files of a reader: opened past the page cache where their file system allows it.

Files stay open, never mapped: one that is truncated gives an error at the read, no signal, and one
that is replaced by rename goes on giving its old bytes until the reader is told to reopen.
"""

import errno
import mmap
import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import numpy as np

from shoal.experts.readers.reader import U8, FileState
from shoal.limits import READ_ALIGNMENT

# descriptor -> (offset, address) alignment of direct reads, (0, 0) without them, None: not told.
AlignmentOf = Callable[[int], tuple[int, int] | None]

_F_NOCACHE = 48  # fcntl.h of macOS, whose way around the page cache asks for no alignment
_O_DIRECT: int | None = getattr(os, "O_DIRECT", None)  # Linux
_fadvise = getattr(os, "posix_fadvise", None)  # Linux
_RANDOM, _DONTNEED = 1, 4  # POSIX_FADV_*


class OpenFile:
    """A file open for reading: `direct` past the page cache, if that works, and buffered.

    direct: a descriptor, or None where only buffered reads work; why_buffered then says why.
    offset_alignment, memory_alignment: what the direct descriptor asks of a read, in bytes.
    """

    __slots__ = (
        "_buffered",
        "_open",
        "_state",
        "direct",
        "is_closing",
        "memory_alignment",
        "offset_alignment",
        "path",
        "uses",
        "why_buffered",
    )

    def __init__(self, path: Path, alignment_of: AlignmentOf | None) -> None:
        """alignment_of: None: buffered, whatever else works. Raises OSError naming the path."""
        self.path = path
        self.direct: int | None = None
        self.offset_alignment = self.memory_alignment = READ_ALIGNMENT
        self.why_buffered = ""
        self.uses = 0  # chunks at the device
        self.is_closing = False
        self._buffered: int | None = None
        self._state: FileState = (0, 0, 0, 0, 0)
        self._open: list[int] = []  # every descriptor: others may be using one we gave up
        try:
            if alignment_of is not None:
                self._open_direct(alignment_of)
            if self.direct is None:
                self.buffered()
        except OSError:
            self.close()
            raise

    def buffered(self) -> int:
        """Return a descriptor that reads through the page cache. Raises OSError."""
        if self._buffered is None:
            self._buffered = self._open_with(0)
            if _fadvise is not None:  # reads have their full length: nothing to guess
                with suppress(OSError):  # it is advice
                    _fadvise(self._buffered, 0, 0, _RANDOM)
        return self._buffered

    def state_of(self, descriptor: int) -> FileState:
        """Return what changes when the file behind one of its descriptors is written to."""
        stat = os.fstat(descriptor)
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if state != self._state:
            self._state = state
        return self._state  # one object for as long as it is so: every chunk's record shares it

    def forget(self, offset: int, num_bytes: int) -> None:
        """Tell the kernel not to keep these bytes: whoever reads has its own cache."""
        if self._buffered is not None and _fadvise is not None:
            with suppress(OSError):  # it is advice
                _fadvise(self._buffered, offset, num_bytes, _DONTNEED)

    def give_up_direct(self, why: str) -> None:
        """Read through the page cache from now on."""
        if self.direct is not None:
            self.why_buffered = why
            self.buffered()
            self.direct = None

    def close(self) -> None:
        """Close the descriptors, or let the last chunk at the device do it. Safe to call again."""
        self.is_closing = True
        if not self.uses:
            for descriptor in self._open:
                os.close(descriptor)
            self._open.clear()

    def begin_use(self) -> None:
        self.uses += 1

    def end_use(self) -> None:
        self.uses -= 1
        if self.is_closing and not self.uses:
            self.close()

    def _open_with(self, flags: int) -> int:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | flags)
        self._open.append(descriptor)
        return descriptor

    def _open_direct(self, alignment_of: AlignmentOf) -> None:
        if _O_DIRECT is not None:
            try:
                self.direct = self._open_with(_O_DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.why_buffered = _refused(error)
                return
            self._probe(self.direct, alignment_of)
        elif sys.platform == "darwin":
            import fcntl

            self.direct = self._open_with(0)
            fcntl.fcntl(self.direct, _F_NOCACHE, 1)
            self.offset_alignment = self.memory_alignment = 1
        else:
            self.why_buffered = "this system has no O_DIRECT"

    def _probe(self, descriptor: int, alignment_of: AlignmentOf) -> None:
        # What the file system says, and where it says nothing, what a read says.
        told = alignment_of(descriptor)
        if told is not None:
            self.offset_alignment, self.memory_alignment = told
            if self.offset_alignment == 0:
                self.give_up_direct("the file system says that it has no direct reads (statx)")
            return
        with mmap.mmap(-1, READ_ALIGNMENT) as page:
            try:
                os.preadv(descriptor, [page], 0)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    self.give_up_direct(_refused(error))
                # Any other error is the business of whoever reads these bytes.


class OpenFiles:
    """The files of a reader by path. Not thread-safe.

    Raises OSError naming the path that cannot be opened; then nothing stays open.
    """

    def __init__(self, paths: Collection[Path], alignment_of: AlignmentOf | None) -> None:
        self._alignment_of = alignment_of
        self._files: dict[Path, OpenFile] = {}
        try:
            for path in paths:
                self.get(path)
        except OSError:
            self.close()
            raise

    def get(self, path: Path) -> OpenFile:
        """Return the file, opened now if it was not. Raises OSError."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = OpenFile(path, self._alignment_of)
        return file

    def all(self) -> list[OpenFile]:
        return list(self._files.values())

    def fallbacks(self) -> dict[str, str]:
        """Return why each file is buffered that should not be."""
        return {str(f.path): f.why_buffered for f in self._files.values() if f.why_buffered}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


class BouncePool:
    """Aligned buffers for chunks whose place in the file is not aligned. Not thread-safe.

    It grows to a bound, and then gives none: the chunk is read through the page cache instead.
    """

    def __init__(self, limit_bytes: int, chunk_bytes: int) -> None:
        """limit_bytes: of all buffers; chunk_bytes: the largest chunk."""
        self.num_buffers = 0
        self.num_refused = 0
        self.is_exhausted = False  # one was refused, and none has come back since
        self._free: dict[int, list[U8]] = {}  # by alignment
        self._limit_bytes = limit_bytes
        self._chunk_bytes = chunk_bytes
        self._num_bytes = 0

    def take(self, alignment: int) -> U8 | None:
        """Return a buffer for a chunk and for what alignment adds at both its ends, or None."""
        free = self._free.setdefault(alignment, [])
        size = self._chunk_bytes + 2 * alignment
        self.is_exhausted = not free and self._num_bytes + size > self._limit_bytes
        if self.is_exhausted:
            self.num_refused += 1
            return None
        if free:
            return free.pop()
        self.num_buffers += 1
        self._num_bytes += size
        memory = np.empty(size + alignment, np.uint8)
        skip = -memory.__array_interface__["data"][0] % alignment
        return memory[skip : skip + size]

    def give_back(self, buffer: U8, alignment: int) -> None:
        self._free[alignment].append(buffer)
        self.is_exhausted = False


def _refused(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return f"its file system refuses O_DIRECT ({name})"
