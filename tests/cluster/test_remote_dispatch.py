"""Real nodes against the same experts in this process: the sums are equal bit for bit."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.expert_dispatch import BULK_ROWS_PER_CALL, ExpertDispatch, LocalDispatch
from coordinator.remote_dispatch import open_remote_dispatch
from shoal import ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.rows import Rows
from support.cluster import Cluster, Flags
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor

pytestmark = pytest.mark.processes

NUM_EXPERTS = 16
NUM_LAYERS = 2
Call = tuple[int, Rows, RoutingPlan]


@pytest.fixture(scope="module", params=["f32", "q8_0", "q4_k"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    size = 256 if request.param == "q4_k" else 96
    return make_tiny_artifact(
        folder,
        "qwen3_moe",
        request.param,
        hidden_size=size,
        moe_intermediate_size=size,
        num_hidden_layers=NUM_LAYERS,
    )


@pytest.fixture(scope="module")
def artifact(path: Path) -> Artifact:
    return Artifact.open(path)


def make_call(artifact: Artifact, layer: int, num_rows: int, seed: int) -> Call:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, artifact.spec.model_dim)).astype(np.float32)
    assert np.unique(x).size > x.size // 2, "inputs are degenerate"
    experts = np.argsort(rng.random((num_rows, NUM_EXPERTS)), axis=1)[:, :4].astype(np.int32)
    weights = rng.random((num_rows, 4)).astype(np.float32)
    return layer, ops.quantise_rows(artifact.scheme(layer), x), RoutingPlan(experts, weights)


def sums_of(dispatch: ExpertDispatch, calls: list[Call]) -> list[NDArray[np.int64]]:
    return [dispatch.start(*call).wait() for call in calls]


@pytest.fixture(scope="module")
def calls(artifact: Artifact) -> list[Call]:
    """Decode rows, a few rows, and a prefill chunk that needs several bulk messages."""
    sizes = [1, 1, 2, 17, 2 * BULK_ROWS_PER_CALL]
    return [make_call(artifact, n % NUM_LAYERS, size, seed=n) for n, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def expected(artifact: Artifact, calls: list[Call]) -> list[NDArray[np.int64]]:
    with closing(LocalDispatch(whole_executor(artifact))) as dispatch:
        sums = sums_of(dispatch, calls)
    assert all(np.unique(each).size > 16 for each in sums), "outputs are degenerate"
    return sums


@pytest.fixture(scope="module")
def nodes(path: Path) -> Iterator[list[str]]:
    """Endpoints of three nodes that differ in ISA, threads, sockets and what they own."""
    with Cluster() as cluster:
        unlike: list[Flags] = [
            {"isa": "scalar"},
            {"experts": "3-15", "is_unix": True, "threads": 2},
            {"experts": "0-4+9-15", "layers": "0-1", "isa": "avx2"},
        ]
        yield [node.endpoint for node in cluster.nodes(path, unlike)]


def assert_equal(
    artifact: Artifact, shards: str, calls: list[Call], expected: list[NDArray[np.int64]]
) -> None:
    with closing(open_remote_dispatch(artifact, shards)) as dispatch:
        for got, wanted in zip(sums_of(dispatch, calls), expected, strict=True):
            assert got.tobytes() == wanted.tobytes()


def test_one_two_and_three_nodes_of_uneven_ranges_give_the_local_sums(
    nodes: list[str], artifact: Artifact, calls: list[Call], expected: list[NDArray[np.int64]]
) -> None:
    a, b, c = nodes
    for shards in (
        f"0-15={a}",
        f"0-2={a},3-15={b}",
        f"0-2+15={a},3-11={b},12-14={c}",
        f"0-4@0={c},5-15@0={b},0-15@1={a}",
        f"0-2={a},3-8={b},9-15=local",
        f"0-7@0=local,8-15@0={a},0-15@1=local",
        "0-15=local",
    ):
        assert_equal(artifact, shards, calls, expected)


def test_several_layers_may_be_in_flight_at_once(
    nodes: list[str], artifact: Artifact, calls: list[Call], expected: list[NDArray[np.int64]]
) -> None:
    with closing(open_remote_dispatch(artifact, f"0-6={nodes[0]},7-15={nodes[1]}")) as dispatch:
        pending = [dispatch.start(*call) for call in calls * 4]
        for sums, wanted in reversed(list(zip(pending, expected * 4, strict=True))):
            assert sums.wait().tobytes() == wanted.tobytes()
        summary = dispatch.stats.summary()
    assert summary.num_fanouts == 4 * len(calls)
    assert summary.bytes_up > 4 * sum(rows.values.nbytes for _, rows, _ in calls)
    assert summary.bytes_down > 0 and summary.latency_p99_s >= summary.latency_p50_s > 0


def test_a_map_file_serves_as_the_map(
    nodes: list[str],
    artifact: Artifact,
    calls: list[Call],
    expected: list[NDArray[np.int64]],
    tmp_path: Path,
) -> None:
    shards = tmp_path / "map.toml"
    shards.write_text(
        f'[[shard]]\nexperts = "0-7"\nendpoints = ["local"]\n'
        f'[[shard]]\nexperts = "8-15"\nendpoints = ["{nodes[1]}"]\n'
    )
    assert_equal(artifact, f"@{shards}", calls, expected)
