"""A simulated world around the dispatch core: nodes that die, hang, crawl, lose and repeat things.

One seed decides everything: topology, load, weather and faults. The world checks each command
against what a careful reader of the protocol would allow, and at the end that all calls ended.

    python -m support.dispatch_simulator [SEED]     (make sim SEED=...)
"""

import heapq
import itertools
import random
import sys
from collections.abc import Callable

from coordinator import dispatch
from coordinator.dispatch import HEDGE_SHARE, MAX_ATTEMPTS, Dispatcher
from coordinator.dispatch_events import (
    Accept,
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
    ReleaseNode,
    Replied,
    Send,
    Ticked,
    TimeOut,
)
from coordinator.node_health import MIN_SAMPLES, SILENT_S
from shoal import errors
from support.simulated_ahead import SimAhead
from support.simulated_node import SimNode

TICK_S = 0.005
PROGRESS_S = 0.025
CALL_TIMEOUT_S = 10.0
SHARD_WAIT_S = 10.0  # forty fan-outs may wait for it one after the other
CREDIT_BYTES = 300
END_S = 600.0  # of simulated time: far beyond every wait
MAX_FANOUTS, MAX_CALLS = 3, 4  # at a time, of each
FAULTS = ("kill", "freeze", "slow", "reset", "drain", "lossy", "busy")


