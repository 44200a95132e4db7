"""Which replica is asked (core)."""

from collections.abc import Mapping

from coordinator.calls_and_nodes import Attempt, Call, Node
from coordinator.node_health import SLOW_RESIDUAL

# How much slower than another one the preferred replica may be. A slot's preference spreads the
# experts of a range over its replicas, so that all of them work and each caches its own part.
PREFERRED_S, PREFERRED_FACTOR = 0.001, 1.5


def choose(call: Call, nodes: Mapping[int, Node], now_s: float) -> Node | None:
    """Return the replica that should answer first; None: there is none, or no other.

    A lower rank goes before speed. Speed is predicted, with what the node has to do already; a node
    of which nothing recent is known is asked when it is the preferred one.
    """
    best: Node | None = None
    best_rank, best_s = 0, 0.0
    work = call.new.work
    is_preferred = True
    for node_id in call.new.candidates:
        node = nodes.get(node_id)
        if node is None or not node.takes_calls or node_id in call.failed or call.is_at(node):
            is_preferred = False
            continue
        health = node.health
        rank = health.rank(now_s)
        if is_preferred and health.is_stale(now_s):
            eta_s = -1.0
        elif health.model.is_known:
            eta_s = health.model.predict(work) + health.load_s
            if node.work > 0.0:  # what it has already goes first; the way there does not count
                eta_s += max(0.0, eta_s - health.rtt_s) * node.work / work
            if is_preferred:
                eta_s = eta_s / PREFERRED_FACTOR - PREFERRED_S
        else:
            eta_s = node.work * 1e-6  # unknown: among such nodes the one with less to do
        if best is None or (rank, eta_s) < (best_rank, best_s):
            best, best_rank, best_s = node, rank, eta_s
        is_preferred = False
    return best


def demote(node: Node, call: Call, nodes: Mapping[int, Node], now_s: float) -> None:
    """Prefer the call's other replicas to this one for a while.

    Were they all demoted before, they are pardoned: the latest news is the best there is, and two
    nodes of one rank are no choice.
    """
    node.health.demote(now_s)
    others = [nodes[other] for other in call.new.candidates if other in nodes]
    others = [other for other in others if other is not node and other.takes_calls]
    if others and all(other.health.rank(now_s) for other in others):
        for other in others:
            other.health.demoted_until_s = 0.0


def judge_slow(attempt: Attempt, residual: float, nodes: Mapping[int, Node], now_s: float) -> None:
    """Take in a slow reply: demote a node that loses far more time than the others do."""
    node, health = attempt.node, attempt.node.health
    if not health.stalled(residual, attempt.sent_s, now_s):
        return
    healths = [other.health for other in nodes.values() if other.is_open]
    averages = sorted(max(other.usual, other.residual) for other in healths)
    median = max(1.0, averages[(len(averages) - 1) // 2])
    if health.residual > SLOW_RESIDUAL * median:
        demote(node, attempt.call, nodes, now_s)


def judge_cancelled(attempt: Attempt, nodes: Mapping[int, Node], now_s: float) -> None:
    """Take in that a node is rid of a call that was taken back: it was as slow as that, at least.

    So a hedge that was lost counts by how late its answer would have been.
    """
    age_s = now_s - attempt.sent_s
    residual = attempt.node.health.cancelled(attempt.call.new.work, age_s, attempt.wait_s)
    if residual > SLOW_RESIDUAL:
        judge_slow(attempt, residual, nodes, now_s)
