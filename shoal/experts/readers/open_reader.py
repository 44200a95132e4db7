"""Chooses the reader that works here: io_uring, else preadv past the page cache, else buffered."""

import errno
from collections.abc import Callable, Collection
from pathlib import Path

from shoal.errors import UsageError
from shoal.experts.readers.files import OpenFiles
from shoal.experts.readers.queue_reader import Tuning
from shoal.experts.readers.reader import U8, Backend, Reader
from shoal.experts.readers.ring_reader import RingReader
from shoal.experts.readers.thread_reader import ThreadReader
from shoal.limits import MAX_READ_QUEUE_DEPTH
from shoal.ops.reads import Ring

IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


def open_reader(
    wanted: Backend | None,
    arena: U8 | None,
    paths: Collection[Path],
    *,
    tuning: Tuning | None = None,
    open_ring: Callable[[int], Ring] = Ring,
) -> Reader:
    """Return a reader of these files.

    Args:
        wanted: the backend; None: the best that works here. One that is named and cannot work is an
            error, not a fallback, but single files may still be buffered (`figures().fallbacks`).
        arena: memory that most reads go into, pinned where that is possible (it is then touched,
            all of it); None: `Reader.register` may name it later.
        paths: files that will be read. Others are opened when they are first met.
        open_ring: makes an io_uring of so many entries; a test hands in one that fails.

    Raises:
        UsageError: `wanted` does not work here; says why.
        OSError: a file cannot be opened; names it.
    """
    tuning = tuning or Tuning()
    why = "read once, kept there for the next start" if tuning.keeps_page_cache else ""
    if wanted in (None, Backend.IO_URING):
        try:
            ring = open_ring(MAX_READ_QUEUE_DEPTH)
        except OSError as error:
            why = f"no io_uring: {explain(error)}"
            if wanted is not None:
                raise UsageError(f"--io {wanted}: {why}; use --io auto") from None
        else:
            return RingReader(ring, paths, () if arena is None else (arena,), tuning)
    if wanted is not Backend.BUFFERED:
        refusal = _no_direct_reads(paths, tuning)
        if not refusal:
            return ThreadReader(Backend.PREAD, why, paths, tuning)
        if wanted is not None:
            raise UsageError(f"--io {wanted}: {refusal}; use --io auto")
        why = "; ".join(filter(None, (why, refusal)))
    return ThreadReader(Backend.BUFFERED, why, paths, tuning)


def explain(error: OSError, disabled: Path = IO_URING_DISABLED) -> str:
    """Say why an io_uring could not be made, in words that lead to the fix."""
    match error.errno:
        case errno.ENOSYS:
            return "this kernel or this build does not have it (Linux 5.11)"
        case errno.EPERM | errno.EACCES:
            if disabled.exists() and disabled.read_text().strip() != "0":
                return f"switched off by {disabled}"
            return "forbidden, as containers' default seccomp profiles do"
        case errno.ENOMEM:
            return "no memory for its queues (ulimit -l)"
        case code:
            return errno.errorcode.get(code or 0, str(error))


def _no_direct_reads(paths: Collection[Path], tuning: Tuning) -> str:
    # Why none of the files can be read past the page cache; empty: one at least can.
    files = OpenFiles(paths, tuning.alignment_of)
    try:
        if not paths or any(file.direct is not None for file in files.all()):
            return ""
        path, reason = next(iter(files.fallbacks().items()))
        return f"no direct reads: {path}: {reason}"
    finally:
        files.close()
