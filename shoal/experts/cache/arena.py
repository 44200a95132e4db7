"""Arena: the memory that experts lie in: huge pages, given back to the system when it shrinks."""

import mmap
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]

_HUGE_PAGE = 2 << 20


class _Segment:
    """Fresh zero pages, touched as they are written, from a 2 MiB boundary on."""

    def __init__(self, num_bytes: int) -> None:
        size = num_bytes + _HUGE_PAGE
        if hasattr(mmap, "MAP_PRIVATE"):
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._map = mmap.mmap(-1, size)
        whole = np.frombuffer(self._map, np.uint8)
        self._start = -whole.ctypes.data % _HUGE_PAGE
        self.memory = whole[self._start : self._start + num_bytes]
        if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= _HUGE_PAGE:
            self._map.madvise(mmap.MADV_HUGEPAGE, self._start, num_bytes)

    def give_back(self, start: int) -> None:
        """Let the system have the pages from `start` (a multiple of 4096) on; zeros come back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            length = self.memory.nbytes - start
            self._map.madvise(mmap.MADV_DONTNEED, self._start + start, length)


class Arena:
    """Segments by the addresses that `Extents` gives them.

    A dropped segment's memory is unmapped when the last view of it is gone.
    """

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._segments: list[_Segment] = []

    def grow(self, address: int, num_bytes: int) -> None:
        """Map a segment. Raises OSError where the system has no such memory."""
        self._segments.append(_Segment(num_bytes))
        self._addresses.append(address)

    def view(self, address: int, num_bytes: int) -> U8:
        """Return the memory of an extent."""
        index = bisect_right(self._addresses, address) - 1
        start = address - self._addresses[index]
        return self._segments[index].memory[start : start + num_bytes]

    def parts_below(self, limit: int) -> list[U8]:
        """Return the memory of all addresses below `limit`, a view a segment."""
        parts = zip(self._addresses, self._segments, strict=True)
        return [s.memory[: limit - address] for address, s in parts if address < limit]

    def give_back_from(self, limit: int) -> None:
        """Let the system have the pages of all addresses from `limit` on."""
        for address, segment in zip(self._addresses, self._segments, strict=True):
            start = max(0, limit - address)
            if start < segment.memory.nbytes:
                segment.give_back(start)

    def drop(self, address: int) -> None:
        """Forget the segment at that address."""
        index = self._addresses.index(address)
        del self._addresses[index], self._segments[index]
