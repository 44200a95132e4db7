"""What an ExpertCache keeps of an expert, of a call that waits, and of the past (core)."""

from collections import deque
from typing import Any

from shoal.experts.cache.policy import Key


class Entry:
    """An expert that is in memory or on its way. The shell may only read it, and write `payload`.

    address: of its place in the arena; meaningless while QUEUED.
    payload: the shell's: its memory.
    """

    __slots__ = (
        "address",
        "is_demanded",
        "is_doomed",
        "is_loading",
        "is_prefetch",
        "is_ready",
        "key",
        "num_bytes",
        "payload",
        "refs",
        "waiters",
    )

    def __init__(self, key: Key, num_bytes: int) -> None:
        self.key = key
        self.num_bytes = num_bytes
        self.address = 0
        self.refs = 0
        self.waiters: list[Demand] = []
        self.is_loading = False
        self.is_ready = False
        self.is_demanded = False  # LOADING, and counted among the demands' reads
        self.is_prefetch = False  # read for nobody, and not used yet
        self.is_doomed = False
        self.payload: Any = None

    @property
    def is_queued(self) -> bool:
        """Whether somebody waits for its read to start."""
        return bool(self.waiters) and not self.is_loading


class Demand:
    """What a call still waits for. The shell may only read it, and write `payload`.

    waiting: entry -> its position in what was asked for.
    granted: (position, entry) of experts that came and are held for the call, not yet taken.
    error: why one of them will not come.
    """

    __slots__ = ("error", "granted", "payload", "queued", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Entry, int] = {}
        self.granted: list[tuple[int, Entry]] = []
        self.queued: deque[Entry] = deque()
        self.error: BaseException | None = None
        self.payload: Any = None


class Counters:
    """Totals since the cache was made; see StoreFigures."""

    def __init__(self) -> None:
        self.hits = self.misses = self.joined = self.evictions = 0
        self.prefetch_issued = self.prefetch_used = self.prefetch_wasted = 0
        self.prefetch_issued_bytes = self.prefetch_used_bytes = self.prefetch_wasted_bytes = 0
