"""How an attempt is doing, by the clock (core)."""

from enum import Enum, auto

from coordinator.calls_and_nodes import Attempt
from coordinator.node_health import DEAD_S, WAIT_FACTOR
from shoal.errors import NodeUnreachable


class Verdict(Enum):
    """FINE: wait. STUCK: not sent, to a node that is silent. DEAD: its node is.

    TIMED_OUT: its node works on it, for longer than it may. SILENT: neither progress nor reply.
    OVERDUE: far later than predicted. SLOW: later than 95 % of such calls: worth a hedge.
    """

    FINE = auto()
    STUCK = auto()
    DEAD = auto()
    TIMED_OUT = auto()
    SILENT = auto()
    OVERDUE = auto()
    SLOW = auto()


def judge(attempt: Attempt, now_s: float, call_timeout_s: float) -> Verdict:
    """Return what is to be said of an attempt now. Orphans can be FINE, SILENT or DEAD."""
    node, work = attempt.node, attempt.call.new.work
    health = node.health
    if not attempt.is_sent:
        return Verdict.STUCK if health.is_suspect else Verdict.FINE
    silent_s = now_s - attempt.heard_s
    quiet_s = min(silent_s, now_s - node.heard_s)
    if quiet_s > DEAD_S and quiet_s > health.dead_after_s(work, node.num_bytes):
        return Verdict.DEAD
    if silent_s > call_timeout_s:  # its node goes on, and has forgotten this call
        return Verdict.DEAD
    wait_s = attempt.wait_s * WAIT_FACTOR
    if attempt.is_orphan:
        is_silent = silent_s - wait_s > health.silent_after_s(work)
        return Verdict.SILENT if is_silent else Verdict.FINE
    age_s = now_s - attempt.sent_s
    if age_s > call_timeout_s:
        return Verdict.TIMED_OUT
    if silent_s - wait_s > health.silent_after_s(work):
        return Verdict.SILENT
    age_s -= wait_s
    if age_s > health.deadline_s(work):
        return Verdict.OVERDUE
    if health.model.is_known and age_s > health.hedge_after_s(work):
        return Verdict.SLOW
    return Verdict.FINE


def silence(name: str, silent_s: float) -> NodeUnreachable:
    """Return the error of a node that is DEAD."""
    return NodeUnreachable(
        f"node {name} gave no sign of life for {silent_s:.1f} s: it hangs, or the network to it "
        "is cut"
    )