class World:
    """Feeds a dispatcher until every fan-out has ended.

    Args:
        gentle: one fault at a time, every range replicated: then nothing may fail.
    """

    def __init__(self, seed: int, core: Dispatcher, *, gentle: bool = False) -> None:
        self.seed, self.gentle = seed, gentle
        self.random = random.Random(f"{seed} {gentle}")
        self.core = core
        self.now_s = 0.0
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._connections = itertools.count()
        self.latency_s = self.random.choice([0.0001, 0.001, 0.02])
        self.duplicates = self.random.choice([0.0, 0.0, 0.05])
        self.poison = -1 if gentle or self.random.random() < 0.8 else self.random.randint(1, 60)
        self.poisoned: set[int] = set()
        count = self.random.randint(2, 4)
        work_s = self.random.choice([0.0002, 0.002, 0.01])
        self.nodes = [SimNode(n, work_s * self.random.uniform(1, 2)) for n in range(count)]
        self.groups = self._topology(count)
        self.num_left = self.random.randint(10, 40)
        self.calls: dict[int, tuple[int, NewCall]] = {}
        self.attempts: dict[int, tuple[int, int, int]] = {}  # -> call, node, connection
        self.open_attempts: dict[int, None] = {}  # no terminal frame seen
        self.attempts_of: dict[int, list[int]] = {}  # by call
        self.sent_s: dict[int, float] = {}  # of attempts
        self.ended_in_vain: set[int] = set()  # attempts refused, or lost with their connection
        self.hedged: list[int] = []  # calls that were sent again without such a reason
        self.unanswered: dict[int, set[int]] = {}  # fan-out -> its calls without an answer
        self.ended: dict[int, str] = {}
        self.retired: set[int] = set()
        self.draining: set[int] = set()  # as the core knows it
        self.is_faulty = False
        self.num_faults_left = self.random.randint(1, 8)
        self._ids = itertools.count(1)
        self._fanout_ids = itertools.count(1)
        self.num_events = 0
        self.ahead = SimAhead(self)

    def _topology(self, count: int) -> list[tuple[int, ...]]:
        groups = []
        for _ in range(self.random.randint(1, 3)):
            size = self.random.randint(2 if self.gentle else 1, count)
            groups.append(tuple(self.random.sample(range(count), size)))
        return groups

    # Running.

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now_s + delay_s, next(self._order), action))

    def run(self) -> None:
        """Play the whole story."""
        for node in self.nodes:
            self.meet(node)
        if self.random.random() < 0.5:
            for node in self.nodes:
                self.teach(node)
        for _ in range(self.random.randint(1, MAX_FANOUTS)):
            self.start()
        self.at(self.random.uniform(0.0, 0.2), self.fault)
        self.at(TICK_S, self.tick)
        while self._agenda and not self.is_done():
            self.now_s, _, action = heapq.heappop(self._agenda)
            assert self.now_s < END_S, "a fan-out never ended"
            action()
        self.core.check_integrity()
        assert self.is_done(), "the agenda is empty, and not all fan-outs have ended"
        self.check_load()

    def teach(self, node: SimNode) -> None:
        """Let the core see as many calls of a node as it takes to know it: then it hedges."""
        for call_id in range(-2 * MIN_SAMPLES, 0):
            work = self.random.uniform(1.0, 4.0)
            call = NewCall(call_id, (node.number,), Lane.INTERACTIVE, 1, work)
            self.core.on(FanoutStarted(call_id, (call,), self.now_s))
            busy_s = work * node.work_s
            self.now_s += 2 * self.latency_s * self.random.uniform(0.5, 1.5) + busy_s
            self.core.on(Replied(call_id, node.number, self.now_s, busy_s))

    def is_done(self) -> bool:
        return self.num_left == 0 and len(self.ended) == len(self.unanswered)

    def tick(self) -> None:
        self.feed(Ticked(self.now_s))
        # With nothing to be late a shell would sleep.
        self.at(TICK_S if self.random.random() < 0.98 else 0.05, self.tick)

    def feed(self, event: Event) -> None:
        self.num_events += 1
        if self.ahead.takes(event):
            return
        commands = self.core.on(event)
        if self.num_events % 8 == 0:
            self.core.check_integrity()
            self.check_bounds()
        for command in commands:
            self.check(command, event)

    def start(self) -> None:
        if self.num_left == 0:
            return
        self.num_left -= 1
        fanout_id = next(self._fanout_ids)
        calls = []
        for _ in range(self.random.randint(1, MAX_CALLS)):
            group = self.random.choice(self.groups)
            first = self.random.randrange(len(group))
            lane = self.random.choice(list(Lane))
            size, work = self.random.randint(1, 150), self.random.uniform(1.0, 4.0)
            call = NewCall(next(self._ids), group[first:] + group[:first], lane, size, work)
            self.calls[call.call_id] = (fanout_id, call)
            calls.append(call)
        self.unanswered[fanout_id] = {call.call_id for call in calls}
        if not self.ahead.starts(fanout_id, calls):
            self.feed(FanoutStarted(fanout_id, tuple(calls), self.now_s))
        if self.random.random() < 0.02 and fanout_id not in self.ended:
            self.ahead.end()
            self.end(fanout_id, "abandoned")
            self.feed(FanoutAbandoned(fanout_id))

    # What the core wants.

    def check(self, command: Command, event: Event) -> None:
        match command:
            case Send():
                self.send(command)
            case Accept(call_id):
                assert isinstance(event, Replied)
                asked, node, _ = self.attempts[event.attempt_id]
                fanout_id, call = self.calls[call_id]
                assert asked == call_id, "an answer to another call"
                assert node == event.node and node in call.candidates, "it does not own the range"
                assert fanout_id not in self.ended, "an answer after the end"
                assert call_id in self.unanswered[fanout_id], "an answer used twice"
                self.unanswered[fanout_id].remove(call_id)
            case Finish(fanout_id):
                assert not self.unanswered[fanout_id], "finished without all its answers"
                self.end(fanout_id, "finished")
            case Fail(fanout_id, call_id, error):
                assert self.calls[call_id][0] == fanout_id
                self.end(fanout_id, f"failed: {error!r}")
            case TimeOut(fanout_id) | GiveUpWaiting(fanout_id):
                self.end(fanout_id, f"failed: {command}")
            case Cancel(attempt_id, node, _):
                _, at, connection = self.attempts[attempt_id]
                assert at == node and self.nodes[node].connection == connection
                self.later(self.nodes[node], lambda: self.cancelled(attempt_id))
            case CloseNode(node):
                self.disconnect(self.nodes[node])
            case ReleaseNode(node):
                assert node in self.retired

    def send(self, command: Send) -> None:
        attempt_id, node = command.attempt_id, self.nodes[command.node]
        fanout_id, call = self.calls[command.call_id]
        assert attempt_id not in self.attempts, "an id used twice"
        assert node.number in call.candidates, "sent to a node that does not own the range"
        assert node.connection is not None, "sent to a lost node"
        assert node.number not in self.draining | self.retired, "sent to a leaving node"
        assert fanout_id not in self.ended, "sent for a fan-out that is over"
        assert command.call_id in self.unanswered[fanout_id], "sent though it is answered"
        assert command.lane == call.lane
        used = [
            self.calls[self.attempts[other][0]][1].num_bytes
            for other in self.open_attempts
            if self.attempts[other][1:] == (node.number, node.connection)
            and self.calls[self.attempts[other][0]][1].lane == call.lane
        ]
        assert not used or sum(used) + call.num_bytes <= CREDIT_BYTES, "beyond the credit"
        self.attempts[attempt_id] = (command.call_id, node.number, node.connection)
        self.open_attempts[attempt_id] = None
        self.sent_s[attempt_id] = self.now_s
        self.check_reason(command.call_id)
        self.attempts_of.setdefault(command.call_id, []).append(attempt_id)
        self.later(node, lambda: self.arrived(node, attempt_id))

    def end(self, fanout_id: int, how: str) -> None:
        assert fanout_id not in self.ended, f"fan-out {fanout_id} ended twice"
        self.ended[fanout_id] = how
        poisonous = self.poison in self.calls and self.calls[self.poison][0] == fanout_id
        if self.gentle and how.startswith("failed"):
            raise AssertionError(f"a replica was there, and yet fan-out {fanout_id} {how}")
        if poisonous and how == "finished":
            raise AssertionError("who answered the query of death?")
        self.at(self.random.uniform(0.0, 0.002), self.start)

    def check_reason(self, call_id: int) -> None:
        """A call is sent again when its node refused, was lost or is silent: else it is a hedge."""
        for attempt_id in self.attempts_of.get(call_id, ()):
            is_silent = self.now_s - self.sent_s[attempt_id] >= SILENT_S
            if attempt_id not in self.ended_in_vain and not is_silent:
                self.hedged.append(call_id)
        assert self.hedged.count(call_id) <= 1, "a call was hedged twice"

    def check_load(self) -> None:
        """Whatever the faults: what is sent again without their reason is paid for."""
        assert max(map(len, self.attempts_of.values()), default=0) <= MAX_ATTEMPTS
        assert len(self.poisoned) <= 2, "the query of death took a third node"
        allowed = len(self.calls) * HEDGE_SHARE + dispatch.HEDGE_BURST
        assert len(self.hedged) <= allowed, "more hedges than tokens"

    def check_bounds(self) -> None:
        """What is kept is of fan-outs in flight, and they are few."""
        calls = sum(len(left) for f, left in self.unanswered.items() if f not in self.ended)
        assert calls <= MAX_FANOUTS * MAX_CALLS
        assert len(self.core._calls) <= calls and len(self.core._waiting) <= calls
        kept = list(self.core._attempts.values())
        num_replicas = max(map(len, self.groups))
        assert sum(not a.is_orphan for a in kept) <= calls * num_replicas
        held = sum(a.call.new.num_bytes for a in kept if a.is_sent)
        assert held <= CREDIT_BYTES * len(self.nodes) * len(Lane), "beyond all credits"

    # The network: what is sent over a connection is lost with it.

    def later(self, node: SimNode, action: Callable[[], None]) -> None:
        connection, process = node.connection, node.process

        def happen() -> None:
            if node.connection != connection or node.process != process:
                return
            if node.is_frozen:
                node.backlog.append(action)
            else:
                action()

        if self.random.random() >= node.loss:
            self.at(self.latency_s * self.random.uniform(0.5, 1.5), happen)

    def answer(self, node: SimNode, make: Callable[[], Event], attempt_id: int | None) -> None:
        connection = node.connection

        def happen() -> None:
            if node.connection == connection:
                if attempt_id is not None:
                    self.open_attempts.pop(attempt_id, None)
                self.feed(make())

        if self.random.random() >= node.loss:
            delay_s = self.latency_s * self.random.uniform(0.5, 1.5)
            self.at(delay_s, happen)
            if self.random.random() < self.duplicates:
                self.at(delay_s * self.random.uniform(1, 3), happen)

    def arrived(self, node: SimNode, attempt_id: int) -> None:
        call_id = self.attempts[attempt_id][0]
        if call_id == self.poison:
            self.poisoned.add(node.number)
            self.kill(node, self.random.uniform(0.05, 0.5))
            return
        if node.is_draining:
            self.refuse(node, attempt_id, errors.NodeDraining())
            return
        if self.random.random() < node.refusal:
            self.refuse(node, attempt_id, errors.NodeBusy())
            return
        node.held[attempt_id] = call_id
        takes_s = self.calls[call_id][1].work * node.work_s * node.slowness
        node.free_s = max(node.free_s, self.now_s) + takes_s
        self.own(node, node.free_s - self.now_s, lambda: self.computed(node, attempt_id, takes_s))
        if not node.is_progressing:
            node.is_progressing = True
            self.own(node, PROGRESS_S, lambda: self.progress(node))

    def own(self, node: SimNode, delay_s: float, action: Callable[[], None]) -> None:
        """Let the node do that by itself after a while, unless it is dead by then."""
        connection, process = node.connection, node.process

        def happen() -> None:
            if node.process != process or node.connection != connection:
                return
            if node.is_frozen:
                node.backlog.append(action)
            else:
                action()

        self.at(delay_s, happen)

    def lie(self, node: SimNode) -> None:
        """Answer a call that somebody else has."""
        others = [a for a in self.open_attempts if self.attempts[a][1] != node.number]
        if others and node.connection is not None:
            attempt_id = self.random.choice(others)
            self.feed(Replied(attempt_id, node.number, self.now_s))

    def computed(self, node: SimNode, attempt_id: int, busy_s: float) -> None:
        if node.held.pop(attempt_id, None) is not None:
            if self.random.random() < 0.02:
                self.lie(self.random.choice(self.nodes))
            self.answer(
                node, lambda: Replied(attempt_id, node.number, self.now_s, busy_s), attempt_id
            )

    def progress(self, node: SimNode) -> None:
        node.is_progressing = bool(node.held)
        if node.held:
            held = tuple(node.held)
            self.answer(node, lambda: Progressed(node.number, held, self.now_s), None)
            self.own(node, PROGRESS_S, lambda: self.progress(node))

    def cancelled(self, attempt_id: int) -> None:
        node = self.nodes[self.attempts[attempt_id][1]]
        if node.held.pop(attempt_id, None) is not None:
            self.refuse(node, attempt_id, errors.CallCancelled())

    def refuse(self, node: SimNode, attempt_id: int, error: errors.ShoalError) -> None:
        self.ended_in_vain.add(attempt_id)
        self.answer(
            node,
            lambda: Failed(attempt_id, node.number, error, False, self.now_s),
            attempt_id,
        )

    # Nodes that come and go.

    def meet(self, node: SimNode) -> None:
        """Try to open a node that is lost, until it works."""
        if node.number in self.retired:
            return
        if not node.is_up or node.is_frozen or node.is_draining:
            self.feed(NodeAbsent(node.number, errors.NodeUnreachable("absent"), self.now_s))
            self.at(self.random.uniform(0.05, 1.0), lambda: self.meet(node))
            return
        is_same = node.process == node.met_process
        node.met_process, node.connection = node.process, next(self._connections)
        node.held, node.backlog, node.is_progressing, node.free_s = {}, [], False, 0.0
        self.draining.discard(node.number)
        rtt_s = 2 * self.latency_s
        self.feed(NodeOpened(node.number, CREDIT_BYTES, rtt_s, is_same, self.now_s))

    def disconnect(self, node: SimNode) -> None:
        for attempt_id in list(self.open_attempts):
            if self.attempts[attempt_id][1] == node.number:
                del self.open_attempts[attempt_id]
                self.ended_in_vain.add(attempt_id)
        node.connection = None
        self.at(self.random.uniform(0.001, 0.1), lambda: self.meet(node))

    def lose(self, node: SimNode) -> None:
        if node.connection is not None:
            self.disconnect(node)
            error = errors.NodeUnreachable("lost")
            self.feed(NodeLost(node.number, error, False, self.now_s))

    def kill(self, node: SimNode, restart_s: float) -> None:
        if not node.is_up:
            return
        node.is_up, node.is_frozen, node.process = False, False, node.process + 1
        self.at(0.005, lambda: self.lose(node))
        self.at(restart_s, lambda: self.revive(node))

    def revive(self, node: SimNode) -> None:
        node.is_up, node.is_draining = True, False

    def fault(self) -> None:
        """Do something bad to somebody; it passes. Then, perhaps, again."""
        if self.random.random() < 0.15 and self.gentle:
            return  # a story without faults
        if self.num_faults_left == 0:
            return
        self.num_faults_left -= 1
        self.is_faulty = True
        node, what = self.random.choice(self.nodes), self.random.choice(FAULTS)
        lasts_s = self.random.choice([0.02, 0.2, 1.0, 5.0])
        match what:
            case "kill":
                is_gone = not self.gentle and self.random.random() < 0.2
                self.kill(node, END_S if is_gone else lasts_s)
            case "freeze":
                node.is_frozen = True
                self.at(lasts_s, lambda: self.thaw(node))
            case "slow":
                node.slowness = self.random.choice([5.0, 30.0])
                self.at(lasts_s, lambda: setattr(node, "slowness", 1.0))
            case "reset":
                self.lose(node)
            case "drain":
                self.drain(node, lasts_s)
            case "lossy":
                node.loss = 0.3
                self.at(lasts_s, lambda: setattr(node, "loss", 0.0))
            case "busy":
                node.refusal = 0.5
                self.at(lasts_s, lambda: setattr(node, "refusal", 0.0))
        if not self.gentle and self.random.random() < 0.03:
            self.retire(self.random.choice(self.nodes))
        pause_s = self.random.uniform(0.0, 0.5)
        self.at(pause_s + (lasts_s + 4.0 if self.gentle else 0.0), self.fault)

    def thaw(self, node: SimNode) -> None:
        node.is_frozen = False
        backlog, node.backlog = node.backlog, []
        for action in backlog:
            action()

    def drain(self, node: SimNode, lasts_s: float) -> None:
        if node.connection is None or not node.is_up:
            return
        node.is_draining = True
        self.draining.add(node.number)
        self.feed(NodeDraining(node.number, errors.NodeDraining(), self.now_s))
        self.at(0.02, lambda: self.kill(node, lasts_s))

    def retire(self, node: SimNode) -> None:
        self.retired.add(node.number)
        self.feed(NodeRetired(node.number, errors.NodeUnreachable("retired")))


