"""The part of a simulated shell that runs fan-outs ahead of the core (coordinator/run_ahead.py)."""

from typing import TYPE_CHECKING

from coordinator.dispatch_events import (
    Adopted,
    Answered,
    Event,
    NewCall,
    NodeAbsent,
    NodeOpened,
    NodeRetired,
    RanAhead,
    Replied,
    Send,
    Ticked,
)
from coordinator.run_ahead import MAX_UNTOLD, Follower

if TYPE_CHECKING:
    from support.dispatch_simulator import World


class SimAhead:
    """Fan-outs of a world that run ahead, one at a time. Worlds of even seeds never ask for any.

    The core is asked again only after it was told of something, and told of those that went well
    when it is told of anything else, or when there are many.
    """

    def __init__(self, world: "World") -> None:
        self._world = world
        self._standing: dict[tuple[int, ...], Follower] = {}  # by candidates
        self._fanout_id = 0  # 0: none
        self._sent_s = 0.0
        self._left: dict[int, tuple[NewCall, int]] = {}  # and its node
        self._answered: list[Answered] = []
        self._untold: list[RanAhead] = []
        self.num_started = self.num_adopted = self.num_unasked = 0

    def starts(self, fanout_id: int, calls: list[NewCall]) -> bool:
        """Send a fan-out, if the core agrees."""
        world = self._world
        if self._fanout_id or world.seed % 2 == 0:
            return False
        slots = list(dict.fromkeys(call.candidates for call in calls))
        if all(slot in self._standing for slot in slots):
            self.num_unasked += 1
        else:
            self.tell()
            found = world.core.followers(slots, calls[0].work, world.now_s)
            world.core.check_integrity()
            for slot, follower in zip(slots, found or (), strict=False):
                if follower is not None:
                    self._standing[slot] = follower
        leads = [self._standing.get(call.candidates) for call in calls]
        nodes = [lead.node for lead in leads if lead is not None]
        if len(set(nodes)) < len(calls):
            return False
        assert world.core.is_idle
        self._fanout_id, self._sent_s = fanout_id, world.now_s
        self._left = {call.call_id: (call, node) for call, node in zip(calls, nodes, strict=True)}
        self._answered = []
        self.num_started += 1
        for call, node in self._left.values():
            world.send(Send(call.call_id, call.call_id, node, call.lane))
        patience_s = min(
            lead.patience_s(call.work)
            for lead, call in zip(leads, calls, strict=True)
            if lead is not None
        )
        assert patience_s > 0.0
        world.at(patience_s, lambda: self.end(fanout_id))
        return True

    def takes(self, event: Event) -> bool:
        """Take an answer to what runs ahead; anything else is the core's, which is told first."""
        if isinstance(event, Replied) and self._fanout_id:
            call, node = self._left.get(event.attempt_id, (None, -1))
            if call is not None and node == event.node:
                self._answered.append(Answered(call, event, self._sent_s))
                del self._left[event.attempt_id]
                if not self._left:
                    self._end_well()
                return True
        if self._fanout_id and not isinstance(
            event, Ticked | NodeOpened | NodeAbsent | NodeRetired
        ):
            self.end()
        self.tell()
        return False

    def tell(self) -> None:
        """Tell the core of what went well; it is asked anew after it."""
        self._standing.clear()
        for event in self._untold:
            self._world.core.on(event)
        self._untold.clear()

    def _end_well(self) -> None:
        mine, self._fanout_id = self._fanout_id, 0
        self._untold.append(RanAhead(self._answered))
        for answer in self._answered:
            self._world.unanswered[mine].remove(answer.call.call_id)
        self._world.end(mine, "finished")
        if len(self._untold) >= MAX_UNTOLD:
            self.tell()

    def end(self, fanout_id: int | None = None) -> None:
        """Have the core look after what has no answer yet. Another fan-out's end: nothing."""
        world, mine = self._world, self._fanout_id
        if not mine or fanout_id not in (None, mine):
            return
        self._fanout_id = 0
        self.tell()
        for answer in self._answered:
            world.unanswered[mine].remove(answer.call.call_id)
        world.core.on(RanAhead(self._answered))
        self.num_adopted += 1
        calls, nodes = zip(*self._left.values(), strict=True)
        world.feed(Adopted(mine, calls, nodes, self._sent_s, world.now_s))
