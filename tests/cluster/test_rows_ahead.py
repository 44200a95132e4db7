"""Fan-outs of one row that run ahead of the dispatch core, to real nodes: right, whatever comes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from coordinator.expert_dispatch import PendingSums
from coordinator.fast_client import FastClient
from coordinator.fast_lane import FastLane
from coordinator.node_health import MIN_SAMPLES
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from coordinator.row_fanout import RowFanout
from shoal import errors, ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.rows import Rows
from shoal.transport import Transport
from support.chaos_proxy import ChaosProxy, Weather, steady
from support.cluster import Cluster, freeze, kill, thaw

pytestmark = pytest.mark.processes
FAR_S = 0.08  # longer than anything runs ahead
NUM_ASKED = 150  # by each thread


@pytest.fixture(scope="module")
def nodes(path: Path) -> Iterator[list[str]]:
    with Cluster(Transport.FAST) as cluster:
        yield [node.endpoint for node in cluster.nodes(path)]


def asked(artifact: Artifact, number: int) -> tuple[Rows, RoutingPlan]:
    rng = np.random.default_rng(number)
    x = rng.standard_normal((1, artifact.spec.model_dim), np.float32)
    experts = rng.permutation(16)[None, :4].astype(np.int32)
    return ops.quantise_rows(artifact.scheme(1), x), RoutingPlan(
        experts, np.full((1, 4), 0.25, np.float32)
    )


@pytest.fixture(scope="module")
def wanted(artifact: Artifact) -> list[bytes]:
    with closing(open_remote_dispatch(artifact, "0-15=local")) as dispatch:
        return [dispatch.start(1, *asked(artifact, n)).wait().tobytes() for n in range(8)]


class Asker:
    """Asks for rows in turn, all of whose fan-outs may run ahead once the nodes are known."""

    def __init__(self, dispatch: RemoteDispatch, artifact: Artifact, wanted: list[bytes]) -> None:
        self.dispatch, self._artifact, self._wanted = dispatch, artifact, wanted
        self.num_ahead = 0

    def start(self, number: int) -> PendingSums:
        return self.dispatch.start(1, *asked(self._artifact, number % 8))

    @property
    def row(self) -> RowFanout | None:
        """What runs ahead now."""
        client = self.dispatch._client
        assert isinstance(client, FastClient)
        return client._row

    @property
    def lanes(self) -> list[FastLane]:
        client = self.dispatch._client
        assert isinstance(client, FastClient)
        return list(client._lanes.values())

    def ask(self, number: int) -> None:
        pending = self.start(number)
        self.num_ahead += self.row is not None
        assert pending.wait().tobytes() == self._wanted[number % 8]

    def until_ahead(self) -> PendingSums:
        """Return a fan-out that runs ahead, of row 0."""
        for number in range(40 * MIN_SAMPLES):
            pending = self.start(0)
            if self.row is not None:
                return pending
            assert pending.wait().tobytes() == self._wanted[0], number
        raise AssertionError("nothing ever ran ahead")


def opened(artifact: Artifact, shards: str) -> RemoteDispatch:
    return open_remote_dispatch(artifact, shards, transport=Transport.FAST)


def test_rows_run_ahead_once_their_nodes_are_known(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    shards = f"0-7={nodes[0]},8-15={nodes[1]}"
    with closing(opened(artifact, shards)) as dispatch:
        asker = Asker(dispatch, artifact, wanted)
        for number in range(MIN_SAMPLES):
            asker.ask(number)
        for number in range(200):
            asker.ask(number)
        assert asker.num_ahead > 100  # a busy machine interrupts some
        assert dispatch.stats.summary().num_fanouts == 200 + MIN_SAMPLES
        health = dispatch.health(nodes[0])
        assert health is not None and health.num_replies > MIN_SAMPLES
        for lane in asker.lanes:
            lane._connection.check_integrity()


def test_a_second_fan_out_adopts_the_first(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    shards = f"0-7={nodes[0]},8-15={nodes[1]}"
    with closing(opened(artifact, shards)) as dispatch:
        asker = Asker(dispatch, artifact, wanted)
        first = asker.until_ahead()
        second = asker.start(1)
        assert asker.row is None
        assert second.wait().tobytes() == wanted[1]
        assert first.wait().tobytes() == wanted[0]
        asker.until_ahead().abandon()
        assert asker.row is None
        asker.ask(2)
        from_others: list[bytes] = []
        mine = asker.until_ahead()
        thread = threading.Thread(
            target=lambda: from_others.append(asker.start(3).wait().tobytes())
        )
        thread.start()
        assert mine.wait().tobytes() == wanted[0]
        thread.join()
        assert from_others == [wanted[3]]


def test_rows_of_many_threads_run_ahead_of_each_other_and_are_right(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    """Whose row runs ahead leads; others that start meanwhile take the lead, one at a time."""
    right: list[bool] = []
    with closing(opened(artifact, f"0-7={nodes[0]},8-15={nodes[1]}")) as dispatch:
        asker = Asker(dispatch, artifact, wanted)
        asker.until_ahead().wait()

        def work(first: int) -> None:
            for number in range(first, first + NUM_ASKED):
                right.append(asker.start(number).wait().tobytes() == wanted[number % 8])

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * (4 * NUM_ASKED)


def test_a_far_node_s_row_is_adopted_and_answered(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    with (
        ChaosProxy(nodes[0]) as proxy,
        closing(opened(artifact, f"0-15={proxy.endpoint}")) as dispatch,
    ):
        asker = Asker(dispatch, artifact, wanted)
        asker.until_ahead().wait()
        proxy.forecast = steady(Weather(delay_s=FAR_S / 2))
        pending = asker.until_ahead()
        row = asker.row
        assert row is not None and pending.wait().tobytes() == wanted[0]
        assert row.adopted is not None and row.adopted.retries == []


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_node_that_is_lost_with_a_row_is_replaced(
    path: Path, artifact: Artifact, wanted: list[bytes], how: str
) -> None:
    with Cluster(Transport.FAST) as cluster:
        a, b = cluster.nodes(path)
        with closing(opened(artifact, f"0-15={a.endpoint}|{b.endpoint}")) as dispatch:
            asker = Asker(dispatch, artifact, wanted)
            asker.until_ahead().wait()
            (kill if how == "kill" else freeze)(a)
            try:
                for number in range(8):
                    asker.ask(number)
            finally:
                if how == "freeze":
                    thaw(a)


def test_a_row_whose_only_node_dies_ends_with_its_name(path: Path, artifact: Artifact) -> None:
    with Cluster(Transport.FAST) as cluster:
        node = cluster.node(path)
        with closing(
            open_remote_dispatch(
                artifact, f"0-15={node.endpoint}", shard_wait_s=0.0, transport=Transport.FAST
            )
        ) as dispatch:
            sums = dispatch.start(1, *asked(artifact, 0)).wait().tobytes()
            asker = Asker(dispatch, artifact, [sums] * 8)
            asker.until_ahead().wait()
            kill(node)
            with pytest.raises(errors.NodeError, match=node.endpoint.removeprefix("grpc://")):
                asker.start(0).wait()


def test_a_signal_in_the_middle_loses_nothing(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    """Ctrl-C while rows are collected: the fan-out is taken back, and the next ones are right."""

    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    with (
        ChaosProxy(nodes[0]) as proxy,
        closing(opened(artifact, f"0-7={proxy.endpoint},8-15={nodes[1]}")) as dispatch,
    ):
        asker = Asker(dispatch, artifact, wanted)
        asker.until_ahead().wait()
        proxy.forecast = steady(Weather(delay_s=0.1))  # beyond what a busy machine holds us up
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for number in range(4):
                pending = asker.until_ahead()
                signal.setitimer(signal.ITIMER_REAL, 0.002)
                with pytest.raises(Interrupted):
                    pending.wait()
                asker.ask(number)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
