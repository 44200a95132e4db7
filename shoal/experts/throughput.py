"""Throughput: bytes a second while reads are under way, lately (core)."""

REMEMBERED_S = 2.0  # of reading; what lies further back counts half, then a quarter


class Throughput:
    """Counts the time in which at least one read was under way, once."""

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._num_bytes = 0.0
        self._last_s = float("-inf")

    def note(self, num_bytes: int, seconds: float, now_s: float) -> None:
        """A read of so many bytes, begun `seconds` ago, has ended."""
        self._busy_s += max(0.0, now_s - max(self._last_s, now_s - seconds))
        self._last_s = now_s
        self._num_bytes += num_bytes
        if self._busy_s > REMEMBERED_S:
            self._busy_s /= 2
            self._num_bytes /= 2

    @property
    def bytes_per_s(self) -> float:
        """0.0 before the first read."""
        return self._num_bytes / self._busy_s if self._busy_s > 0 else 0.0
