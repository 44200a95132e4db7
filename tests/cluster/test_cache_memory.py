"""The memory of a node with --cache, as the system counts it: what is allowed, and no more."""

from contextlib import closing
from pathlib import Path

import pytest

from client.node_process import NodeProcess
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal.artifact import Artifact
from shoal.limits import MIB
from shoal.router import RoutingPlan
from support.cluster import Cluster
from support.expert_node import connection, reload
from support.held_reader import until
from support.streaming import call_of, expert_bytes
from support.tiny_model import make_tiny_artifact

pytestmark = pytest.mark.processes
# The huge pages at both ends of what is given back, and what Python and malloc keep of calls.
BESIDE = 4 * MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """38 MB of experts: enough to be seen beside a process."""
    folder = tmp_path_factory.mktemp("model")
    return Artifact.open(make_tiny_artifact(folder, hidden_size=256, moe_intermediate_size=256))


def anonymous_bytes(node: NodeProcess) -> int:
    """Memory that is the process's alone, in RAM: not its files, not the page cache."""
    status = Path(f"/proc/{node.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def call_all(dispatch: RemoteDispatch, artifact: Artifact) -> None:
    """Ask for every expert of every layer."""
    for layer, experts in artifact.owned_experts.items():
        call = call_of(artifact, layer, list(experts))
        plan = RoutingPlan(call.experts[None], call.weights[None])
        dispatch.start(layer, call.rows, plan).wait()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_a_node_takes_its_cache_and_gives_back_what_a_reload_takes_away(
    model: Artifact, cluster: Cluster, tmp_path: Path
) -> None:
    """1. A cache of two experts: what the process needs beside. 2. A reload gives it half of all,
    which it fills and does not exceed. 3. Another takes half of that back: so does the system.
    """
    one = expert_bytes(model)
    total = sum(map(len, model.owned_experts.values())) * one
    assert total >= 30 * MIB, "too little to be told from noise"
    config = tmp_path / "node.toml"

    def allow(num_bytes: int) -> None:
        config.write_text(f'cache = "{num_bytes}"\n')

    allow(2 * one)
    node = cluster.node(model.path, is_warm=False, extra=("--config", str(config)))
    with closing(open_remote_dispatch(model, f"0-15={node.endpoint}")) as dispatch:
        call_all(dispatch, model)
        beside = anonymous_bytes(node) - 2 * one
        for budget in (total // 2, total // 4):
            allow(budget)
            with connection(node.endpoint.removeprefix("grpc://")) as channel:
                assert reload(channel).error == ""
            call_all(dispatch, model)
            most = beside + budget + BESIDE
            until(lambda: anonymous_bytes(node) <= most)  # noqa: B023  it is over within the turn
            call_all(dispatch, model)
            found = anonymous_bytes(node) - beside
            assert budget - BESIDE <= found <= budget + BESIDE
