"""Which node a hint goes to, and that an expert is told of once."""

import threading

from coordinator.calls_in_flight import CallsInFlight, Hint
from coordinator.dispatch_events import Lane, NodeLost, NodeOpened, NodeRetired
from coordinator.hinted_experts import HintedExperts
from shoal import errors

FRAME = b"the hint"


class Wires:
    """Notes where frames go."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Lane, bytes]] = []

    def send(self, node: int, lane: Lane, frame: bytes) -> None:
        self.sent.append((node, lane, frame))

    def close_node(self, node: int, silent_s: float) -> None:
        raise NotImplementedError

    def release_node(self, node: int) -> None:
        raise NotImplementedError


def test_a_hint_goes_where_its_call_would_go() -> None:
    wires = Wires()
    in_flight = CallsInFlight(["a", "b", "c"], 10.0, 30.0, wires)

    def told(candidates: tuple[int, ...], wanted_by: set[int]) -> list[int]:
        wires.sent.clear()
        in_flight.hint([Hint(candidates, FRAME, 1.0)] * 2, wanted_by, 1.0)
        assert all((lane, frame) == (Lane.INTERACTIVE, FRAME) for _, lane, frame in wires.sent)
        return [node for node, _, _ in wires.sent]

    every = {0, 1, 2}
    assert told((0, 1), every) == [], "nobody is met yet"
    for node in every:
        in_flight.on(NodeOpened(node, 1000, 0.001, False, 0.0))
    assert told((0, 1), every) == [0, 0] and told((1, 0), every) == [1, 1]
    assert told((0, 1), {1}) == [], "its call would go to 0, which reads nothing ahead"
    health = in_flight.health(0)
    assert health is not None
    health.demote(1.0)
    assert told((0, 1), every) == [1, 1], "a demoted node is not asked"
    assert told((0,), every) == [0, 0], "the last one is"
    in_flight.on(NodeLost(1, errors.NodeUnreachable("lost"), False, 1.0))
    assert told((1, 2, 0), every) == [2, 2]
    in_flight.on(NodeRetired(2, errors.NodeUnreachable("retired")))
    assert told((1, 2), every) == []


def test_an_expert_is_told_of_once_between_two_calls_of_its_layer() -> None:
    hinted = HintedExperts()
    assert hinted.take_new(3, [7, 5, 7]) == [7, 5]
    assert hinted.take_new(3, [5, 6]) == [6]
    assert hinted.take_new(4, [5]) == [5], "another layer"
    hinted.forget(3)
    assert hinted.told(3) == frozenset() and hinted.told(4) == {5}
    assert hinted.take_new(3, [5]) == [5]


def test_drafts_on_two_threads_tell_each_expert_once() -> None:
    hinted, taken = HintedExperts(), list[int]()
    begin = threading.Barrier(4)

    def draft(first: int) -> None:
        begin.wait()
        for expert in range(2000):
            taken.extend(hinted.take_new(0, [(first + expert) % 2000]))

    threads = [threading.Thread(target=draft, args=(500 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(2000))