def play(seed: int, core: Callable[[], Dispatcher] | None = None, *, gentle: bool = False) -> World:
    """Run the world of that seed to its end. Raises AssertionError: the core did wrong."""
    made = Dispatcher(CALL_TIMEOUT_S, SHARD_WAIT_S) if core is None else core()
    world = World(seed, made, gentle=gentle)
    try:
        world.run()
    except AssertionError as error:
        error.add_note(f"replay it with: make sim SEED={seed}")
        raise
    return world


def main() -> None:
    """Replay one seed, gentle and wild; without one, a thousand new ones."""
    chosen = [int(sys.argv[1])] if len(sys.argv) > 1 and sys.argv[1] else []
    seeds = chosen or random.SystemRandom().sample(range(10**9), 1000)
    for seed in seeds:
        for gentle in (False, True):
            world = play(seed, gentle=gentle)
            if chosen:
                counts: dict[str, int] = {}
                for how in world.ended.values():
                    counts[how[:60]] = counts.get(how[:60], 0) + 1
                sys.stdout.write(
                    f"gentle={gentle}: {world.now_s:.2f} s, {world.num_events} events, "
                    f"{len(world.attempts)} attempts of {len(world.calls)} calls, {counts}\n"
                )
    sys.stdout.write(f"{len(seeds)} seeds: every call ended once, by an owner of its range\n")


if __name__ == "__main__":
    main()
