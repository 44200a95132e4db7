"""Drives that answer no more, or not for one expert: the node starts, serves, and leaves."""

import signal
from contextlib import closing
from pathlib import Path
from urllib.request import urlopen

import pytest

from coordinator.remote_dispatch import open_remote_dispatch
from shoal.artifact import Artifact
from shoal.experts.options import Backend
from shoal.router import RoutingPlan
from support.cluster import Cluster
from support.fuse_files import fuse_files
from support.held_reader import until
from support.readers import ring_problem
from support.streaming import call_of, expert_bytes

pytestmark = pytest.mark.processes
LAYER = 1
BROKEN = 5


@pytest.mark.parametrize("backend", [Backend.IO_URING, Backend.PREAD])
def test_a_node_leaves_without_a_read_that_never_ends(
    backend: Backend, path: Path, artifact: Artifact, cluster: Cluster, tmp_path: Path
) -> None:
    """1. A read is held; its call waits. 2. SIGTERM. 3. The node says what it leaves behind, and is
    gone: with io_uring at once; a thread's read keeps a process until its drive answers, whatever
    the process does.
    """
    if backend is Backend.IO_URING and (problem := ring_problem()):
        pytest.skip(problem)
    where = artifact.expert_location(LAYER, BROKEN)
    with fuse_files(path, tmp_path / "mount") as files:
        flags = ("--cache", str(4 * expert_bytes(artifact)), "--io", backend)
        node = cluster.node(files.path, is_warm=False, extra=(*flags, "--drain-timeout", "0.2"))
        with closing(open_remote_dispatch(artifact, f"0-15={node.endpoint}")) as dispatch:
            files.hold(str(where.path.relative_to(path)), offset=where.offset)
            call = call_of(artifact, LAYER, [BROKEN])
            plan = RoutingPlan(call.experts[None], call.weights[None])
            dispatch.start(LAYER, call.rows, plan)
            files.wait_held(1)
            node.send(signal.SIGTERM)
            until(lambda: "stopped" in node.log_path.read_text())
            if backend is Backend.PREAD:
                files.release()
            node.wait()
    assert node.exit_status == 0
    assert "leaving without reads" in node.log_path.read_text()


def test_one_expert_that_cannot_be_read_does_not_keep_a_node_from_its_warm_up(
    path: Path, artifact: Artifact, cluster: Cluster, tmp_path: Path
) -> None:
    """1. One expert's bytes give EIO. 2. The node warms up, says which it lacks, and serves the
    others. 3. The drive recovers; a call for the expert is answered.
    """
    where = artifact.expert_location(LAYER, BROKEN)
    with fuse_files(path, tmp_path / "mount") as files:
        name = str(where.path.relative_to(path))
        files.fail(name, offset=where.offset, num_bytes=where.num_bytes)
        node = cluster.node(files.path, extra=("--metrics-listen", "127.0.0.1:0"))
        log = node.log_path.read_text()
        assert f"expert {BROKEN} of layer {LAYER} cannot be read" in log
        assert "shoal_cache_unavailable 1.0" in metrics(node.ready["metrics"])
        assert f"shoal_cache_experts {sum_of_experts(artifact) - 1}.0" in metrics(
            node.ready["metrics"]
        )
        files.clear()
        with closing(open_remote_dispatch(artifact, f"0-15={node.endpoint}")) as dispatch:
            call = call_of(artifact, LAYER, [BROKEN, 7])
            plan = RoutingPlan(call.experts[None], call.weights[None])
            dispatch.start(LAYER, call.rows, plan).wait()
        assert "shoal_cache_unavailable 0.0" in metrics(node.ready["metrics"])


def metrics(url: str) -> str:
    with urlopen(url, timeout=30) as response:
        text: str = response.read().decode()
    return text


def sum_of_experts(artifact: Artifact) -> int:
    return sum(map(len, artifact.owned_experts.values()))
