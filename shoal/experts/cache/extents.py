"""Extents: which parts of an arena are free (core).

Addresses count through the segments of the arena, with a gap after each, so that no extent reaches
over the end of one. A limit closes what lies beyond it: nothing new is placed there.
"""

from bisect import bisect_left, insort
from itertools import pairwise

GAP_BYTES = 4096  # between segments: free extents on its two sides never merge


class Extents:
    """First fit. Sizes are multiples of 4096; few are free at a time, so a list will do."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, int]] = []  # (address, bytes), ascending
        self.limit = 0  # addresses at and beyond it are closed
        self._free: list[tuple[int, int]] = []  # (address, bytes), ascending, never adjacent

    @property
    def capacity(self) -> int:
        """Bytes of all segments, open or closed."""
        return sum(num_bytes for _, num_bytes in self.segments)

    def grow(self, num_bytes: int) -> int:
        """Add a segment; return its address. Open up what it holds with `set_open_bytes`."""
        last, last_bytes = self.segments[-1] if self.segments else (0, -GAP_BYTES)
        address = last + last_bytes + GAP_BYTES
        self.segments.append((address, num_bytes))
        self._free.append((address, num_bytes))
        return address

    def set_open_bytes(self, num_bytes: int) -> None:
        """Open the first `num_bytes` of the segments and close the others."""
        assert num_bytes <= self.capacity, (num_bytes, self.capacity)
        self.limit = 0
        for address, size in self.segments:
            if num_bytes <= 0:
                break
            self.limit = address + min(size, num_bytes)
            num_bytes -= size

    def place(self, num_bytes: int) -> int | None:
        """Take the first open extent of that size; None: there is none."""
        for index, (address, free) in enumerate(self._free):
            if address + num_bytes > self.limit:
                return None
            if free >= num_bytes:
                if free == num_bytes:
                    del self._free[index]
                else:
                    self._free[index] = (address + num_bytes, free - num_bytes)
                return address
        return None

    def free_from(self, address: int) -> tuple[int, int] | None:
        """Return the first (address, bytes) at or after that address that is free and open."""
        for start, num_bytes in self._free:
            first, end = max(start, address), min(start + num_bytes, self.limit)
            if first < end:
                return first, end - first
        return None

    def give(self, address: int, num_bytes: int) -> None:
        """Free an extent that was placed."""
        index = bisect_left(self._free, (address, 0))
        if index < len(self._free) and self._free[index][0] == address + num_bytes:
            num_bytes += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == address:
            address, before = self._free.pop(index - 1)
            num_bytes += before
        insort(self._free, (address, num_bytes))

    def num_places_beside(self, kept: list[tuple[int, int]], num_bytes: int) -> int:
        """How many extents of that size would fit if only the `kept` ones were taken."""
        places = 0
        taken = sorted(kept)
        for start, size in self.segments:
            end = min(start + size, self.limit)
            at = start
            for address, length in taken:
                if start <= address < end:
                    places += max(0, address - at) // num_bytes
                    at = address + length
            places += max(0, end - at) // num_bytes
        return places

    def num_places_of(self, num_bytes: int, open_bytes: int) -> int:
        """How many extents of that size would fit if so many bytes were open, grown if need be."""
        sizes = [size for _, size in self.segments]
        sizes.append(max(0, open_bytes - self.capacity))
        places = 0
        for size in sizes:
            places += max(0, min(size, open_bytes)) // num_bytes
            open_bytes -= size
        return places

    def drop_closed_segments(self) -> list[int]:
        """Forget the segments that lie beyond the limit whole and free; return their addresses."""
        dropped: list[int] = []
        while self.segments and self.segments[-1][0] >= self.limit:
            if self.segments[-1] not in self._free:
                break
            self._free.remove(self.segments[-1])
            dropped.append(self.segments.pop()[0])
        return dropped

    def is_closed_part_free(self) -> bool:
        """Whether nothing placed reaches beyond the limit."""
        closed = sum(max(0, a + n - max(a, self.limit)) for a, n in self.segments)
        free = sum(max(0, a + n - max(a, self.limit)) for a, n in self._free)
        return closed == free

    def check_integrity(self, taken: list[tuple[int, int]]) -> None:
        """Assert that `taken` and the free extents tile the segments."""
        pieces = sorted([*taken, *self._free])
        for (address, size), (following, _) in pairwise(pieces):
            assert address + size <= following, "two extents overlap"
        assert sum(size for _, size in pieces) == self.capacity, "bytes were lost"
        for address, size in pieces:
            assert any(a <= address and address + size <= a + n for a, n in self.segments)
        for (address, size), (following, _) in pairwise(self._free):
            assert address + size < following, "free neighbours were not joined"
