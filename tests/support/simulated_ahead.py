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

if TYPE_CHECKING:
    from support.dispatch_simulator import World


class SimAhead:
    """At most one fan-out of a world that runs ahead. Worlds of even seeds never ask for any."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._fanout_id = 0  # 0: none
        self._sent_s = 0.0
        self._left: dict[int, tuple[NewCall, int]] = {}  # and its node
        self._answered: list[Answered] = []
        self.num_started = self.num_adopted = 0

    def starts(self, fanout_id: int, calls: list[NewCall]) -> bool:
        """Send a fan-out, if the core agrees."""
        world = self._world
        if self._fanout_id or world.seed % 2 == 0:
            return False
        lead = world.core.run_ahead(calls, world.now_s)
        world.core.check_integrity()
        if lead is None:
            return False
        assert lead.until_s > world.now_s and world.core.is_idle
        self._fanout_id, self._sent_s = fanout_id, world.now_s
        placed = zip(calls, lead.nodes, strict=True)
        self._left = {call.call_id: (call, node) for call, node in placed}
        self._answered = []
        self.num_started += 1
        for call, node in self._left.values():
            world.send(Send(call.call_id, call.call_id, node, call.lane))
        world.at(lead.until_s - world.now_s, lambda: self.end(fanout_id))
        return True

    def takes(self, event: Event) -> bool:
        """Take an answer to what runs ahead; anything else from a node is the core's."""
        if not self._fanout_id:
            return False
        if isinstance(event, Replied):
            call, node = self._left.get(event.attempt_id, (None, -1))
            if call is None or node != event.node:
                return False
            self._answered.append(Answered(call, event))
            del self._left[event.attempt_id]
            if not self._left:
                self.end()
            return True
        if not isinstance(event, Ticked | NodeOpened | NodeAbsent | NodeRetired):
            self.end()
        return False

    def end(self, fanout_id: int | None = None) -> None:
        """Tell the core; what has no answer yet it adopts. Another fan-out's end: nothing."""
        world, mine = self._world, self._fanout_id
        if not mine or fanout_id not in (None, mine):
            return
        self._fanout_id = 0
        for answer in self._answered:
            world.unanswered[mine].remove(answer.call.call_id)
        world.core.on(RanAhead(self._answered, self._sent_s))
        if not self._left:
            world.end(mine, "finished")
            return
        self.num_adopted += 1
        calls, nodes = zip(*self._left.values(), strict=True)
        world.feed(Adopted(mine, calls, nodes, self._sent_s, world.now_s))
