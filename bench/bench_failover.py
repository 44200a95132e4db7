"""What a fault costs: the stall when a node is killed, frozen or slowed while tokens are made.

python bench/bench_failover.py [--transport fast] [--rounds 4]

Two replicas own every expert of Qwen3-30B-A3B's width with narrow experts (as bench_dispatch). A
"token" here is so many fan-outs of one row, one after the other, as a decode step makes them. Each
round starts with new processes, and from nodes that are known and in good standing: one in which
noise has one demoted before the fault, or the fault hits no call, is repeated, and counted. The
stall is what the fan-out with the fault takes beyond the usual; "worst later" is the longest of the
next tokens beyond the usual.

killed   SIGKILL between a call and its answer; then started again: "used again" is from when the
         node is ready until the coordinator has an answer of it
frozen   SIGSTOP in the same place: until its replica has answered, until the node is declared dead,
         and, from SIGCONT, until it is used again
far      frozen, with 45 ms round trips to both nodes (the chaos proxy of tests/support)
slow     SIGSTOP and SIGCONT in turn, 10 ms on and 90 ms off: a node with 10 % of a CPU. Counted:
         fan-outs until it is demoted, and the 99th percentile of a token from then on
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median

import numpy as np

from bench.bench_dispatch import NARROW, plan_of
from bench.make_synthetic import make
from bench.measure import ROOT, Row, save, show
from client.node_process import NodeProcess, stop_all
from coordinator.dispatch_stats import percentile
from coordinator.node_health import NodeHealth
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from coordinator.remote_sums import RemoteSums
from shoal import ops
from shoal.artifact import Artifact
from shoal.transport import Transport

sys.path.insert(0, str(ROOT / "tests"))

from support.chaos_proxy import ChaosProxy, Weather, steady

LAYERS = 24
FAR_LAYERS, FAR_RTT_S = 1, 0.045
BEFORE, AFTER = 20, 40  # tokens
MAX_WARM_UP = 1200  # fan-outs, until both nodes are known and in good standing
GIVE_UP_S = 10.0
MAX_REPEATED = 5
ON_S, OFF_S = 0.01, 0.09
READY_TIMEOUT_S = 120.0


class Duty:
    """Lets a node run a tenth of the time, until it is closed."""

    def __init__(self, node: NodeProcess) -> None:
        self._node = node
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._node.send(signal.SIGSTOP)
            self._is_over.wait(OFF_S)
            self._node.send(signal.SIGCONT)
            self._is_over.wait(ON_S)

    def close(self) -> None:
        """Let it run again."""
        self._is_over.set()
        self._thread.join()


class Setup:
    """Two replicas and a dispatch that knows them.

    rtt_s: of the way to them, if it is not loopback. layers: fan-outs of a token.
    """

    def __init__(
        self, stack: ExitStack, path: Path, scratch: Path, transport: Transport, rtt_s: float
    ) -> None:
        self.rtt_s, self.layers = rtt_s, FAR_LAYERS if rtt_s else LAYERS
        self.path, self.scratch, self.transport = path, scratch, transport
        self.nodes: list[NodeProcess] = []
        stack.callback(self.stop)
        self.nodes += [self.start(f"{n}", "127.0.0.1:0") for n in range(2)]
        for node in self.nodes:
            node.wait_ready(READY_TIMEOUT_S)
        self.endpoints = [node.endpoint for node in self.nodes]
        if rtt_s:
            weather = steady(Weather(delay_s=rtt_s / 2))
            proxies = [ChaosProxy(endpoint, weather) for endpoint in self.endpoints]
            self.endpoints = [stack.enter_context(proxy).endpoint for proxy in proxies]
        self.told: list[tuple[float, str]] = []
        artifact = Artifact.open(path)
        self.dispatch: RemoteDispatch = stack.enter_context(
            closing(
                open_remote_dispatch(
                    artifact,
                    f"0-{NARROW.experts - 1}={'|'.join(self.endpoints)}",
                    transport=transport,
                    notify=lambda text: self.told.append((time.monotonic(), text)),
                )
            )
        )
        rng = np.random.default_rng(1)
        self._rows = ops.quantise_rows(
            artifact.scheme(0), rng.standard_normal((1, NARROW.dim), np.float32)
        )
        self._plans = [plan_of(1, rng) for _ in range(16)]
        self._num_fanouts = 0

    def start(self, name: str, listen: str) -> NodeProcess:
        """Start a node."""
        flags = ["--listen", listen, "--threads", "1", "--warmup", "--transport", self.transport]
        return NodeProcess(f"node {name}", [str(self.path), *flags], self.scratch / f"{name}.log")

    def stop(self) -> None:
        """End the nodes, frozen ones too."""
        for node in self.nodes:
            if node.exit_status is None:
                node.send(signal.SIGCONT)
        stop_all(self.nodes)

    def health(self, number: int) -> NodeHealth:
        """Return what is known of a node."""
        health = self.dispatch.health(self.endpoints[number])
        assert health is not None
        return health

    def fanout(self, after: Callable[[], object] = lambda: None) -> int:
        """Make one; return how many of its calls were sent again.

        Args:
            after: done while it is on its way.
        """
        self._num_fanouts += 1
        plan = self._plans[self._num_fanouts % len(self._plans)]
        pending = self.dispatch.start(0, self._rows, plan)
        after()
        pending.wait()
        assert isinstance(pending, RemoteSums) and pending._fanout is not None
        return len(pending._fanout.retries)

    def token(self) -> float:
        """Return how long a token's fan-outs take."""
        began_s = time.perf_counter()
        for _ in range(self.layers):
            self.fanout()
        return time.perf_counter() - began_s

    def usual(self) -> list[float]:
        """Return how long tokens take now, from nodes in good standing. Raises Spoilt."""
        for _ in range(MAX_WARM_UP // self.layers):
            self.token()
            known = [self.health(n).model.is_known for n in range(2)]
            if all(known) and self.is_well():
                break
        tokens = [self.token() for _ in range(BEFORE)]
        if not self.is_well():
            raise Spoilt("a node was demoted before the fault")
        return tokens

    def is_well(self) -> bool:
        """Whether both nodes are in good standing."""
        now_s = time.monotonic()
        return all(self.health(n).rank(now_s) == 0 for n in range(2))

    def until(self, is_so: Callable[[], bool]) -> float:
        """Make fan-outs until that is so, GIVE_UP_S long at most; return when they ended."""
        give_up_s = time.monotonic() + GIVE_UP_S
        while not is_so() and time.monotonic() < give_up_s:
            self.fanout()
        return time.monotonic()

    def until_used(self) -> float:
        """Make fan-outs until node 0 has answered one; return when it had."""
        replied = self.health(0).num_replies
        return self.until(lambda: self.health(0).num_replies > replied)


class Spoilt(Exception):
    """Noise has spoilt a round: what was to be measured did not happen."""


def stall(setup: Setup, end: Callable[[NodeProcess], None]) -> Row:
    """Return what one fault costs the fan-out in which it happens, and tokens after it."""
    node = setup.nodes[0]
    before = setup.usual()
    usual_s = median(before)
    # Frozen first, in both cases: so the call is on its way when the node ends.
    node.send(signal.SIGSTOP)
    os.waitpid(node.pid, os.WUNTRACED)
    began_s = time.perf_counter()
    num_retries = setup.fanout(lambda: end(node))
    hit_s = time.perf_counter() - began_s - usual_s / setup.layers
    if not num_retries:
        raise Spoilt("the fault hit no call")
    after = [setup.token() for _ in range(AFTER)]
    return {
        "token_before_ms": usual_s * 1e3,
        "stall_ms": hit_s * 1e3,
        "later_stall_ms": (max(after) - usual_s) * 1e3,
        "token_after_ms": median(after) * 1e3,
    }


def killed(setup: Setup) -> Row:
    """SIGKILL, and a new start at the same address."""
    row = stall(setup, lambda node: node.send(signal.SIGKILL))
    setup.nodes[0].wait()
    ready_s: list[float] = []

    def restart() -> None:
        address = setup.nodes[0].endpoint.removeprefix("grpc://")
        setup.nodes[0] = setup.start("0-again", address)
        setup.nodes[0].wait_ready(READY_TIMEOUT_S)
        ready_s.append(time.monotonic())

    thread = threading.Thread(target=restart)
    thread.start()
    used_s = setup.until_used()
    thread.join()
    return {**row, "used_again_s": max(0.0, used_s - ready_s[0])}


def frozen(setup: Setup) -> Row:
    """SIGSTOP, until the node is given up, and SIGCONT."""
    frozen_s: list[float] = []
    row = stall(setup, lambda _: frozen_s.append(time.monotonic()))
    thawed_s = setup.until(lambda: any("no sign of life" in text for _, text in setup.told))
    told_s = next((told_s for told_s, text in setup.told if "no sign of life" in text), thawed_s)
    setup.nodes[0].send(signal.SIGCONT)
    return {
        **row,
        "bound_ms": max(0.05, 4 * setup.rtt_s) * 1e3,
        "dead_after_s": told_s - frozen_s[0],
        "used_again_s": setup.until_used() - thawed_s,
    }


def slowed(setup: Setup) -> Row:
    """Return how soon a slow node is avoided, and what tokens cost then."""
    before = setup.usual()
    health = setup.health(0)
    replied, fanouts, avoided = health.num_replies, 0, None
    with closing(Duty(setup.nodes[0])):
        while health.demoted_until_s < time.monotonic() and fanouts < 100 * LAYERS:
            setup.fanout()
            fanouts += 1
            if avoided is None and health.rests_until_s > time.monotonic():
                avoided = health.num_replies - replied
        replies = health.num_replies - replied
        after = [setup.token() for _ in range(AFTER)]
    if not fanouts:
        raise Spoilt("a node was demoted before the fault")
    return {
        "token_before_ms": median(before) * 1e3,
        "p99_before_ms": percentile(before, 99) * 1e3,
        "fanouts_until_demoted": fanouts,
        "replies_until_avoided": replies if avoided is None else avoided,
        "replies_until_demoted": replies,
        "token_after_ms": median(after) * 1e3,
        "p99_after_ms": percentile(after, 99) * 1e3,
    }


FAULTS: dict[str, tuple[float, Callable[[Setup], Row]]] = {
    "killed": (0.0, killed),
    "frozen": (0.0, frozen),
    "far": (FAR_RTT_S, frozen),
    "slow": (0.0, slowed),
}


def play(fault: str, path: Path, transport: Transport) -> Row:
    """Return a round's figures, of the first attempt that noise did not spoil."""
    rtt_s, measure = FAULTS[fault]
    for num_repeated in range(MAX_REPEATED + 1):
        with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch, ExitStack() as stack:
            setup = Setup(stack, path, Path(scratch), transport, rtt_s)
            try:
                return {"fault": fault, **measure(setup), "repeated": num_repeated}
            except Spoilt as why:
                print(f"{fault}: repeated: {why}", flush=True)
    raise SystemExit(f"{fault}: {MAX_REPEATED} rounds in a row were spoilt: too much else runs")


def main() -> None:
    """Measure each fault a few times over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", default="fast", help="of both ends")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--faults", default=",".join(FAULTS))
    chosen = parser.parse_args()
    faults = chosen.faults.split(",")
    _, path = make(ROOT / "build" / "bench", "narrow-experts", NARROW, "q4_0", 0)
    transport = Transport(chosen.transport)
    rows = [play(fault, path, transport) for _ in range(chosen.rounds) for fault in faults]
    medians: list[Row] = []
    for name in faults:
        mine = [row for row in rows if row["fault"] == name]
        figures = {key: median(row[key] for row in mine) for key in mine[0] if key != "fault"}
        worst = {f"worst_{key}": max(row[key] for row in mine) for key in figures}
        medians.append({"fault": name, **figures, **worst})

    def cell(key: str) -> Callable[[Row], str]:
        return lambda row: f"{row[key]:.1f}" if key in row else ""

    show(
        f"Two replicas, {LAYERS} layers a token (far: {FAR_LAYERS}), medians of {chosen.rounds}",
        medians,
        {
            "fault": lambda row: str(row["fault"]),
            "token before ms": cell("token_before_ms"),
            "stall ms": cell("stall_ms"),
            "worst": cell("worst_stall_ms"),
            "allowed ms": cell("bound_ms"),
            "worst later ms": cell("later_stall_ms"),
            "token after ms": cell("token_after_ms"),
            "p99 before ms": cell("p99_before_ms"),
            "p99 after ms": cell("p99_after_ms"),
            "its answers until avoided": cell("replies_until_avoided"),
            "until demoted": cell("replies_until_demoted"),
            "dead after s, worst": cell("worst_dead_after_s"),
            "used again s, worst": cell("worst_used_again_s"),
            "repeated, most": cell("worst_repeated"),
        },
    )
    save("failover", rows, transport=chosen.transport, layers=LAYERS, far_layers=FAR_LAYERS)


if __name__ == "__main__":
    main()
