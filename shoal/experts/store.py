"""ExpertStore: where an expert's weights come from. Acquire, take them wave by wave, release.

A store reads experts from disk into memory within a budget of bytes, and gives them out. What a
call holds is never evicted or overwritten. `open_store` makes one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.reader import ExpertLocation
from shoal.experts.cache import DEFAULT_POLICY
from shoal.experts.options import Verify as Verify
from shoal.experts.ownership import Ownership
from shoal.experts.readers import Backend, ReaderFigures

Key = tuple[int, int]  # (layer, index of the expert in it)


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How a store keeps experts.

    cache_bytes: the budget; None: everything owned. At least two of the largest expert.
    backend: None: the best that works here; what fits in memory whole is read through the page
        cache, so that the next start is quick.
    data_dirs: further copies of the artifact's expert files, `experts/layer-000.safetensors` in
        each: what several have is read from all of them at once.
    policy: what to evict: a name of `shoal.experts.cache.POLICIES`.
    pins: experts that are never evicted once they have been read, the most wanted first; those
        that leave no room for two others are not pinned.
    """

    cache_bytes: int | None = None
    verify: Verify = Verify.FIRST
    backend: Backend | None = None
    data_dirs: tuple[Path, ...] = ()
    policy: str = DEFAULT_POLICY
    pins: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """What a store has done since it was opened.

    hits, misses: experts that calls asked for, by whether they were in memory when asked.
    joined: the part of misses that found their read already under way.
    num_bytes: read from disk, prefetch and warm-up included.
    evictions: experts that made room for others.
    stall_s: time that calls spent waiting with nothing to compute, summed over calls.
    num_resident, resident_bytes: in memory now. pinned_bytes: the part that is pinned.
    budget_bytes: what may be. populated_bytes: of its memory, made ready ahead of use.
    num_waiting: calls that wait for a read now. num_loading: reads under way or queued.
    prefetch_*: reads started for nobody: how many, and what became of their bytes: used by a call
        later, evicted (or failed, or cancelled) unused.
    num_verified, num_corrupt: hashes compared, and those that differed.
    unavailable: experts whose last read failed, and why; emptied by a read that succeeds.
    reader: None before the first read.
    """

    hits: int
    misses: int
    joined: int
    num_bytes: int
    evictions: int
    stall_s: float
    num_resident: int
    resident_bytes: int
    pinned_bytes: int
    budget_bytes: int
    populated_bytes: int
    num_waiting: int
    num_loading: int
    prefetch_issued: int
    prefetch_used: int
    prefetch_wasted: int
    prefetch_issued_bytes: int
    prefetch_used_bytes: int
    prefetch_wasted_bytes: int
    num_verified: int
    num_corrupt: int
    unavailable: tuple[tuple[Key, str], ...]
    reader: ReaderFigures | None


@dataclass(frozen=True, slots=True)
class Wave:
    """Some of the experts that a call asked for, in memory until it asks for the next wave.

    positions: which of them: indices into the sequence asked for, ascending.
    weights: one uint8 array a position: kernel layout, 64-byte aligned, exactly the layout's
        num_bytes. Valid only until the next wave, or the end of the `with` block.
    """

    positions: Sequence[int]
    weights: list[NDArray[np.uint8]]


class Acquisition(Protocol):
    """Experts asked for: `with store.acquire(...) as got: for wave in got: ...`, once.

    Every position is in exactly one wave. The first wave has what was in memory when asked, at
    once; the others come as reads end. Going on to the next wave lets go of the one before.
    Iterating raises what `ExpertStore.acquire` says.
    """

    @property
    def is_whole(self) -> bool:
        """Whether everything was in memory when asked: one wave, no wait."""
        ...

    @property
    def load_s(self) -> float:
        """Seconds that iterating has waited for reads."""
        ...

    def abandon(self, error: BaseException) -> None:
        """End the wait, now or later, by raising `error` from it. From any thread."""
        ...

    def __iter__(self) -> Iterator[Wave]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class WarmUpProgress:
    """How far a warm-up has come."""

    num_experts: int
    total_experts: int
    num_bytes: int
    total_bytes: int
    elapsed_s: float


