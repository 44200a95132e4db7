"""Which call a node computes next, and which it turns away (core).

Rules of this file: at most one call runs (it has all threads); at most `max_waiting` wait; a call
of the interactive lane goes before any of the bulk lane, within a lane first come first served; a
call whose deadline has passed is never started; once draining, nothing new comes in. Every call
that was admitted leaves exactly once: by `finish`, or as one that `expire`, `cancel`, `drop_stream`
or `start_next` returned.

    admit --> WAITING --start_next--> RUNNING --finish--> gone
       |         |--deadline passed (start_next, expire)--> gone
       |         `--cancel, drop_stream-------------------> gone
       `--> refused: full, draining
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum


class Lane(IntEnum):
    """What a stream carries; the values travel on the wire."""

    INTERACTIVE = 1
    BULK = 2


class Refusal(Enum):
    """Why a call was not admitted."""

    FULL = "full"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Ticket:
    """A call as admission sees it; (stream_id, call_id) is its key, unique among calls held."""

    stream_id: int
    call_id: int
    lane: Lane
    received_s: float
    deadline_s: float

    @property
    def key(self) -> tuple[int, int]:
        return self.stream_id, self.call_id


@dataclass(frozen=True, slots=True)
class Next:
    """start: the call that is RUNNING from now on; expired: calls that left, their time over."""

    start: Ticket | None
    expired: tuple[Ticket, ...] = ()


class Admission:
    """The calls that a node holds, waiting or running."""

    def __init__(self, max_waiting: int) -> None:
        assert max_waiting >= 1, max_waiting
        self._max_waiting = max_waiting
        # Per lane, in order of arrival; a dict because a cancelled call leaves from the middle.
        self._waiting: dict[Lane, dict[tuple[int, int], Ticket]] = {lane: {} for lane in Lane}
        self._running: Ticket | None = None
        self._is_draining = False

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> Ticket | None:
        return self._running

    @property
    def num_held(self) -> int:
        return self.num_waiting + (self._running is not None)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def admit(self, ticket: Ticket) -> Refusal | None:
        """Take a call in, or say why not. Its key must not be held."""
        if self._is_draining:
            return Refusal.DRAINING
        if self.num_waiting >= self._max_waiting:
            return Refusal.FULL
        assert ticket.key not in self._waiting[ticket.lane], f"{ticket.key} admitted twice"
        self._waiting[ticket.lane][ticket.key] = ticket
        return None

    def start_next(self, now_s: float) -> Next:
        """Choose the call to run, unless one is running."""
        if self._running is not None:
            return Next(None)
        expired: list[Ticket] = []
        for queue in self._waiting.values():  # Lane order: interactive first
            while queue:
                ticket = queue.pop(next(iter(queue)))
                if ticket.deadline_s > now_s:
                    self._running = ticket
                    return Next(ticket, tuple(expired))
                expired.append(ticket)
        return Next(None, tuple(expired))

    def finish(self, key: tuple[int, int]) -> None:
        """The running call is done, however it ended."""
        assert self._running is not None and self._running.key == key, (key, self._running)
        self._running = None

    def expire(self, now_s: float) -> tuple[Ticket, ...]:
        """Take out the waiting calls whose deadline has passed."""
        return self._take(lambda ticket: ticket.deadline_s <= now_s)

    def cancel(self, key: tuple[int, int]) -> Ticket | None:
        """Take out a waiting call. None: it is running, or not held."""
        for queue in self._waiting.values():
            if key in queue:
                return queue.pop(key)
        return None

    def drop_stream(self, stream_id: int) -> tuple[Ticket, ...]:
        """Take out all waiting calls of a stream that broke."""
        return self._take(lambda ticket: ticket.stream_id == stream_id)

    def drain(self) -> None:
        """Admit nothing from now on; what is held goes on."""
        self._is_draining = True

    def held_since(self, before_s: float) -> tuple[Ticket, ...]:
        """Return the calls received at or before `before_s` that are still held."""
        held = [ticket for queue in self._waiting.values() for ticket in queue.values()]
        held += [self._running] if self._running is not None else []
        return tuple(ticket for ticket in held if ticket.received_s <= before_s)

    def check_integrity(self) -> None:
        """Assert the rules of this file."""
        assert self.num_waiting <= self._max_waiting
        keys = [ticket.key for ticket in self.held_since(float("inf"))]
        assert len(set(keys)) == len(keys), "a call is held twice"
        for lane, queue in self._waiting.items():
            assert all(ticket.lane is lane for ticket in queue.values())
            arrivals = [ticket.received_s for ticket in queue.values()]
            assert arrivals == sorted(arrivals), "a lane is first come first served"

    def _take(self, leaves: Callable[[Ticket], bool]) -> tuple[Ticket, ...]:
        gone = [
            ticket
            for queue in self._waiting.values()
            for ticket in queue.values()
            if leaves(ticket)
        ]
        for ticket in gone:
            del self._waiting[ticket.lane][ticket.key]
        return tuple(gone)
