"""What is learned of a node: predictions, hedges lost, demotion, the breaker, and who is asked."""

import pytest

from coordinator.calls_and_nodes import Attempt, Call, Fanout, Node
from coordinator.dispatch import HEDGE_BURST, HEDGE_SHARE, Dispatcher
from coordinator.dispatch_events import (
    CloseNode,
    FanoutStarted,
    Lane,
    NewCall,
    NodeOpened,
    Replied,
    Send,
    Ticked,
)
from coordinator.node_health import (
    EARLY_SAMPLES,
    EARLY_SILENT_S,
    MIN_SAMPLES,
    UNKNOWN_S,
    LatencyModel,
    NodeHealth,
)
from coordinator.replica_choice import choose, demote, judge_slow


def reply(
    health: NodeHealth, latency_s: float, busy_s: float, now_s: float, wait_s: float = 0.0
) -> float:
    return health.replied(1.0, latency_s, Replied(1, 1, now_s, busy_s), wait_s)


def known(latency_s: float = 0.001, rtt_s: float = 0.0001) -> NodeHealth:
    health = NodeHealth(rtt_s)
    for n in range(2 * MIN_SAMPLES):
        reply(health, latency_s, latency_s - rtt_s, n * 0.01)
    return health


def test_a_model_finds_the_base_and_the_slope() -> None:
    model = LatencyModel()
    for n in range(200):
        work = float(n % 10)
        model.learn(work, 0.045 + 0.002 * work, 1.0)
    assert model.predict(0) == pytest.approx(0.045, rel=0.01)
    assert model.predict(20) == pytest.approx(0.085, rel=0.01)


def test_a_model_of_equal_calls_predicts_them() -> None:
    model = LatencyModel()
    for _ in range(50):
        model.learn(3.0, 0.01, 1.0)
    assert model.predict(3.0) == pytest.approx(0.01) and model.predict(0.0) >= 0


def test_a_node_is_given_two_seconds_until_it_is_known_and_then_what_it_needs() -> None:
    assert NodeHealth(0.001).silent_after_s(1.0) == UNKNOWN_S
    assert known().silent_after_s(1.0) == 0.05
    far = known(latency_s=0.05, rtt_s=0.045)
    assert far.silent_after_s(1.0) == pytest.approx(0.18, rel=0.1), "four round trips"
    assert known().deadline_s(1.0) >= 0.05


@pytest.mark.parametrize("rtt_s", [0.0001, 0.045, 0.1])
def test_silence_of_two_seconds_is_a_node_s_end_however_little_is_known(rtt_s: float) -> None:
    """Told by the core, in ticks of 5 ms; but not while a prompt is on its way over a home link."""
    for num_known in range(0, 2 * MIN_SAMPLES, 3):
        core, now_s = Dispatcher(10.0, 30.0), 0.0
        core.on(NodeOpened(0, 10**9, rtt_s, False, now_s))
        for n in range(num_known):
            new = NewCall(n + 1, (0,), Lane.INTERACTIVE, 3000, 1.0)
            core.on(FanoutStarted(n + 1, (new,), now_s))
            now_s += rtt_s + 0.001
            core.on(Replied(n + 1, 0, now_s, 0.001))
        num_bytes = 3000 if num_known % 2 else 5_000_000
        lane = Lane.INTERACTIVE if num_known % 2 else Lane.BULK
        core.on(FanoutStarted(1000, (NewCall(1000, (0,), lane, num_bytes, 1.0),), now_s))
        silent_s = 0.0
        while not any(isinstance(c, CloseNode) for c in core.on(Ticked(now_s + silent_s))):
            silent_s += 0.005
        wanted_s = 1.9 if num_known % 2 else 1.9 + 5_000_000 / 2.5e6
        assert wanted_s <= silent_s < wanted_s + 0.1, num_known


def test_about_one_call_in_twenty_is_slow() -> None:
    health, num_slow = NodeHealth(0.0), 0
    for n in range(4000):
        latency_s = 0.01 + 0.00001 * (n * 7919 % 1000)  # 10 to 20 ms, spread evenly
        if n >= 2000:
            num_slow += latency_s > health.hedge_after_s(1.0)
        reply(health, latency_s, latency_s, n * 0.1)
    assert 40 < num_slow < 200


