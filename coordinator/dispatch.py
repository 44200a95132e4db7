"""Which expert calls are in flight and where, and how each fan-out ends (core).

A state machine without I/O, clock or randomness: feed it events, do the commands it returns.
Rule: everything that decides about a call in flight lives here; the shell only does as it is told.

A *fan-out* is one layer's calls; it ends in exactly one `Finish`, `Fail`, `TimeOut` or
`GiveUpWaiting`, or is abandoned by its caller. A *call* is sent to one of the replicas of its
experts, and to another one when the first is silent, late, lost or refuses; the first whole reply
wins, every other is dropped. A call without a node waits, for `shard_wait_s` at most.

An *attempt* is one sending. It holds its stream's credit from `Send` to the node's terminal frame,
whatever became of its call:

               credit            reply
    QUEUED ----------> SENT ----------------> (gone)   the call's first: Accept
       | call over       | call over: Cancel
       v                 v     any terminal frame, or the node is lost
    (gone)            ORPHANED --------------> (gone)

Events about an attempt that is gone are late or duplicate news: they change nothing. A call that
two nodes died of fails and takes no third one with it: a node has died when it comes back as
another process or not at all (`NodeAbsent`), not when a connection merely broke.
"""

from collections.abc import Callable, Iterable, Sequence

from coordinator import calls_and_nodes
from coordinator.attempt_watch import Verdict, judge, silence
from coordinator.calls_and_nodes import Attempt, Call, Fanout, Node, Stream
from coordinator.dispatch_events import (
    Accept,
    Adopted,
    Cancel,
    CloseNode,
    Command,
    Event,
    Fail,
    Failed,
    FanoutAbandoned,
    FanoutStarted,
    Finish,
    GiveUpWaiting,
    Lane,
    NewCall,
    NodeAbsent,
    NodeDraining,
    NodeLost,
    NodeOpened,
    NodeRetired,
    Progressed,
    RanAhead,
    ReleaseNode,
    Replied,
    Ticked,
    TimeOut,
)
from coordinator.node_health import SLOW_RESIDUAL, NodeHealth
from coordinator.replica_choice import choose, judge_cancelled, judge_slow
from coordinator.run_ahead import RunsAhead
from shoal import errors

HEDGE_SHARE, HEDGE_BURST = 0.05, 16.0  # of calls that have a choice (Tail at Scale: 2 to 5 %)
MAX_ATTEMPTS = 16  # of one call: then the network is not what it could be retried on
DEATHS = 2


