"""The dispatch core under random events: whatever the network does, every fan-out ends once."""

import random

import pytest

from coordinator.dispatch import (
    Accept,
    Cancel,
    Command,
    Dispatcher,
    Event,
    Fail,
    Failed,
    FanoutAbandoned,
    FanoutStarted,
    Finish,
    Lane,
    LaneOpened,
    NewCall,
    NodeDraining,
    NodeLost,
    Replied,
    Send,
    Ticked,
    TimeOut,
)
from shoal import errors

NUM_NODES = 3
CREDIT_BYTES = 100


class World:
    """Feeds a dispatcher and checks its commands against what a careful reader would allow."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.core = Dispatcher()
        self.now_s = 0.0
        self.next_call = self.next_fanout = 1
        self.calls: dict[int, tuple[int, NewCall]] = {}  # every call ever made -> its fan-out
        self.sent: set[int] = set()
        self.at_nodes: list[int] = []  # sent and not answered by their node
        self.accepted: dict[int, set[int]] = {}  # fan-out -> its calls whose reply counted
        self.ended: dict[int, str] = {}
        self.lost: set[int] = set()
        for node in range(NUM_NODES):
            for lane in Lane:
                self.feed(LaneOpened(node, lane, CREDIT_BYTES))

    def feed(self, event: Event) -> None:
        commands = self.core.on(event)
        self.core.check_integrity()
        for command in commands:
            self.check(command, event)

    def check(self, command: Command, event: Event) -> None:
        match command:
            case Send(call_id, node, lane):
                fanout_id, call = self.calls[call_id]
                assert (node, lane) == (call.node, call.lane), "sent to somebody else"
                assert call_id not in self.sent, "sent twice"
                assert node not in self.lost, "sent to a dead node"
                assert fanout_id not in self.ended, "sent for a fan-out that is over"
                self.sent.add(call_id)
                self.at_nodes.append(call_id)
            case Accept(call_id):
                assert isinstance(event, Replied) and event.call_id == call_id
                fanout_id, call = self.calls[call_id]
                assert event.node == call.node, "an answer by somebody who was not asked"
                assert call_id in self.sent, "an answer to what was not asked yet"
                assert fanout_id not in self.ended, "an answer after the end"
                assert call_id not in self.accepted[fanout_id], "an answer used twice"
                self.accepted[fanout_id].add(call_id)
            case Finish(fanout_id):
                wanted = {c for c, (owner, _) in self.calls.items() if owner == fanout_id}
                assert self.accepted[fanout_id] == wanted, "finished without all its answers"
                self.end(fanout_id, "finished")
            case Fail(fanout_id, _, _) | TimeOut(fanout_id, _):
                self.end(fanout_id, "failed")
            case Cancel(call_id, _, _):
                assert call_id in self.sent

    def end(self, fanout_id: int, how: str) -> None:
        assert fanout_id not in self.ended, f"fan-out {fanout_id} ended twice"
        self.ended[fanout_id] = how

    def start(self) -> None:
        fanout_id, self.next_fanout = self.next_fanout, self.next_fanout + 1
        calls = []
        for _ in range(self.random.randint(1, 5)):
            lane = self.random.choice(list(Lane))
            node = self.random.randrange(NUM_NODES)
            call = NewCall(self.next_call, node, lane, self.random.randint(1, 150))
            self.calls[self.next_call] = (fanout_id, call)
            self.next_call += 1
            calls.append(call)
        self.accepted[fanout_id] = set()
        self.feed(FanoutStarted(fanout_id, tuple(calls), self.now_s + self.random.randint(1, 20)))

    def answer(self) -> None:
        if not self.at_nodes:
            return
        call_id = self.random.choice(self.at_nodes)
        node = self.calls[call_id][1].node
        if self.random.random() < 0.9:  # else: the node repeats itself later
            self.at_nodes.remove(call_id)
        if self.random.random() < 0.1:
            node = (node + 1) % NUM_NODES  # not the one that was asked
        if self.random.random() < 0.1:
            self.feed(Failed(call_id, node, errors.NodeBusy()))
        else:
            self.feed(Replied(call_id, node))

    def step(self) -> None:
        what = self.random.random()
        if what < 0.3:
            self.start()
        elif what < 0.9:
            self.answer()
        elif what < 0.95:
            self.now_s += self.random.randint(1, 5)
            self.feed(Ticked(self.now_s))
        elif what < 0.97:
            running = [f for f in self.accepted if f not in self.ended]
            if running:
                fanout_id = self.random.choice(running)
                self.end(fanout_id, "abandoned")
                self.feed(FanoutAbandoned(fanout_id))
        elif what < 0.98:
            node = self.random.randrange(NUM_NODES)
            self.feed(NodeDraining(node, errors.NodeDraining()))
        elif what < 0.99:  # a node answers a call that it was not sent (yet)
            call_id = self.random.randrange(1, self.next_call + 2)
            if call_id in self.calls and call_id not in self.sent:
                self.feed(Replied(call_id, self.calls[call_id][1].node))
        elif what < 0.995:
            node = self.random.randrange(NUM_NODES)
            self.lost.add(node)
            self.feed(NodeLost(node, errors.NodeUnreachable()))


@pytest.mark.parametrize("seed", range(150))
def test_every_fan_out_ends_exactly_once(seed: int) -> None:
    world = World(seed)
    for _ in range(300):
        world.step()
    world.feed(Ticked(world.now_s + 1000))
    assert set(world.ended) == set(world.accepted), "a fan-out never ended"
    assert world.core.num_fanouts == 0


def test_a_quiet_network_finishes_everything() -> None:
    """Without losses and deadlines every answer is used, and all credit comes back."""
    world = World(0)
    for _ in range(40):
        world.start()
        while world.at_nodes:
            call_id = world.at_nodes.pop(0)
            world.feed(Replied(call_id, world.calls[call_id][1].node))
    assert set(world.ended.values()) == {"finished"}
    assert world.sent == set(world.calls)
