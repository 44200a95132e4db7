"""ResidentStore: every owned expert in one arena of huge pages, read on first use or at warm-up.

Bytes go from the expert file straight into their place in the arena and are checked there against
the manifest's hash; nothing is parsed or copied. An expert that fails its check is never given out.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.reader import ExpertLocation, read_checked
from shoal.experts.ownership import Ownership
from shoal.experts.store import ExpertFiles, WarmUpProgress, Wave

WARM_UP_READERS = 4  # reads in flight: enough to keep an NVMe drive busy while others are hashed


class ReadExpert(Protocol):
    """Fills memory from a file and checks its hash: `shoal.artifact.reader.read_checked`."""

    def __call__(
        self, path: Path, offset: int, out: NDArray[np.uint8], blake3: str, what: str
    ) -> None: ...


@dataclass(slots=True)
class _Slot:
    location: ExpertLocation
    memory: NDArray[np.uint8]  # its whole place in the arena
    weights: NDArray[np.uint8]  # the part that the layout uses
    is_loading: bool = False


class ResidentAcquisition:
    """Experts of a store that never evicts: one wave, and nothing to release."""

    __slots__ = ("_weights", "is_whole", "load_s")

    def __init__(self, weights: list[NDArray[np.uint8]], load_s: float) -> None:
        self._weights = weights
        self.is_whole = True
        self.load_s = load_s

    def abandon(self, error: BaseException) -> None:
        """There is no wait to end."""

    def __iter__(self) -> Iterator[Wave]:
        yield Wave(range(len(self._weights)), self._weights)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class ResidentStore:
    """An `ExpertStore` whose arena holds all that it owns. Thread-safe.

    Memory is reserved at once and touched as experts are read: an unused expert costs no RAM.
    Concurrent demands for one expert are one read.
    """

    def __init__(
        self, files: ExpertFiles, ownership: Ownership, *, read: ReadExpert = read_checked
    ) -> None:
        """Lay out the arena; reads nothing. Raises NotOwned if `files` lacks an owned expert."""
        self.ownership = ownership
        self._read = read
        locations = {
            (layer, index): files.expert_location(layer, index)
            for layer in ownership.layers
            for index in ownership.experts(layer)
        }
        self.num_bytes = sum(location.num_bytes for location in locations.values())
        self._arena = ops.aligned_empty(max(self.num_bytes, 1), huge=True)
        used = {layer: files.expert_layout(layer).num_bytes for layer in ownership.layers}
        self._slots: dict[tuple[int, int], _Slot] = {}
        # Filled as experts pass their check; read without the lock.
        self._ready: dict[int, dict[int, NDArray[np.uint8]]] = {
            layer: {} for layer in ownership.layers
        }
        self._changed = threading.Condition()
        start = 0
        for (layer, index), location in locations.items():
            memory = self._arena[start : start + location.num_bytes]
            self._slots[layer, index] = _Slot(location, memory, memory[: used[layer]])
            start += location.num_bytes

    def acquire(self, layer: int, experts: Sequence[int]) -> ResidentAcquisition:
        """See `ExpertStore.acquire`."""
        try:
            ready = self._ready[layer]
            return ResidentAcquisition([ready[index] for index in experts], 0.0)
        except KeyError:
            self.ownership.check(layer, experts)
        began_s = time.perf_counter()
        self._load(layer, experts)
        ready = self._ready[layer]
        return ResidentAcquisition(
            [ready[index] for index in experts], time.perf_counter() - began_s
        )

    def is_resident(self, layer: int, experts: Sequence[int]) -> bool:
        """See `ExpertStore.is_resident`."""
        return layer in self._ready and self._ready[layer].keys() >= set(experts)

    def warm_up(self, report: Callable[[WarmUpProgress], None]) -> None:
        """Read everything owned; call `report` from this thread after each expert.

        Raises:
            CorruptArtifact: naming the first expert that failed; OSError.
        """
        began_s = time.perf_counter()
        done_bytes = 0
        with ThreadPoolExecutor(WARM_UP_READERS, "shoal-warm-up") as readers:
            try:
                futures = {
                    readers.submit(self._load, layer, [index]): slot.location.num_bytes
                    for (layer, index), slot in self._slots.items()
                }
                for position, (future, num_bytes) in enumerate(futures.items(), start=1):
                    future.result()
                    done_bytes += num_bytes
                    elapsed_s = time.perf_counter() - began_s
                    total = len(futures)
                    report(WarmUpProgress(position, total, done_bytes, self.num_bytes, elapsed_s))
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        """Forget every expert; memory goes back when the last view is gone."""
        self._ready = {}
        self._slots = {}
        del self._arena

    def _load(self, layer: int, experts: Sequence[int]) -> None:
        # Make all of them ready: read those that nobody is reading, then wait for the others. A
        # reader that fails leaves its expert unread, so that whoever waited tries (and fails) too.
        ready = self._ready[layer]
        while True:
            with self._changed:
                missing = [index for index in experts if index not in ready]
                if not missing:
                    return
                mine = [i for i in missing if not self._slots[layer, i].is_loading]
                for index in mine:
                    self._slots[layer, index].is_loading = True
                if not mine:
                    self._changed.wait()
                    continue
            self._read_all(layer, mine)

    def _read_all(self, layer: int, experts: Sequence[int]) -> None:
        unread = list(experts)
        try:
            while unread:
                slot = self._slots[layer, unread[0]]
                where = slot.location
                name = f"expert {unread[0]} of layer {layer}"
                self._read(where.path, where.offset, slot.memory, where.blake3, name)
                with self._changed:
                    self._ready[layer][unread.pop(0)] = slot.weights
                    slot.is_loading = False
                    self._changed.notify_all()
        finally:
            with self._changed:
                for index in unread:
                    self._slots[layer, index].is_loading = False
                self._changed.notify_all()
