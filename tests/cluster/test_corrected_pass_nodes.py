"""The corrected pass over real nodes: one round trip, retries and errors as any pass has them."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.cancellation import Cancellation
from coordinator.remote_dispatch import open_remote_dispatch
from shoal import errors
from shoal.artifact import Artifact
from shoal.artifact.shadow_build import make_shadow
from shoal.quant import Format
from support.cluster import Cluster, freeze, kill, thaw
from support.corrected import MORE, Passes

pytestmark = pytest.mark.processes


class Placed(Cancellation):
    """Does things where a corrected pass begins, and where all of its layers have asked."""

    def __init__(
        self, artifact: Artifact, before: Callable[[], None], asked: Callable[[], None]
    ) -> None:
        super().__init__()
        self._at = {0: before, artifact.spec.num_layers: asked}
        self._num_checks = 0  # one before each layer

    def check(self) -> None:
        self._at.get(self._num_checks, lambda: None)()
        self._num_checks += 1


@pytest.fixture(scope="module")
def shadow(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shadow") / "q4.shoal"
    make_shadow(Artifact.open(path), Format.Q4_0, place, lambda _num_bytes: None, force=False)
    return place


@pytest.fixture(scope="module")
def expected(path: Path, shadow: Path) -> bytes:
    return Passes(path, shadow).logits(1).tobytes()


def test_all_calls_leave_before_any_answer_comes(
    cluster: Cluster, path: Path, artifact: Artifact, shadow: Path, expected: bytes
) -> None:
    """1. Both nodes stop. 2. The stand-in's pass runs to its end, every layer has asked. 3. They
    go on: one sweep takes all the answers. A second round trip would have waited for ever.
    """
    a, b = cluster.nodes(path)
    shards = f"0-7={a.endpoint},8-15={b.endpoint}"
    with closing(open_remote_dispatch(artifact, shards)) as dispatch:
        passes = Passes(path, shadow, dispatch)

        def stop() -> None:
            dispatch.stats.reset()
            freeze(a)
            freeze(b)

        def go_on() -> None:
            assert dispatch.stats.summary().num_fanouts == 0, "somebody was waited for"
            thaw(a)
            thaw(b)

        assert passes.logits(1, Placed(artifact, stop, go_on)).tobytes() == expected
        assert dispatch.stats.summary().num_fanouts == artifact.spec.num_layers
        assert passes.experts.num_round_trips == 1


def test_a_node_killed_between_question_and_answer_is_replaced_by_its_replica(
    cluster: Cluster, path: Path, artifact: Artifact, shadow: Path, expected: bytes
) -> None:
    a, b = cluster.nodes(path)
    shards = f"0-15={a.endpoint}|{b.endpoint}"
    with closing(open_remote_dispatch(artifact, shards)) as dispatch:
        killed = Placed(artifact, lambda: freeze(a), lambda: kill(a))
        assert Passes(path, shadow, dispatch).logits(1, killed).tobytes() == expected


def test_without_a_replica_the_pass_fails_and_is_never_zeros(
    cluster: Cluster, path: Path, artifact: Artifact, shadow: Path
) -> None:
    a, b = cluster.nodes(path)
    shards = f"0-7={a.endpoint},8-15={b.endpoint}"
    with closing(open_remote_dispatch(artifact, shards, shard_wait_s=0)) as dispatch:
        killed = Placed(artifact, lambda: freeze(b), lambda: kill(b))
        with pytest.raises(errors.ShardUnavailable, match="8-15"):
            Passes(path, shadow, dispatch).logits(1, killed)


@pytest.fixture
def run(
    cluster: Cluster, path: Path
) -> Iterator[Callable[..., "subprocess.CompletedProcess[str]"]]:
    a, b = cluster.nodes(path)
    shards = f"0-7={a.endpoint},8-15={b.endpoint}"

    def run_(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-P", "-m", "client", "run", str(path), "--moe-shards", shards]
        command += ["--prompt-ids", ",".join(map(str, MORE)), "--max-tokens", "6", "--ignore-eos"]
        return subprocess.run(
            [*command, "--json", *arguments], capture_output=True, text=True, timeout=120
        )

    yield run_


def test_a_run_in_batch_mode_says_that_it_is_not_exact(
    run: Callable[..., "subprocess.CompletedProcess[str]"], shadow: Path
) -> None:
    done = run("--moe-dispatch", "batch", "--moe-iters", "2", "--shadow", str(shadow))
    assert done.returncode == 0, done.stderr
    assert "NOT EXACT" in done.stderr and "2 round trips a token instead of 3" in done.stderr
    report = json.loads(done.stdout)
    moe = report["moe_dispatch"]
    assert (moe["mode"], moe["is_exact"], moe["iters"]) == ("batch", False, 2)
    assert moe["shadow_expert_bytes"] > 0 and moe["link_rtt_ms"] > 0
    assert report["speculation"]["round_trips_per_token"] == 2
    exact = json.loads(run("--shadow", str(shadow)).stdout)
    assert exact["moe_dispatch"]["is_exact"] and exact["moe_dispatch"]["mode"] == "stream"
