"""Reader: fills memory from files, many reads at a time, what is demanded before what is guessed.

A read is cut into chunks, and chunks of all reads are at the device together, up to the queue
depth. Three backends give the same bytes: io_uring and preadv past the page cache (O_DIRECT), and
buffered reads where a file system knows neither.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.experts.options import Backend as Backend
from shoal.limits import READER_CLOSE_S

U8 = NDArray[np.uint8]

# Upper bounds of the latency histograms' buckets; the last bucket has none.
LATENCY_BOUNDS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)


@dataclass(frozen=True, slots=True)
class Source:
    """One copy of the bytes. Copies on several drives: chunks are dealt over them in turn."""

    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `out` from any of `sources`.

    tag: the caller's name for it, unique among reads that are not done.
    out: where the bytes go: begins at a multiple of 4096 and has a multiple of 4096 bytes. The
        caller keeps it alive and unused until the read is Done.
    is_prefetch: nobody waits for it: it starts only where no demand is queued.
    """

    tag: int
    sources: tuple[Source, ...]
    out: U8
    is_prefetch: bool = False


# A file as it was when a chunk of it was read: device, inode, size, times of writing and change.
FileState = tuple[int, int, int, int, int]
# What a read's bytes were taken from: (first byte in `out`, state of the file) a chunk.
Origin = frozenset[tuple[int, FileState]]


@dataclass(frozen=True, slots=True)
class Done:
    """How a read ended. Each submitted read is Done exactly once.

    error: None: every byte is there. Otherwise why not, naming the file, after the retries:
        errno ENODATA where the file ended before the read did (truncated), ECANCELED after
        `cancel`, or the system's own. `out` then holds anything.
    seconds: from submit to the last chunk.
    origin: by the descriptors that were read, not by what their paths name meanwhile; None: a chunk
        came in pieces or after an error, so that it cannot be told.
    """

    tag: int
    error: OSError | None
    seconds: float
    num_bytes: int
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class ReaderFigures:
    """What a reader has done since it was opened.

    num_bytes: read without error; prefetch_bytes: the part of them that nobody demanded.
    in_flight, queued: chunks at the device, and chunks that wait for a place there.
    queue_depth: chunks that may be at the device together; depth_now: fewer while few reads are
        queued.
    num_buffered: chunks that went through the page cache although O_DIRECT was wanted, because
        their file has none.
    num_bounced: chunks read into a buffer of their own and copied, for the sake of alignment.
    bounce_buffers: how many there are now. is_bounce_exhausted: a chunk wanted one more than there
        may be, and none is free since. num_unbounced: chunks that went through the page cache for
        that reason.
    chunk_latency, read_latency: completions by LATENCY_BOUNDS_S, one more for what is beyond.
    fallbacks: file -> why it is read in a lesser way than `backend`.
    pinned_bytes: of registered memory that the kernel has pinned.
    """

    backend: Backend
    why: str
    num_reads: int
    num_bytes: int
    prefetch_bytes: int
    num_errors: int
    num_retries: int
    num_cancelled: int
    in_flight: int
    queued: int
    queue_depth: int
    depth_now: int
    bytes_per_s: float | None
    num_buffered: int
    num_bounced: int
    bounce_buffers: int
    is_bounce_exhausted: bool
    num_unbounced: int
    chunk_latency: tuple[int, ...]
    chunk_latency_sum_s: float
    read_latency: tuple[int, ...]
    read_latency_sum_s: float
    fallbacks: Mapping[str, str]
    pinned_bytes: int = 0

    @property
    def reasons(self) -> str:
        """Why reads are not made in a better way, of the backend and of single files; or ""."""
        of_files = dict.fromkeys(self.fallbacks.values())
        return "; ".join(filter(None, (self.why, *(f"no direct reads: {why}" for why in of_files))))


class Reader(Protocol):
    """Thread-safe; one thread at a time waits."""

    @property
    def backend(self) -> Backend: ...

    @property
    def why(self) -> str:
        """Why it is no better backend, and what of this one does not work here; may be empty."""
        ...

    def submit(self, reads: Sequence[Read]) -> None:
        """Start reads; never waits for the device. Whatever goes wrong is told by their Done.

        Raises:
            ValueError: `out` is not aligned, or a tag is in use.
        """
        ...

    def cancel(self, tags: Collection[int]) -> None:
        """Give up those of these reads that are still prefetches.

        Chunks at the device are waited for; the read is then Done with ECANCELED. A read whose
        last chunk is already at the device is left to succeed. Unknown tags are ignored.
        """
        ...

    def promote(self, tag: int) -> None:
        """Turn a prefetch into a demand, behind the demands already queued; else nothing.

        One that was cancelled before stays so: when its Done says ECANCELED, submit it again.
        """
        ...

    def wait(self, timeout_s: float) -> list[Done]:
        """Return reads that ended since the last call; wait for one if there is none.

        The list is empty after `timeout_s`, `wake` or `close`. The GIL is released meanwhile.
        """
        ...

    def wake(self) -> None:
        """Make the `wait` that is under way, or the next one, return."""
        ...

    def register(self, arenas: Sequence[U8]) -> None:
        """Tell the kernel where most reads will go, in place of what was registered before.

        Only speed depends on it: other memory can be read into at any time. io_uring pins pages
        of it, each 32 MiB once it has been filled: memory whose pages are to be given back
        (madvise) must first be left out of what is registered.
        """
        ...

    def reopen(self, paths: Collection[Path]) -> None:
        """Open these files anew, and no others: what replaced a file is seen from now on.

        Reads at the device end on the files they began with. Raises OSError naming the file, and
        then nothing has changed.
        """
        ...

    def set_queue_depth(self, depth: int) -> None:
        """Let at most that many chunks (one at least) be at the device from now on."""
        ...

    def set_bandwidth(self, bytes_per_s: float | None) -> None:
        """Start no more bytes a second than that, prefetch and demand together; None: no limit."""
        ...

    def figures(self) -> ReaderFigures: ...

    def close(self, timeout_s: float = READER_CLOSE_S) -> bool:
        """Wait for what is at the device, forget the rest, close all files. Safe to call again.

        Returns:
            False: after `timeout_s` some reads had not ended. They are left to themselves, with the
            files and the memory that they need, for as long as the process lives.
        """
        ...
