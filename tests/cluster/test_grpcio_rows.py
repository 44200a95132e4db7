"""Fan-outs of one row that run ahead of the dispatch core over grpcio: right, whatever comes."""

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from coordinator.loop_rows import LoopRows
from coordinator.node_client import NodeClient
from coordinator.node_health import MIN_SAMPLES
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import errors, ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.rows import Rows
from shoal.transport import Transport
from support.chaos_proxy import ChaosProxy, Weather, steady
from support.cluster import Cluster, freeze, kill, thaw

pytestmark = pytest.mark.processes
FAR_S = 0.08  # longer than anything runs ahead
NUM_ASKED = 60  # by each thread


@pytest.fixture(scope="module")
def nodes(path: Path) -> Iterator[list[str]]:
    with Cluster(Transport.GRPCIO) as cluster:
        yield [node.endpoint for node in cluster.nodes(path)]


def asked(artifact: Artifact, number: int) -> tuple[int, Rows, RoutingPlan]:
    rng = np.random.default_rng(number)
    x = rng.standard_normal((1, artifact.spec.model_dim), np.float32)
    experts = rng.permutation(16)[None, :4].astype(np.int32)
    plan = RoutingPlan(experts, np.full((1, 4), 0.25, np.float32))
    return 1, ops.quantise_rows(artifact.scheme(1), x), plan


@pytest.fixture(scope="module")
def wanted(artifact: Artifact) -> list[bytes]:
    with closing(open_remote_dispatch(artifact, "0-15=local")) as dispatch:
        return [dispatch.start(*asked(artifact, n)).wait().tobytes() for n in range(8)]


class Asker:
    """Asks for rows in turn, and counts what ran ahead and what of that was adopted."""

    def __init__(
        self, dispatch: RemoteDispatch, artifact: Artifact, wanted: list[bytes] | None = None
    ) -> None:
        self.dispatch, self._artifact, self._wanted = dispatch, artifact, wanted
        client = dispatch._client
        assert isinstance(client, NodeClient)
        self.rows: LoopRows = client._rows
        self.num_ahead = self.num_adopted = 0
        begin, adopt = self.rows._begin, client._in_flight.adopt

        def counting_begin(*given: object) -> bool:
            is_ahead = begin(*given)  # type: ignore[arg-type]
            self.num_ahead += is_ahead
            return is_ahead

        def counting_adopt(*given: object) -> None:
            self.num_adopted += 1
            adopt(*given)  # type: ignore[arg-type]

        self.rows._begin = counting_begin  # type: ignore[method-assign, assignment]
        client._in_flight.adopt = counting_adopt  # type: ignore[method-assign, assignment]

    def ask(self, number: int) -> None:
        sums = self.dispatch.sums(*asked(self._artifact, number % 8)).tobytes()
        assert self._wanted is None or sums == self._wanted[number % 8]

    def until_ahead(self) -> None:
        """Ask until it runs ahead."""
        for number in range(40 * MIN_SAMPLES):
            if self.num_ahead:
                return
            self.ask(number)
        raise AssertionError("nothing ever ran ahead")


def opened(artifact: Artifact, shards: str) -> RemoteDispatch:
    return open_remote_dispatch(artifact, shards, shard_wait_s=0.0, transport=Transport.GRPCIO)


def test_rows_run_ahead_once_their_nodes_are_known(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    with closing(opened(artifact, f"0-7={nodes[0]},8-15={nodes[1]}")) as dispatch:
        asker = Asker(dispatch, artifact, wanted)
        for number in range(100 + MIN_SAMPLES):
            asker.ask(number)
        assert asker.num_ahead > 50  # a busy machine interrupts some
        summary = dispatch.stats.summary()
        assert summary.num_fanouts == 100 + MIN_SAMPLES
        assert summary.bytes_up > 0 < summary.bytes_down


def test_rows_of_many_threads_are_right(
    nodes: list[str], artifact: Artifact, wanted: list[bytes]
) -> None:
    """One row runs ahead at a time: another that starts has it adopted."""
    right: list[int] = []
    with closing(opened(artifact, f"0-7={nodes[0]},8-15={nodes[1]}")) as dispatch:
        asker = Asker(dispatch, artifact, wanted)
        asker.until_ahead()

        def work(first: int) -> None:
            for number in range(first, first + NUM_ASKED):
                asker.ask(number)
                right.append(number)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(right) == 4 * NUM_ASKED
        assert asker.num_adopted > 0


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
        adopted = asker.num_adopted
        asker.ask(0)
        assert asker.num_adopted == adopted + 1


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_node_that_is_lost_with_a_row_is_replaced(
    path: Path, artifact: Artifact, wanted: list[bytes], how: str
) -> None:
    with Cluster(Transport.GRPCIO) as cluster:
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
    with Cluster(Transport.GRPCIO) as cluster:
        node = cluster.node(path)
        with closing(opened(artifact, f"0-15={node.endpoint}")) as dispatch:
            asker = Asker(dispatch, artifact)
            asker.until_ahead()
            kill(node)
            with pytest.raises(errors.NodeError, match=node.endpoint.removeprefix("grpc://")):
                asker.ask(0)


def test_closing_ends_a_row_that_runs_ahead(nodes: list[str], artifact: Artifact) -> None:
    with ChaosProxy(nodes[0]) as proxy:
        dispatch = opened(artifact, f"0-15={proxy.endpoint}")
        asker = Asker(dispatch, artifact)
        asker.until_ahead()
        proxy.forecast = steady(Weather(delay_s=0.4))
        ended: list[errors.ShoalError] = []

        def wait() -> None:
            try:
                asker.ask(0)
            except errors.ShoalError as error:
                ended.append(error)

        thread = threading.Thread(target=wait)
        ahead = asker.num_ahead
        thread.start()
        while asker.num_ahead == ahead:
            pass
        dispatch.close()
        thread.join()
        assert isinstance(ended[0], errors.NodeUnreachable)
