"""Which call a node computes next, and which it turns away (core).

Rules of this file: at most one call runs (it has all threads); calls whose experts must be read
first do not stand in its way: they wait in a queue of their own, and at most `max_loading` of them
wait for reads together, bulk ones at most half of that. At most `max_waiting` calls wait in the
queues; a call of the interactive lane goes before any of the bulk lane, within a lane first come
first served; a call whose deadline has passed is never started; once draining, nothing new comes
in. Every call that was admitted leaves exactly once: by `finish`, or as one that `expire`,
`cancel`, `drop_stream`, `start_next` or `start_loading` returned.

    admit --> WAITING --start_next--> RUNNING --finish--> gone
       |         |                       `--must_load--> TO LOAD
       |         |--deadline passed (start_*, expire)--> gone
       |         `--cancel, drop_stream----------------> gone
       |--> TO LOAD --start_loading--> LOADING --finish--> gone     (and as WAITING)
       `--> refused: full, draining
"""

from collections.abc import Callable, Iterable
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


class _Queue:
    """Calls that wait, interactive ones first, within a lane in order of arrival."""

    def __init__(self) -> None:
        # A dict because a cancelled call leaves from the middle.
        self.lanes: dict[Lane, dict[tuple[int, int], Ticket]] = {lane: {} for lane in Lane}

    def __len__(self) -> int:
        return sum(map(len, self.lanes.values()))

    def tickets(self) -> list[Ticket]:
        return [ticket for lane in self.lanes.values() for ticket in lane.values()]

    def append(self, ticket: Ticket) -> None:
        lane = self.lanes[ticket.lane]
        assert ticket.key not in lane, f"{ticket.key} admitted twice"
        lane[ticket.key] = ticket

    def insert(self, ticket: Ticket) -> None:
        """Put a ticket where its time of arrival belongs."""
        later = [t for t in self.lanes[ticket.lane].values() if t.received_s > ticket.received_s]
        for other in later:
            del self.lanes[ticket.lane][other.key]
        for other in (ticket, *later):
            self.append(other)

    def take_first(self, lanes: Iterable[Lane], now_s: float) -> tuple[Ticket | None, list[Ticket]]:
        """Take the first call of these lanes that has time left, and those before it without."""
        expired: list[Ticket] = []
        for lane in lanes:
            queue = self.lanes[lane]
            while queue:
                ticket = queue.pop(next(iter(queue)))
                if ticket.deadline_s > now_s:
                    return ticket, expired
                expired.append(ticket)
        return None, expired

    def take(self, leaves: Callable[[Ticket], bool]) -> list[Ticket]:
        gone = [ticket for ticket in self.tickets() if leaves(ticket)]
        for ticket in gone:
            del self.lanes[ticket.lane][ticket.key]
        return gone


class Admission:
    """The calls that a node holds: waiting, running, or waiting for reads."""

    def __init__(self, max_waiting: int, max_loading: int = 1) -> None:
        assert max_waiting >= 1 and max_loading >= 1, (max_waiting, max_loading)
        self._max_waiting = max_waiting
        self._max_loading = max_loading
        self._waiting = _Queue()
        self._to_load = _Queue()
        self._running: Ticket | None = None
        self._loading: dict[tuple[int, int], Ticket] = {}
        self._is_draining = False

    def set_max_waiting(self, max_waiting: int) -> None:
        """Refuse calls beyond that many from now on; those that wait already stay."""
        assert max_waiting >= 1, max_waiting
        self._max_waiting = max_waiting

    @property
    def num_waiting(self) -> int:
        """Calls that nothing is done for yet."""
        return len(self._waiting) + len(self._to_load)

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    @property
    def running(self) -> Ticket | None:
        return self._running

    @property
    def num_held(self) -> int:
        return self.num_waiting + len(self._loading) + (self._running is not None)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def admit(self, ticket: Ticket, *, must_load: bool = False) -> Refusal | None:
        """Take a call in, or say why not. Its key must not be held."""
        if self._is_draining:
            return Refusal.DRAINING
        if self.num_waiting >= self._max_waiting:
            return Refusal.FULL
        (self._to_load if must_load else self._waiting).append(ticket)
        return None

    def start_next(self, now_s: float) -> Next:
        """Choose the call to run, unless one is running."""
        if self._running is not None:
            return Next(None)
        self._running, expired = self._waiting.take_first(Lane, now_s)
        return Next(self._running, tuple(expired))

    def must_load(self) -> None:
        """The running call turned out to need reads: another may run, it waits to load."""
        assert self._running is not None, "nothing runs"
        self._to_load.insert(self._running)
        self._running = None

    def start_loading(self, now_s: float) -> Next:
        """Choose a call that waits for its reads from now on, unless enough do."""
        if len(self._loading) >= self._max_loading:
            return Next(None)
        num_bulk = sum(ticket.lane is Lane.BULK for ticket in self._loading.values())
        may_be_bulk = num_bulk < max(1, self._max_loading // 2)
        lanes = Lane if may_be_bulk else (Lane.INTERACTIVE,)
        start, expired = self._to_load.take_first(lanes, now_s)
        if start is not None:
            self._loading[start.key] = start
        return Next(start, tuple(expired))

    def finish(self, key: tuple[int, int]) -> None:
        """A running or loading call is done, however it ended."""
        if self._running is not None and self._running.key == key:
            self._running = None
        else:
            assert key in self._loading, (key, self._running)
            del self._loading[key]

    def expire(self, now_s: float) -> tuple[Ticket, ...]:
        """Take out the waiting calls whose deadline has passed."""
        return self._take(lambda ticket: ticket.deadline_s <= now_s)

    def overdue(self, now_s: float) -> tuple[Ticket, ...]:
        """Return the loading calls whose deadline has passed; they leave by `finish`."""
        return tuple(t for t in self._loading.values() if t.deadline_s <= now_s)

    def cancel(self, key: tuple[int, int]) -> Ticket | None:
        """Take out a waiting call. None: it is running, loading, or not held."""
        gone = self._take(lambda ticket: ticket.key == key)
        return gone[0] if gone else None

    def drop_stream(self, stream_id: int) -> tuple[Ticket, ...]:
        """Take out all waiting calls of a stream that broke."""
        return self._take(lambda ticket: ticket.stream_id == stream_id)

    def drain(self) -> None:
        """Admit nothing from now on; what is held goes on."""
        self._is_draining = True

    def held_since(self, before_s: float) -> tuple[Ticket, ...]:
        """Return the calls received at or before `before_s` that are still held."""
        held = [*self._waiting.tickets(), *self._to_load.tickets(), *self._loading.values()]
        held += [self._running] if self._running is not None else []
        return tuple(ticket for ticket in held if ticket.received_s <= before_s)

    def check_integrity(self) -> None:
        """Assert the rules of this file."""
        assert len(self._loading) <= self._max_loading
        keys = [ticket.key for ticket in self.held_since(float("inf"))]
        assert len(set(keys)) == len(keys), "a call is held twice"
        for queue in (self._waiting, self._to_load):
            for lane, tickets in queue.lanes.items():
                assert all(ticket.lane is lane for ticket in tickets.values())
                arrivals = [ticket.received_s for ticket in tickets.values()]
                assert arrivals == sorted(arrivals), "a lane is first come first served"

    def _take(self, leaves: Callable[[Ticket], bool]) -> tuple[Ticket, ...]:
        return (*self._waiting.take(leaves), *self._to_load.take(leaves))