def test_silence_is_noticed_early_once_a_few_replies_have_come() -> None:
    health = NodeHealth(0.0002)
    for n in range(EARLY_SAMPLES):
        assert health.silent_after_s(1.0) == UNKNOWN_S
        reply(health, 0.001, 0.0008, n * 0.01)
    assert health.silent_after_s(1.0) == EARLY_SILENT_S
    assert health.silent_after_s(500.0) == UNKNOWN_S, "a call of that size was never seen"
    reply(health, 0.1, 0.0998, 1.0)
    assert health.silent_after_s(1.0) == pytest.approx(0.8), "it was once that slow"
    assert known().silent_after_s(500.0) == UNKNOWN_S


def test_demotion_lasts_longer_each_time_and_probation_is_short() -> None:
    health = known()
    health.demote(100.0)
    assert health.rank(104.9) == 1 and health.rank(105.0) == 0
    assert health.stalled(20.0, 105.0, 105.2), "on probation one is enough"
    health.demote(105.2)
    assert health.rank(115.1) == 1 and health.rank(115.2) == 0
    health.demote(1000.0)
    assert health.rank(1005.0) == 0, "that was long ago"


def test_calls_that_one_stall_held_up_count_once() -> None:
    health = known()
    assert [health.stalled(30.0, sent, 10.0 + sent) for sent in (0.1, 0.2, 0.3)] == [False] * 3
    assert health.residual < 3
    assert health.stalled(30.0, 10.15, 10.3), "sent after the first was noticed"
    patient = known()
    for n in range(6):
        assert not patient.stalled(30.0, 10.0 * n, 10.0 * n + 0.1)
        for _ in range(40):
            reply(patient, 0.001, 0.001, 10.0 * n)


def test_what_a_call_waits_behind_others_is_no_fault_of_the_node() -> None:
    """Sixty calls at once: the last one takes sixty times as long."""
    health = known(latency_s=0.001, rtt_s=0.0001)
    assert health.wait_s(59.0) == pytest.approx(59 * 0.0009, rel=0.05)
    late = Replied(1, 1, 1.0, busy_s=0.054, queue_s=0.0531)
    assert health.replied(1.0, 0.0541, late, health.wait_s(59.0)) == 1.0
    assert health.replied(1.0, 0.0541, late) > 50, "alone it would be one"
    stuck = Replied(1, 1, 1.0, busy_s=0.4, queue_s=0.399)
    assert health.replied(1.0, 0.4, stuck, health.wait_s(59.0)) > 50, "and that is too long"


def test_failures_in_a_row_break_a_node_off_and_one_more_after_the_pause() -> None:
    health = known()
    for _ in range(4):
        health.failed(10.0)
    assert health.rank(10.0) == 0
    health.failed(10.0)
    assert health.rank(10.5) == 3 and health.rank(11.0) == 0
    health.failed(11.0)
    assert health.rank(12.9) == 3, "twice as long"
    reply(health, 0.001, 0.001, 13.0)
    health.failed(14.0)
    assert health.rank(14.0) == 0, "a reply ends the row"


def test_three_missed_deadlines_in_ten_seconds_break_a_node_off() -> None:
    health = known()
    for now_s in (0.0, 6.0, 12.0):
        health.missed_deadline(now_s)
    assert health.rank(12.0) == 0
    health.missed_deadline(13.0)
    assert health.rank(13.5) == 3


def test_a_slow_node_is_demoted_and_not_when_all_are_slow() -> None:
    nodes = {n: Node(n, 0.0001) for n in range(3)}
    call = Call(NewCall(1, (0, 1, 2), Lane.INTERACTIVE, 10, 1.0), Fanout(1))
    for node in nodes.values():
        node.open(1000, 0.0001, 0.0)
        node.health = known(latency_s=0.01)

    def slow_reply(node: Node, now_s: float) -> None:
        attempt = Attempt(1, call, node, now_s - 0.1)
        judge_slow(attempt, reply(node.health, 0.1, 0.1, now_s), nodes, now_s)

    calls_until = 0
    while nodes[0].health.rank(calls_until) == 0:
        calls_until += 1
        slow_reply(nodes[0], float(calls_until))
    assert calls_until <= 10
    worst = 0.0
    for n in range(60):
        for number in (1, 2):
            slow_reply(nodes[number], 1000.0 + n)
            assert nodes[number].health.rank(1000.0 + n) == 0
            worst = max(worst, nodes[number].health.residual)
    assert worst > 3, "it would have been enough for one alone"


