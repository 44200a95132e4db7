"""Sending a call to a node, and what of the node's credit and work each sending holds (core).

The lower half of the dispatch core: `coordinator.dispatch` decides who is sent what and when.
"""

from coordinator.calls_and_nodes import Attempt, Call, Node, Stream
from coordinator.dispatch_events import Cancel, Command, Send

FIRST_RETRY_ID = 1 << 48  # calls are numbered from 1 by their makers, further attempts from here


class Attempts:
    """Keeps the attempts in flight, and the nodes that have them."""

    def __init__(self) -> None:
        self._attempts: dict[int, Attempt] = {}
        self._nodes: dict[int, Node] = {}
        self._next_attempt_id = FIRST_RETRY_ID
        self._now_s = 0.0  # of the last event that told

    def _attempt(self, call: Call, node: Node, now_s: float, out: list[Command]) -> None:
        attempt = self._new_attempt(call, node, now_s)
        stream = node.streams[call.new.lane]
        if stream.queue or not stream.has_credit(call.new.num_bytes):
            stream.queue.append(attempt)
        else:
            self._send(attempt, stream, out)

    def _new_attempt(self, call: Call, node: Node, now_s: float) -> Attempt:
        if call.num_attempts:
            attempt_id, self._next_attempt_id = self._next_attempt_id, self._next_attempt_id + 1
        else:
            attempt_id = call.new.call_id
        call.num_attempts += 1
        call.waits_since_s = None
        attempt = Attempt(attempt_id, call, node, now_s)
        self._attempts[attempt_id] = attempt
        call.attempts.append(attempt)
        node.work += call.new.work
        return attempt

    def _send(self, attempt: Attempt, stream: Stream, out: list[Command]) -> None:
        new, node = attempt.call.new, attempt.node
        if node.work > new.work:
            attempt.wait_s = node.health.wait_s(node.work_ahead(new.lane))
        stream.used_bytes += new.num_bytes
        stream.num_sent += 1
        stream.work += new.work
        attempt.is_sent = True
        out.append(Send(attempt.attempt_id, new.call_id, node.node_id, new.lane))

    def _send_queued(self, stream: Stream, out: list[Command]) -> None:
        while stream.queue and stream.has_credit(stream.queue[0].call.new.num_bytes):
            attempt = stream.queue.popleft()
            attempt.sent_s = attempt.heard_s = self._now_s
            self._send(attempt, stream, out)

    def _take_back(self, call: Call, out: list[Command]) -> list[Stream]:
        """Take back a call's attempts: those queued are dropped, those sent become orphans.

        Return the streams on which others may go now.
        """
        unblocked = []
        for attempt in call.attempts:
            node, lane = attempt.node, call.new.lane
            if attempt.is_sent:
                attempt.is_orphan = True
                out.append(Cancel(attempt.attempt_id, node.node_id, lane))
            else:
                del self._attempts[attempt.attempt_id]
                node.work -= call.new.work
                node.streams[lane].queue.remove(attempt)
                unblocked.append(node.streams[lane])
        call.attempts.clear()
        return unblocked

    def _settle(self, attempt_id: int, node_id: int, now_s: float) -> Attempt | None:
        """Forget an attempt that its node has ended, and give its credit back."""
        attempt = self._attempts.get(attempt_id)
        if attempt is None or attempt.node.node_id != node_id or not attempt.is_sent:
            return None
        del self._attempts[attempt_id]
        node, new = attempt.node, attempt.call.new
        stream = node.streams[new.lane]
        stream.used_bytes -= new.num_bytes
        stream.num_sent -= 1
        stream.work = stream.work - new.work if stream.num_sent else 0.0
        node.work -= new.work
        node.heard_s, node.health.is_suspect = now_s, False
        return attempt
