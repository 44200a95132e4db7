"""What the dispatch core is told, and what it wants done (core).

Events are past facts and carry the time at which they were noticed; commands are imperatives. A
node is a number that stands for one endpoint for ever; an *attempt* is one sending of a call to one
node, with an id that no other attempt has. A call's first attempt has the call's own id.
"""

from dataclasses import dataclass
from enum import IntEnum

from shoal.errors import ShoalError


class Lane(IntEnum):
    """The connection that a call travels on; values as in shoal.v1.Lane."""

    INTERACTIVE = 1
    BULK = 2


# Events on the path of every call are plain dataclasses: a frozen one costs a microsecond to make.


@dataclass(slots=True)
class NewCall:
    """A call to make.

    candidates: nodes that own its experts, the preferred one first.
    num_bytes: of its request, what it costs of a stream's credit.
    work: about how long it takes a node, in units that are the same for all calls.
    """

    call_id: int
    candidates: tuple[int, ...]
    lane: Lane
    num_bytes: int
    work: float


@dataclass(slots=True)
class FanoutStarted:
    fanout_id: int
    calls: tuple[NewCall, ...]
    now_s: float


@dataclass(slots=True)
class Replied:
    """busy_s: how long the node had it. load_s, queue_s: of that it read experts, it waited."""

    attempt_id: int
    node: int
    now_s: float
    busy_s: float = 0.0
    load_s: float = 0.0
    queue_s: float = 0.0


@dataclass(slots=True)
class Answered:
    """A call of a fan-out that ran ahead, sent when it says."""

    call: NewCall
    reply: Replied
    sent_s: float


@dataclass(slots=True)
class RanAhead:
    """Calls of fan-outs that were sent as `followers` said, and all of these were answered."""

    answered: list[Answered]


@dataclass(slots=True)
class Adopted:
    """A fan-out that ran ahead has to be looked after: these of its calls have no answer.

    nodes: where each call was sent, under its own id.
    """

    fanout_id: int
    calls: tuple[NewCall, ...]
    nodes: tuple[int, ...]
    sent_s: float
    now_s: float


@dataclass(slots=True)
class Ticked:
    now_s: float


@dataclass(frozen=True, slots=True)
class NodeOpened:
    """A node's streams are open and it is what it must be.

    credit_bytes: of each stream. rtt_s: how long Open took.
    is_same_process: it has not been restarted since it was lost.
    """

    node: int
    credit_bytes: int
    rtt_s: float
    is_same_process: bool
    now_s: float


@dataclass(frozen=True, slots=True)
class NodeLost:
    """Its connection broke. broke_protocol: the fault is what it said, not the network's."""

    node: int
    error: ShoalError
    broke_protocol: bool
    now_s: float


@dataclass(frozen=True, slots=True)
class NodeAbsent:
    """A lost node cannot be met again for now: that was more than a broken connection."""

    node: int
    error: ShoalError
    now_s: float


@dataclass(frozen=True, slots=True)
class NodeDraining:
    node: int
    error: ShoalError
    now_s: float


@dataclass(frozen=True, slots=True)
class NodeRetired:
    """The shard map names it no more: what it has is finished, then it is released."""

    node: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class FanoutAbandoned:
    fanout_id: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The node ended an attempt with a failure. is_final: no other node would do better."""

    attempt_id: int
    node: int
    error: ShoalError
    is_final: bool
    now_s: float


@dataclass(frozen=True, slots=True)
class Progressed:
    """The node says that it holds these attempts."""

    node: int
    attempt_ids: tuple[int, ...]
    now_s: float


Event = (
    NodeOpened
    | NodeLost
    | NodeAbsent
    | NodeDraining
    | NodeRetired
    | FanoutStarted
    | FanoutAbandoned
    | Replied
    | RanAhead
    | Adopted
    | Failed
    | Progressed
    | Ticked
)


@dataclass(slots=True)
class Send:
    """Send this call to that node, under the attempt's id."""

    attempt_id: int
    call_id: int
    node: int
    lane: Lane


@dataclass(slots=True)
class Accept:
    """The reply just reported counts, whole: keep its sums for this call."""

    call_id: int


@dataclass(slots=True)
class Finish:
    fanout_id: int


@dataclass(frozen=True, slots=True)
class Cancel:
    attempt_id: int
    node: int
    lane: Lane


@dataclass(frozen=True, slots=True)
class Fail:
    fanout_id: int
    call_id: int
    error: ShoalError


@dataclass(frozen=True, slots=True)
class TimeOut:
    """Fail: this node went on working on the call for longer than a call may take."""

    fanout_id: int
    call_id: int
    node: int


@dataclass(frozen=True, slots=True)
class GiveUpWaiting:
    """Fail: no node came that could take this call. errors: why its nodes did not."""

    fanout_id: int
    call_id: int
    errors: tuple[ShoalError, ...]


@dataclass(frozen=True, slots=True)
class CloseNode:
    """A node is dead though its connection stands: close it. It is lost already."""

    node: int
    silent_s: float


@dataclass(frozen=True, slots=True)
class ReleaseNode:
    """A retired node has nothing left to do: close it for good."""

    node: int


Command = Send | Accept | Finish | Cancel | Fail | TimeOut | GiveUpWaiting | CloseNode | ReleaseNode
