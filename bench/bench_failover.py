"""What a fault costs: the stall when a node is killed, frozen or slowed while tokens are made.

python bench/bench_failover.py [--transport fast] [--rounds 5]

Two replicas own every expert of Qwen3-30B-A3B's width with narrow experts (as bench_dispatch). A
"token" here is LAYERS fan-outs of one row, one after the other, as a decode step makes them. Each
round starts from warm, known nodes. The stall is what the fan-out with the fault takes beyond the
usual; "worst later" is the longest of the next tokens beyond the usual.

killed   SIGKILL between a call and its answer
frozen   SIGSTOP in the same place: until its replica has answered
slow     SIGSTOP and SIGCONT in turn, 10 ms on and 90 ms off: a node with 10 % of a CPU. Counted:
         fan-outs until it is demoted, and the 99th percentile of a token from then on
"""

import argparse
import os
import signal
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
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import ops
from shoal.artifact import Artifact
from shoal.transport import Transport

LAYERS = 24
WARM_UP, BEFORE, AFTER = 8, 20, 40  # tokens
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
    """Two replicas and a dispatch that knows them."""

    def __init__(self, stack: ExitStack, path: Path, scratch: Path, transport: Transport) -> None:
        flags = ["--listen", "127.0.0.1:0", "--threads", "1", "--warmup", "--transport", transport]
        self.nodes = [
            NodeProcess(f"node {i}", [str(path), *flags], scratch / f"{i}.log") for i in range(2)
        ]
        stack.callback(stop_all, self.nodes)
        for node in self.nodes:
            node.wait_ready(READY_TIMEOUT_S)
        artifact = Artifact.open(path)
        replicas = "|".join(node.endpoint for node in self.nodes)
        shards = f"0-{NARROW.experts - 1}={replicas}"
        self.dispatch: RemoteDispatch = stack.enter_context(
            closing(open_remote_dispatch(artifact, shards, transport=transport))
        )
        rng = np.random.default_rng(1)
        self._rows = ops.quantise_rows(
            artifact.scheme(0), rng.standard_normal((1, NARROW.dim), np.float32)
        )
        self._plans = [plan_of(1, rng) for _ in range(16)]
        for _ in range(WARM_UP):
            self.token()

    def fanout(self, layer: int, after: Callable[[], object] = lambda: None) -> None:
        """Make one. after: done while it is on its way."""
        pending = self.dispatch.start(0, self._rows, self._plans[layer % len(self._plans)])
        after()
        pending.wait()

    def token(self) -> float:
        """Return how long LAYERS fan-outs take."""
        began_s = time.perf_counter()
        for layer in range(LAYERS):
            self.fanout(layer)
        return time.perf_counter() - began_s


def stall(setup: Setup, end: Callable[[NodeProcess], None]) -> Row:
    """Return what one fault costs the fan-out in which it happens, and tokens after it."""
    node = setup.nodes[0]
    before = [setup.token() for _ in range(BEFORE)]
    usual_s = median(before)
    # Frozen first, in both cases: so the call is on its way when the node ends.
    node.send(signal.SIGSTOP)
    os.waitpid(node.pid, os.WUNTRACED)
    began_s = time.perf_counter()
    setup.fanout(0, lambda: end(node))
    hit_s = time.perf_counter() - began_s - usual_s / LAYERS
    after = [setup.token() for _ in range(AFTER)]
    return {
        "token_before_ms": usual_s * 1e3,
        "stall_ms": hit_s * 1e3,
        "later_stall_ms": (max(after) - usual_s) * 1e3,
        "token_after_ms": median(after) * 1e3,
    }


def slowed(setup: Setup) -> Row:
    """Return how soon a slow node is avoided, and what tokens cost then."""
    before = [setup.token() for _ in range(BEFORE)]
    node = setup.nodes[0]
    health = setup.dispatch.health(node.endpoint)
    assert health is not None
    replied, fanouts = health.num_replies, 0
    with closing(Duty(node)):
        while health.demoted_until_s < time.monotonic() and fanouts < 100 * LAYERS:
            setup.fanout(fanouts)
            fanouts += 1
        replies = health.num_replies - replied
        after = [setup.token() for _ in range(AFTER)]
    return {
        "token_before_ms": median(before) * 1e3,
        "p99_before_ms": percentile(before, 99) * 1e3,
        "fanouts_until_demoted": fanouts,
        "replies_until_demoted": replies,
        "token_after_ms": median(after) * 1e3,
        "p99_after_ms": percentile(after, 99) * 1e3,
    }


def main() -> None:
    """Measure each fault a few times over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", default="fast", help="of both ends")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    _, path = make(ROOT / "build" / "bench", "narrow-experts", NARROW, "q4_0", 0)
    faults: dict[str, Callable[[Setup], Row]] = {
        "killed": lambda setup: stall(setup, lambda node: node.send(signal.SIGKILL)),
        "frozen": lambda setup: stall(setup, lambda _: None),
        "slow": slowed,
    }
    rows: list[Row] = []
    for _ in range(chosen.rounds):
        for name, measure in faults.items():
            with (
                tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch,
                ExitStack() as stack,
            ):
                setup = Setup(stack, path, Path(scratch), Transport(chosen.transport))
                rows.append({"fault": name, **measure(setup)})
                setup.nodes[0].send(signal.SIGCONT)
    medians: list[Row] = []
    for name in faults:
        mine = [row for row in rows if row["fault"] == name]
        figures = {key: median(row[key] for row in mine) for key in mine[0] if key != "fault"}
        medians.append({"fault": name, **figures})

    def cell(key: str) -> Callable[[Row], str]:
        return lambda row: f"{row[key]:.1f}" if key in row else ""

    show(
        f"Two replicas on loopback, {LAYERS} layers a token, medians of {chosen.rounds}",
        medians,
        {
            "fault": lambda row: str(row["fault"]),
            "token before ms": cell("token_before_ms"),
            "stall ms": cell("stall_ms"),
            "worst later ms": cell("later_stall_ms"),
            "token after ms": cell("token_after_ms"),
            "p99 before ms": cell("p99_before_ms"),
            "p99 after ms": cell("p99_after_ms"),
            "fan-outs until demoted": cell("fanouts_until_demoted"),
        },
    )
    save("failover", rows, transport=chosen.transport, layers=LAYERS)


if __name__ == "__main__":
    main()