class Dispatcher(RunsAhead):
    """Owns every expert call in flight. `on` is the only way to change it.

    Args:
        call_timeout_s: how long one node may work on one call.
        shard_wait_s: how long a call waits for a node.
        name_of: a node's name, for messages.
    """

    def __init__(
        self, call_timeout_s: float, shard_wait_s: float, name_of: Callable[[int], str] = str
    ) -> None:
        super().__init__()
        self._name_of = name_of
        self._call_timeout_s = call_timeout_s
        self._shard_wait_s = shard_wait_s
        self._calls: dict[int, Call] = {}
        self._fanouts: dict[int, Fanout] = {}
        self._hedge_tokens = HEDGE_BURST

    def on(self, event: Event) -> list[Command]:
        """Take one event; return the commands to carry out, in order."""
        out: list[Command] = []
        match event:  # the commonest first
            case RanAhead():
                self._earn_hedges(answer.call for answer in event.answered)
                self._on_ran_ahead(event)
            case Replied():
                self._on_replied(event, out)
            case FanoutStarted():
                self._on_started(event, out)
            case Ticked(now_s):
                self._on_ticked(now_s, out)
            case Adopted():
                self._on_adopted(event, out)
            case Progressed(node, attempt_ids, now_s):
                self._on_progressed(node, attempt_ids, now_s)
            case Failed():
                self._on_failed(event, out)
            case FanoutAbandoned(fanout_id):
                if fanout_id in self._fanouts:
                    self._end(self._fanouts[fanout_id], out)
            case NodeLost(node, error, broke, now_s):
                if node in self._nodes and self._nodes[node].is_open:
                    self._lose(self._nodes[node], error, broke, now_s, out)
            case NodeAbsent(node, error, now_s):
                self._on_absent(node, error, now_s, out)
            case NodeDraining(node, error, _) | NodeRetired(node, error):
                self._on_leaving(node, error, isinstance(event, NodeRetired), out)
            case NodeOpened():
                self._on_opened(event, out)
        return out

    def health(self, node: int) -> NodeHealth | None:
        """Return what is known of a node, for figures; None: it was never open."""
        return self._nodes[node].health if node in self._nodes else None

    def preferred(self, candidates: tuple[int, ...], work: float, now_s: float) -> int | None:
        """Return the node that a call of that work would go to now; None: it would wait."""
        new = NewCall(0, candidates, Lane.INTERACTIVE, 0, work)
        node = choose(Call(new, Fanout(0)), self._nodes, now_s)
        return None if node is None else node.node_id

    # Calls.

    def _on_started(self, event: FanoutStarted, out: list[Command]) -> None:
        calls = self._register(event.fanout_id, event.calls)
        self._now_s = event.now_s
        for call in calls:
            self._earn_hedges((call.new,))
            self._place(call, event.now_s, out)
            if call.fanout.is_over:
                return

    def _on_adopted(self, event: Adopted, out: list[Command]) -> None:
        calls = self._register(event.fanout_id, event.calls)
        self._now_s = event.now_s
        self._earn_hedges(event.calls)
        for call, node_id in zip(calls, event.nodes, strict=True):
            if call.fanout.is_over:
                return
            node = self._nodes.get(node_id)
            if node is None or not node.is_open:
                self._place(call, event.now_s, out)
                continue
            stream = node.streams[call.new.lane]
            if stream.queue or not stream.has_credit(call.new.num_bytes):
                # Others have used the credit up meanwhile: it is taken back and sent in its turn.
                out.append(Cancel(call.new.call_id, node_id, call.new.lane))
                call.num_attempts = 1
                self._place(call, event.now_s, out)
            else:
                self._send(self._new_attempt(call, node, event.sent_s), stream, [])

    def _register(self, fanout_id: int, new_calls: Sequence[NewCall]) -> list[Call]:
        assert fanout_id not in self._fanouts, f"fan-out {fanout_id} started twice"
        assert new_calls, f"fan-out {fanout_id} calls nobody"
        fanout = self._fanouts[fanout_id] = Fanout(fanout_id)
        for new in new_calls:
            assert new.call_id not in self._calls, f"call {new.call_id} made twice"
            self._calls[new.call_id] = fanout.calls[new.call_id] = Call(new, fanout)
        return list(fanout.calls.values())

    def _earn_hedges(self, new_calls: Iterable[NewCall]) -> None:
        for new in new_calls:
            if len(new.candidates) > 1 and self._hedge_tokens < HEDGE_BURST:
                self._hedge_tokens += HEDGE_SHARE

    def _place(self, call: Call, now_s: float, out: list[Command]) -> bool:
        """Send a call that nobody is known to work on; without a node for it, let it wait."""
        num_lost = call.num_deaths + call.num_unexplained + len(call.attempts)
        node = choose(call, self._nodes, now_s) if num_lost < DEATHS else None
        if node is not None:
            self._waiting.pop(call.new.call_id, None)
            self._attempt(call, node, now_s, out)
            return True
        if call.attempts:
            return False
        if call.failed and call.failed.issuperset(call.new.candidates):
            assert call.error is not None
            self._fail(call, call.error, out)
            return False
        if call.is_hopeless(self._nodes):  # whoever asks is told to ask again, by the new map
            self._fail(call, errors.NodeUnreachable("its nodes have left the shard map"), out)
            return False
        self._waiting[call.new.call_id] = call
        if call.waits_since_s is None:
            call.waits_since_s = now_s
        self._wait_no_longer(call, now_s, out)
        return False

    def _on_replied(self, event: Replied, out: list[Command]) -> None:
        self._now_s = now_s = event.now_s
        attempt = self._settle(event.attempt_id, event.node, now_s)
        if attempt is None:
            return
        call, node = attempt.call, attempt.node
        residual = node.health.replied(call.new.work, now_s - attempt.sent_s, event, attempt.wait_s)
        if residual > SLOW_RESIDUAL:
            judge_slow(attempt, residual, self._nodes, now_s)
        if not attempt.is_orphan:
            out.append(Accept(call.new.call_id))
            fanout = call.fanout
            del self._calls[call.new.call_id]
            del fanout.calls[call.new.call_id]
            if len(call.attempts) > 1:  # how slow the others were, their late answers tell
                call.attempts.remove(attempt)
                for stream in self._take_back(call, out):
                    self._send_queued(stream, out)
            call.attempts.clear()
            if not fanout.calls:
                fanout.is_over = True
                del self._fanouts[fanout.fanout_id]
                out.append(Finish(fanout.fanout_id))
        stream = node.streams[call.new.lane]
        if stream.queue:
            self._send_queued(stream, out)

    def _on_failed(self, event: Failed, out: list[Command]) -> None:
        self._now_s = event.now_s
        attempt = self._settle(event.attempt_id, event.node, event.now_s)
        if attempt is None:
            return
        call, node = attempt.call, attempt.node
        if attempt.is_orphan:
            judge_cancelled(attempt, self._nodes, event.now_s)
        else:
            call.attempts.remove(attempt)
            call.error = event.error
            if event.is_final:
                self._fail(call, event.error, out)
            else:
                if isinstance(event.error, errors.NodeDraining):
                    self._leave(node, event.error, out)
                else:
                    node.health.failed(event.now_s)
                    call.failed.add(node.node_id)
                self._help(call, event.now_s, out)
        if node.is_open:
            self._send_queued(node.streams[call.new.lane], out)

    def _on_progressed(self, node_id: int, attempt_ids: tuple[int, ...], now_s: float) -> None:
        node = self._nodes.get(node_id)
        if node is None or not node.is_open:
            return
        node.heard_s, node.health.is_suspect = now_s, False
        for attempt_id in attempt_ids:
            attempt = self._attempts.get(attempt_id)
            if attempt is not None and attempt.node is node:
                attempt.heard_s = now_s

    # Time.

    def _on_ticked(self, now_s: float, out: list[Command]) -> None:
        self._now_s = now_s
        for attempt in list(self._attempts.values()):
            if attempt.attempt_id in self._attempts:  # not ended by the one before
                self._watch(attempt, now_s, out)
        for call in list(self._waiting.values()):
            if call.new.call_id in self._waiting:
                self._wait_no_longer(call, now_s, out)
        for node in list(self._nodes.values()):
            if node.is_retired and not any(a.node is node for a in self._attempts.values()):
                del self._nodes[node.node_id]
                out.append(ReleaseNode(node.node_id))

    def _watch(self, attempt: Attempt, now_s: float, out: list[Command]) -> None:
        """Do what an attempt's lateness asks for."""
        node = attempt.node
        match judge(attempt, now_s, self._call_timeout_s):
            case Verdict.SLOW:
                self._hedge(attempt, now_s, out)
            case Verdict.STUCK:
                self._try_another(attempt, now_s, out)
            case Verdict.SILENT:
                node.health.is_suspect = True
                self._try_another(attempt, now_s, out)
            case Verdict.OVERDUE:
                if not attempt.has_missed:
                    attempt.has_missed = True
                    node.health.missed_deadline(now_s)
                self._try_another(attempt, now_s, out)
            case Verdict.TIMED_OUT:
                self._time_out(attempt, now_s, out)
            case Verdict.DEAD:
                silent_s = now_s - node.heard_s
                out.append(CloseNode(node.node_id, silent_s))
                error = silence(self._name_of(node.node_id), silent_s)
                self._lose(node, error, False, now_s, out)

    def _hedge(self, attempt: Attempt, now_s: float, out: list[Command]) -> None:
        call = attempt.call
        if attempt.is_late or not call.may_be_hedged or self._hedge_tokens < 1.0:
            return
        other = choose(call, self._nodes, now_s)
        if other is not None and other.health.rank(now_s) == 0:
            call.is_hedged = True
            self._hedge_tokens -= 1.0
            self._attempt(call, other, now_s, out)

    def _try_another(self, attempt: Attempt, now_s: float, out: list[Command]) -> None:
        """Ask another replica as well, once for each attempt; the first one may still win."""
        call = attempt.call
        if attempt.is_late or attempt.is_orphan or call.num_attempts >= MAX_ATTEMPTS:
            return
        if all(other.is_late or other is attempt for other in call.attempts):
            attempt.is_late = self._place(call, now_s, out)

    def _time_out(self, attempt: Attempt, now_s: float, out: list[Command]) -> None:
        call, node = attempt.call, attempt.node
        call.attempts.remove(attempt)
        attempt.is_orphan = True
        out.append(Cancel(attempt.attempt_id, node.node_id, call.new.lane))
        call.failed.add(node.node_id)
        if not call.attempts and call.failed.issuperset(call.new.candidates):
            out.append(TimeOut(call.fanout.fanout_id, call.new.call_id, node.node_id))
            self._end(call.fanout, out)
        else:
            self._help(call, now_s, out)

    def _help(self, call: Call, now_s: float, out: list[Command]) -> None:
        """Find another node for a call, unless one has it and is not late."""
        if all(attempt.is_late for attempt in call.attempts):
            self._place(call, now_s, out)

    def _wait_no_longer(self, call: Call, now_s: float, out: list[Command]) -> None:
        assert call.waits_since_s is not None
        if now_s - call.waits_since_s >= self._shard_wait_s:
            known = [self._nodes[node] for node in call.new.candidates if node in self._nodes]
            causes = tuple(node.error for node in known if node.error is not None)
            out.append(GiveUpWaiting(call.fanout.fanout_id, call.new.call_id, causes))
            self._end(call.fanout, out)

    # Nodes.

    def _on_opened(self, event: NodeOpened, out: list[Command]) -> None:
        node = self._nodes.get(event.node)
        if node is None:
            node = self._nodes[event.node] = Node(event.node, event.rtt_s)
        assert not node.is_open, f"node {event.node} opened twice"
        victims = node.open(event.credit_bytes, event.rtt_s, event.now_s)
        self._explain(victims, not event.is_same_process, event.now_s, out)
        for call in list(self._waiting.values()):
            if call.new.call_id in self._waiting and event.node in call.new.candidates:
                call.failed.discard(event.node)
                self._place(call, event.now_s, out)

    def _on_absent(
        self, node_id: int, error: errors.ShoalError, now_s: float, out: list[Command]
    ) -> None:
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = Node(node_id, 0.0)
        if node.is_open:
            return
        node.error = error
        victims, node.victims = node.victims, []
        self._explain(victims, True, now_s, out)

    def _explain(self, victims: list[Call], died: bool, now_s: float, out: list[Command]) -> None:
        """Say of calls that a node had when it was lost whether it died."""
        for call in victims:
            if self._calls.get(call.new.call_id) is not call:
                continue  # over
            call.num_unexplained -= 1
            if not (died and self._bury(call, out)):
                self._help(call, now_s, out)

    def _bury(self, call: Call, out: list[Command]) -> bool:
        """Count a node that died with this call; True: that was one too many."""
        call.num_deaths += 1
        if call.num_deaths < DEATHS:
            return False
        assert call.error is not None
        both = f"{call.error} (a call that lost two nodes is asked of no third)"
        self._fail(call, type(call.error)(both), out)
        return True

    def _on_leaving(
        self, node_id: int, error: errors.ShoalError, is_retired: bool, out: list[Command]
    ) -> None:
        node = self._nodes.get(node_id)
        if node is None:
            if not is_retired:
                return
            node = self._nodes[node_id] = Node(node_id, 0.0)
        node.is_retired = node.is_retired or is_retired
        self._leave(node, error, out)
        for call in list(self._waiting.values()) if is_retired else ():
            if call.new.call_id in self._waiting:
                self._place(call, self._now_s, out)

    def _leave(self, node: Node, error: errors.ShoalError, out: list[Command]) -> None:
        """Ask nothing new of a node: what is queued for it goes elsewhere."""
        queued = node.leave(error)
        for attempt in queued:
            del self._attempts[attempt.attempt_id]
        for attempt in queued:
            if not attempt.call.fanout.is_over:
                attempt.call.error = error
                self._help(attempt.call, self._now_s, out)

    def _lose(
        self,
        node: Node,
        error: errors.ShoalError,
        broke_protocol: bool,
        now_s: float,
        out: list[Command],
    ) -> None:
        node.close(error)
        mine = [attempt for attempt in self._attempts.values() if attempt.node is node]
        for attempt in mine:
            del self._attempts[attempt.attempt_id]
            if not attempt.is_orphan:
                attempt.call.attempts.remove(attempt)
        for attempt in mine:
            call = attempt.call
            if attempt.is_orphan or call.fanout.is_over:
                continue
            call.error = error
            if broke_protocol:
                if self._bury(call, out):
                    continue
            elif attempt.is_sent:
                call.num_unexplained += 1
                node.victims.append(call)
            if call.num_attempts >= MAX_ATTEMPTS:
                self._fail(call, error, out)
            else:
                self._help(call, now_s, out)

    # Ends.

    def _fail(self, call: Call, error: errors.ShoalError, out: list[Command]) -> None:
        out.append(Fail(call.fanout.fanout_id, call.new.call_id, error))
        self._end(call.fanout, out)

    def _end(self, fanout: Fanout, out: list[Command]) -> None:
        """Forget a fan-out and its calls."""
        fanout.is_over = True
        del self._fanouts[fanout.fanout_id]
        unblocked: list[Stream] = []
        for call_id, call in fanout.calls.items():
            del self._calls[call_id]
            self._waiting.pop(call_id, None)
            unblocked += self._take_back(call, out)
        fanout.calls.clear()
        for stream in unblocked:
            self._send_queued(stream, out)

    def check_integrity(self) -> None:
        """Assert what holds between events."""
        calls_and_nodes.check_integrity(
            self._calls, self._attempts, self._fanouts, self._nodes, self._waiting
        )
