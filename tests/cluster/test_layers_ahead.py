"""Many layers of one row in a native call, their experts on real nodes: right, whatever comes."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.expert_dispatch import LocalDispatch
from coordinator.fast_client import FastClient
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from coordinator.row_fanout import LayersEnd
from shoal import errors, ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.transport import Transport
from support.chaos_proxy import ChaosProxy, Weather, steady
from support.cluster import Cluster, freeze, kill, thaw
from support.forward_passes import ForwardPasses
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor

pytestmark = pytest.mark.processes
NUM_LAYERS, NUM_EXPERTS = 20, 16  # more layers than may be untold
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NUM_TOKENS = 40  # 20 layers of 16 are told at once
MOST_TOKENS = 200  # a busy machine takes some until a pass runs ahead
F32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("deep")
    return make_tiny_artifact(tmp, "qwen3_moe", "q8_0", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def nodes(deep: Path) -> Iterator[list[str]]:
    with Cluster(Transport.FAST) as cluster:
        yield [node.endpoint for node in cluster.nodes(deep)]


@pytest.fixture(scope="module")
def right(deep: Path) -> list[bytes]:
    """Logits after the prompt and each of the tokens."""
    return Reader(ForwardPasses(deep)).read(MOST_TOKENS)


class Reader:
    """Reads the same text token by token."""

    def __init__(self, passes: ForwardPasses) -> None:
        self._passes = passes
        self._sequence = passes.sequence(PROMPT)
        self._next = 0

    def read(self, count: int) -> list[bytes]:
        logits = []
        for _ in range(count):
            if self._next:
                self._sequence.extend([self._next % 100])
            num_rows = 1 if self._next else len(PROMPT)
            logits.append(self._passes.run((self._sequence, num_rows)).tobytes())
            self._next += 1
        return logits


class Told(Reader):
    """One that reads over nodes, and knows what came of each run of layers."""

    def __init__(self, path: Path, dispatch: RemoteDispatch) -> None:
        super().__init__(ForwardPasses(path, dispatch=dispatch))
        client = dispatch._client
        assert isinstance(client, FastClient)
        self.client = client
        self.ends: list[LayersEnd] = []
        self._run_layers: Callable[..., LayersEnd | None] = client.run_layers
        client.run_layers = self._noting  # type: ignore[assignment]

    def _noting(self, *arguments: object) -> LayersEnd | None:
        end = self._run_layers(*arguments)
        if end is not None:
            self.ends.append(end)
        return end

    def until_ahead(self, right: list[bytes]) -> int:
        """Read until whole passes run ahead; return how many tokens that took."""
        count = 0
        while not self.ends or len(self.ends[-1].rows) < NUM_LAYERS - 16:
            assert count < MOST_TOKENS - NUM_TOKENS, "no whole pass ever ran ahead"
            assert self.read(1) == right[count : count + 1]
            count += 1
        return count


def opened(path: Path, shards: str, shard_wait_s: float = 30.0) -> RemoteDispatch:
    artifact = Artifact.open(path)
    return open_remote_dispatch(
        artifact, shards, shard_wait_s=shard_wait_s, transport=Transport.FAST
    )


def shard_file(endpoint: str) -> str:
    return f'[[shard]]\nexperts = "0-15"\nendpoints = ["{endpoint}"]\n'


def halves(a: str, b: str) -> str:
    return f"0-7={a},8-15={b}"


def test_a_pass_is_a_few_native_calls_and_gives_the_bits_of_one_process(
    deep: Path, nodes: list[str], right: list[bytes]
) -> None:
    with closing(opened(deep, halves(*nodes))) as dispatch:
        told = Told(deep, dispatch)
        assert told.read(NUM_TOKENS) == right[:NUM_TOKENS]
        in_runs = [len(end.rows) for end in told.ends]
        assert max(in_runs) == 16 and sum(in_runs) > NUM_LAYERS * NUM_TOKENS // 2
        assert dispatch.stats.summary().num_fanouts == NUM_LAYERS * NUM_TOKENS
        health = dispatch.health(nodes[0])
        assert health is not None and health.num_replies > NUM_LAYERS * NUM_TOKENS // 2
        for lane in told.client._lanes.values():
            lane._connection.check_integrity()


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_node_that_is_lost_in_a_run_is_replaced(deep: Path, right: list[bytes], how: str) -> None:
    with Cluster(Transport.FAST) as cluster:
        a, b = cluster.nodes(deep)
        with closing(opened(deep, f"0-15={a.endpoint}|{b.endpoint}")) as dispatch:
            told = Told(deep, dispatch)
            count = told.until_ahead(right)
            (kill if how == "kill" else freeze)(a)
            try:
                assert told.read(NUM_TOKENS) == right[count : count + NUM_TOKENS]
            finally:
                if how == "freeze":
                    thaw(a)
            assert any(end.left is not None for end in told.ends)


def test_the_only_node_s_end_is_named_and_what_was_before_stays_right(
    deep: Path, right: list[bytes]
) -> None:
    with Cluster(Transport.FAST) as cluster:
        node = cluster.node(deep)
        with closing(opened(deep, f"0-15={node.endpoint}", shard_wait_s=0.0)) as dispatch:
            told = Told(deep, dispatch)
            told.until_ahead(right)
            kill(node)
            with pytest.raises(errors.NodeError, match=node.endpoint.removeprefix("grpc://")):
                told.read(1)


def test_a_link_that_grows_far_is_adopted_layer_by_layer(
    deep: Path, nodes: list[str], right: list[bytes]
) -> None:
    with (
        ChaosProxy(nodes[0]) as proxy,
        closing(opened(deep, halves(proxy.endpoint, nodes[1]))) as dispatch,
    ):
        told = Told(deep, dispatch)
        count = told.until_ahead(right)
        proxy.forecast = steady(Weather(delay_s=0.03))
        assert told.read(2) == right[count : count + 2]
        assert told.ends[-1].row is None or told.ends[-1].row.adopted is not None


def test_fan_outs_of_other_threads_end_a_run_and_nothing_is_mixed_up(
    deep: Path, nodes: list[str], right: list[bytes]
) -> None:
    artifact = Artifact.open(deep)
    x = np.random.default_rng(0).standard_normal((1, artifact.spec.model_dim), np.float32)
    rows = ops.quantise_rows(artifact.scheme(1), x)
    plan = RoutingPlan(np.array([[1, 6, 9, 15]], np.int32), np.full((1, 4), 0.25, np.float32))
    local = LocalDispatch(whole_executor(artifact)).start(1, rows, plan).wait().tobytes()
    with closing(opened(deep, halves(*nodes))) as dispatch:
        told = Told(deep, dispatch)
        count = told.until_ahead(right)
        wrong: list[int] = []
        is_over = threading.Event()

        def disturb() -> None:
            number = 0
            while not is_over.is_set():
                ask = dispatch.sums if number % 2 else lambda *a: dispatch.start(*a).wait()
                if ask(1, rows, plan).tobytes() != local:
                    wrong.append(number)
                dispatch.hint(2, plan)
                number += 1

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            assert told.read(NUM_TOKENS) == right[count : count + NUM_TOKENS]
        finally:
            is_over.set()
            thread.join()
        assert wrong == []
        for lane in told.client._lanes.values():
            lane._connection.check_integrity()


def test_a_map_that_changes_in_a_run_is_used_from_the_next_layer_on(
    deep: Path, right: list[bytes], tmp_path: Path
) -> None:
    with Cluster(Transport.FAST) as cluster:
        a, b = cluster.nodes(deep)
        file = tmp_path / "map.toml"
        file.write_text(shard_file(a.endpoint))
        with closing(opened(deep, f"@{file}")) as dispatch:
            told = Told(deep, dispatch)
            count = told.until_ahead(right)
            file.write_text(shard_file(b.endpoint))
            thread = threading.Thread(target=dispatch.reload)
            thread.start()
            assert told.read(5) == right[count : count + 5]
            thread.join()
            kill(a)
            assert told.read(5) == right[count + 5 : count + 10]


def test_a_signal_in_a_run_loses_nothing(deep: Path, nodes: list[str], right: list[bytes]) -> None:
    """Ctrl-C in the middle of a pass: it is given up, and the next ones are right."""

    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    with closing(opened(deep, halves(*nodes))) as dispatch:
        told = Told(deep, dispatch)
        count = told.until_ahead(right)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for number in range(30):
                passes = ForwardPasses(deep, dispatch=dispatch)
                sequence = passes.sequence(PROMPT[:1])
                signal.setitimer(signal.ITIMER_REAL, 0.0005 * (number + 1))
                try:
                    for _ in range(400):
                        passes.run((sequence, 1))
                        sequence.extend([1])
                except Interrupted:
                    pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert told.read(NUM_TOKENS) == right[count : count + NUM_TOKENS]
        assert told.client._runner is None
        for lane in told.client._lanes.values():
            lane._connection.check_integrity()