class ExpertFiles(Protocol):
    """What a store asks of an artifact."""

    @property
    def path(self) -> Path: ...
    @property
    def identity(self) -> str: ...
    def expert_layout(self, layer: int) -> ops.ExpertLayout: ...
    def expert_location(self, layer: int, index: int) -> ExpertLocation: ...


class ExpertLender(Protocol):
    """Gives out experts: what an executor asks of a store. Thread-safe."""

    @property
    def ownership(self) -> Ownership: ...

    @property
    def tables(self) -> Mapping[int, ops.ExpertTable]:
        """The layers whose owned experts are all in memory, by layer; it changes as they come and
        go. A table that was taken from it computes, or says that it was withdrawn meanwhile."""
        ...

    def acquire(self, layer: int, experts: Sequence[int]) -> Acquisition:
        """Ask for distinct experts of a layer; holds those in memory, starts to read the others.

        Never waits: iterating does. Use it as a context manager at once: what it holds cannot be
        evicted until it is closed.

        Raises:
            NotOwned: naming the expert and what is owned. Never zeros in its place.
            CorruptArtifact: (iterating) its bytes are not what the manifest says.
            ExpertUnavailable: (iterating) they cannot be read, after retries.
        """
        ...

    def try_acquire(self, layer: int, experts: Sequence[int]) -> Acquisition | None:
        """Like `acquire`, but only if all are in memory; otherwise nothing is held or started."""
        ...

    def is_resident(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether all of these are in memory now."""
        ...

    def close(self) -> None:
        """Give memory and files back. Nothing may be acquired.

        Waits for reads at the device, but not for ever: see `Reader.close`.
        """
        ...


class ExpertStore(ExpertLender, Protocol):
    """Keeps experts in memory, within a budget, and can be told how."""

    @property
    def num_bytes(self) -> int:
        """Bytes of everything owned."""
        ...

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Start to read those that are absent, in this order, for nobody in particular.

        Only as far as there is room without evicting what is pinned, held or waited for, and no
        demand is queued. Never waits; experts that are not owned are left out.

        Returns:
            How many reads were started.
        """
        ...

    def cancel_prefetch(self) -> None:
        """Give up the prefetches that the device has not begun and that nobody waits for."""
        ...

    def warm_up(
        self,
        report: Callable[[WarmUpProgress], None],
        order: Sequence[Key] | None = None,
        *,
        is_background: bool = False,
    ) -> None:
        """Read owned experts into memory until it is full; call `report` after each.

        One that cannot be read is left out: `figures().unavailable` names it.

        Args:
            order: which, the first first; None: all that is owned, layer by layer.
            is_background: calls go first: it reads what they leave room for (see warm_up.py).

        Raises:
            CorruptArtifact: naming the first expert whose bytes are not what was written.
            CallCancelled: the store was closed.
        """
        ...

    def abandon_warm_up(self, error: BaseException) -> None:
        """Have the warm-up that waits for a read raise `error`; nothing if there is none."""
        ...

    def resize(self, num_bytes: int | None) -> None:
        """Change the budget while serving; None: everything owned.

        More is there at once; less is given back as calls let go of it, soon.

        Raises: UsageError: less than two of the largest expert.
        """
        ...

    def set_verify(self, verify: Verify) -> None: ...

    def set_pace(
        self, queue_depth: int | None, bytes_per_s: float | None, *, allows_prefetch: bool
    ) -> None:
        """Read with at most that many chunks at the device, and that many bytes a second.

        None: what the store chose itself; no limit. Without `allows_prefetch`, `prefetch` starts
        nothing. Holds for reads to come, also before the first.
        """
        ...

    def pin(self, keys: Collection[Key]) -> int:
        """Pin these and no others (see StoreOptions.pins). Returns how many can be pinned."""
        ...

    def rebind(self, files: ExpertFiles, ownership: Ownership) -> None:
        """Serve from other files of the same identity, or own other experts.

        What is in memory stays; experts that are no longer owned leave. Calls under way end as
        they began.

        Raises: NotOwned: `files` lacks an owned expert. UsageError: another identity, or too
            small a budget. Then nothing has changed.
        """
        ...

    def figures(self) -> StoreFigures: ...
