"""Fan-outs of one row that run ahead of the dispatch core, to real nodes: right, whatever comes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from coordinator.call_maker import CallMaker
from coordinator.calls_in_flight import Asked
from coordinator.expert_dispatch import PendingSums
from coordinator.fast_client import FastClient
from coordinator.fast_lane import FastLane
from coordinator.node_health import MIN_SAMPLES
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from coordinator.route import Route
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
        client = dispatch._client
        assert isinstance(client, FastClient)
        self.client = client
        self.num_ahead = 0
        self.last: RowFanout | None = None  # that ran ahead, at first at least
        self._run_row = client.run_row
        client.run_row = self._noting  # type: ignore[method-assign]

    def _noting(
        self, asked: Asked, plan: RoutingPlan, route: Route, maker: CallMaker
    ) -> RowFanout | None:
        self.last = self._run_row(asked, plan, route, maker)
        self.num_ahead += self.last is not None and self.last.adopted is None
        return self.last

    @property
    def lanes(self) -> list[FastLane]:
        return list(self.client._lanes.values())

    def start(self, number: int) -> PendingSums:
        """Begin a fan-out of the long way."""
        return self.dispatch.start(1, *asked(self._artifact, number % 8))

    def ask(self, number: int) -> None:
        sums = self.dispatch.sums(1, *asked(self._artifact, number % 8))
        assert sums.tobytes() == self._wanted[number % 8]

    def until_ahead(self) -> None:
        """Ask for row 0 until it runs ahead."""
        self.num_ahead = 0
        for _ in range(40 * MIN_SAMPLES):
            self.ask(0)
            if self.num_ahead:
                return
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


def test_a_fan_out_of_another_thread_adopts_the_row_that_runs_ahead(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    with (
        ChaosProxy(nodes[0]) as proxy,
        closing(opened(artifact, f"0-7={proxy.endpoint},8-15={nodes[1]}")) as dispatch,
    ):
        asker = Asker(dispatch, artifact, wanted)
        asker.until_ahead()
        proxy.forecast = steady(Weather(delay_s=0.02))  # soon enough to run ahead till the end
        thread = threading.Thread(target=asker.ask, args=(0,))
        thread.start()
        while asker.client._lent is None:
            pass
        assert asker.start(3).wait().tobytes() == wanted[3]
        thread.join()
        assert asker.last is not None and asker.last.adopted is not None


def test_rows_of_many_threads_run_ahead_of_each_other_and_are_right(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    """Whose row runs ahead leads; others that start meanwhile take the lead, one at a time."""
    right: list[bool] = []
    with closing(opened(artifact, f"0-7={nodes[0]},8-15={nodes[1]}")) as dispatch:
        asker = Asker(dispatch, artifact, wanted)
        asker.until_ahead()

        def work(first: int) -> None:
            for number in range(first, first + NUM_ASKED):
                if (number + first) % 3:
                    sums = dispatch.sums(1, *asked(artifact, number % 8))
                else:
                    sums = asker.start(number).wait()
                right.append(sums.tobytes() == wanted[number % 8])

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asker.until_ahead()
        for lane in asker.lanes:
            lane._connection.check_integrity()
    assert right == [True] * (4 * NUM_ASKED)


def test_hints_between_rows_and_beside_them_disturb_nothing(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    """They are written to the same sockets, by another thread."""
    with closing(opened(artifact, f"0-7={nodes[0]},8-15={nodes[1]}")) as dispatch:
        asker = Asker(dispatch, artifact, wanted)
        asker.until_ahead()
        asker.client._keeper.wants_hints.update(range(2))
        is_over = threading.Event()

        def hint() -> None:
            number = 0
            while not is_over.is_set():
                dispatch.hint(1, asked(artifact, number)[1])
                dispatch._hinted.forget(1)
                number += 1

        thread = threading.Thread(target=hint)
        thread.start()
        try:
            for number in range(NUM_ASKED):
                asker.ask(number)
        finally:
            is_over.set()
            thread.join()
        asker.until_ahead()
        for lane in asker.lanes:
            lane._connection.check_integrity()


def test_a_far_node_s_row_is_adopted_and_answered(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    with (
        ChaosProxy(nodes[0]) as proxy,
        closing(opened(artifact, f"0-15={proxy.endpoint}")) as dispatch,
    ):
        asker = Asker(dispatch, artifact, wanted)
        asker.until_ahead()
        proxy.forecast = steady(Weather(delay_s=FAR_S / 2))
        asker.ask(0)
        row = asker.last
        assert row is not None and row.adopted is not None and row.adopted.retries == []


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_node_that_is_lost_with_a_row_is_replaced(
    path: Path, artifact: Artifact, wanted: list[bytes], how: str
) -> None:
    with Cluster(Transport.FAST) as cluster:
        a, b = cluster.nodes(path)
        with closing(opened(artifact, f"0-15={a.endpoint}|{b.endpoint}")) as dispatch:
            asker = Asker(dispatch, artifact, wanted)
            asker.until_ahead()
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
            asker.until_ahead()
            kill(node)
            with pytest.raises(errors.NodeError, match=node.endpoint.removeprefix("grpc://")):
                asker.ask(0)


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
        asker.until_ahead()
        proxy.forecast = steady(Weather(delay_s=0.1))  # beyond what a busy machine holds us up
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for number in range(4):
                signal.setitimer(signal.ITIMER_REAL, 0.01 * (number + 1))  # sent, not answered
                with pytest.raises(Interrupted):
                    asker.ask(number)
                asker.ask(number)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