def test_a_demotion_of_the_last_one_in_good_standing_pardons_the_others() -> None:
    nodes = {n: Node(n, 0.0001) for n in range(3)}
    for node in nodes.values():
        node.open(1000, 0.0001, 0.0)
        node.health = known()
    call = Call(NewCall(1, (0, 1), Lane.INTERACTIVE, 10, 1.0), Fanout(1))
    demote(nodes[0], call, nodes, 1.0)
    assert [node.health.rank(1.0) for node in nodes.values()] == [1, 0, 0]
    demote(nodes[1], call, nodes, 2.0)
    assert [node.health.rank(2.0) for node in nodes.values()] == [0, 1, 0]
    assert nodes[0].health.stalled(5.0, 2.0, 2.1), "and yet it is on probation"


def asked(nodes: dict[int, Node], candidates: tuple[int, ...], now_s: float = 1.0) -> int:
    call = Call(NewCall(1, candidates, Lane.INTERACTIVE, 10, 1.0), Fanout(1))
    node = choose(call, nodes, now_s)
    assert node is not None
    return node.node_id


def test_the_preferred_replica_is_asked_unless_it_is_worse() -> None:
    nodes = {n: Node(n, 0.0001) for n in range(2)}
    for node in nodes.values():
        node.open(1000, 0.0001, 0.0)
        node.health = known(latency_s=0.01)
        node.health.replied_s = 1.0
    assert asked(nodes, (0, 1)) == 0 and asked(nodes, (1, 0)) == 1
    nodes[0].work = 20.0
    assert asked(nodes, (0, 1)) == 1, "it has much to do"
    nodes[0].work = 0.0
    nodes[0].health = known(latency_s=0.1)
    nodes[0].health.replied_s = 1.0
    assert asked(nodes, (0, 1)) == 1, "it is slower"
    assert asked(nodes, (0, 1), now_s=20.0) == 0, "what is known of it is old"
    nodes[1].health.is_suspect = True
    assert asked(nodes, (0, 1)) == 0, "the other one is silent"
    nodes[0].health.demote(1.0)
    assert asked(nodes, (0, 1)) == 0, "slow answers, silent does not"
    nodes[0].close(ValueError("lost"))  # type: ignore[arg-type]
    assert asked(nodes, (0, 1)) == 1, "the last one is asked whatever its rank"


def test_hedges_come_from_a_bucket() -> None:
    """Every call is slow, for ever: 16 hedges, then one in twenty."""
    core, now_s = Dispatcher(10.0, 30.0), 0.0
    for node in range(2):
        core.on(NodeOpened(node, 10**6, 0.0001, False, now_s))
    num_calls, num_hedges = 0, 0
    for n in range(700):
        candidates = (n % 2, 1 - n % 2)
        call = NewCall(n + 1, candidates, Lane.INTERACTIVE, 10, 1.0)
        [first] = core.on(FanoutStarted(n + 1, (call,), now_s))
        assert isinstance(first, Send)
        is_slow = n >= 200
        now_s += 0.02 if is_slow else 0.001
        if is_slow:
            num_calls += 1
            hedges = core.on(Ticked(now_s))
            num_hedges += len(hedges)
            for hedge in hedges:
                assert isinstance(hedge, Send) and hedge.node != first.node
        core.on(Replied(first.attempt_id, first.node, now_s))
        for attempt in list(core._attempts.values()):
            core.on(Replied(attempt.attempt_id, attempt.node.node_id, now_s))
    allowed = HEDGE_BURST + HEDGE_SHARE * num_calls
    assert HEDGE_BURST <= num_hedges <= allowed + 1, (num_hedges, allowed)
