"""Real nodes and commands whose experts do not fit in memory: the same bits, faults by name."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import sleep
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from client.node_process import NodeProcess
from coordinator.expert_dispatch import PendingSums
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import errors
from shoal.artifact import Artifact
from shoal.experts.executor import ExpertExecutor
from shoal.experts.options import Backend
from shoal.router import RoutingPlan
from shoal.transport import Transport
from support.cluster import Cluster
from support.command import assert_refused, shoal
from support.fuse_files import FuseFiles, fuse_files, small_tmpfs
from support.streaming import call_of, expert_bytes, streaming_store
from support.sysfs import FakeDrive

pytestmark = pytest.mark.processes
LAYER = 1
PROMPT = ",".join(map(str, range(3, 27)))
EXPERTS = [2, 5, 11]
BROKEN = 5
MANY_PASSES = 400  # a dozen will do, but where the machine is busy many hints come too late

Sums = Callable[[list[int]], bytes]


@pytest.fixture(scope="module")
def expected(artifact: Artifact) -> Iterator[Sums]:
    """What a row that goes to those experts gives when everything is in memory."""
    with streaming_store(artifact.path, None) as store:
        executor = ExpertExecutor(artifact, store)
        yield lambda experts: executor.compute(call_of(artifact, LAYER, experts)).tobytes()


@pytest.fixture
def files(path: Path, tmp_path: Path) -> Iterator[FuseFiles]:
    with fuse_files(path, tmp_path / "mount") as files:
        yield files


def start(dispatch: RemoteDispatch, artifact: Artifact, experts: list[int]) -> PendingSums:
    """Send the call of `support.streaming.call_of`."""
    call = call_of(artifact, LAYER, experts)
    plan = RoutingPlan(call.experts[None], call.weights[None])
    return dispatch.start(LAYER, call.rows, plan)


def sums(dispatch: RemoteDispatch, artifact: Artifact, experts: list[int]) -> bytes:
    return start(dispatch, artifact, experts).wait().tobytes()


def connect(artifact: Artifact, node: NodeProcess, call_timeout_s: float = 30.0) -> RemoteDispatch:
    return open_remote_dispatch(artifact, f"0-15={node.endpoint}", call_timeout_s)


def fail_for_ever(files: FuseFiles, artifact: Artifact, expert: int) -> None:
    where = artifact.expert_location(LAYER, expert)
    name = str(where.path.relative_to(artifact.path))
    files.fail(name, offset=where.offset, num_bytes=where.num_bytes)


def hold(files: FuseFiles, artifact: Artifact, expert: int) -> None:
    where = artifact.expert_location(LAYER, expert)
    name = str(where.path.relative_to(artifact.path))
    files.hold(name, offset=where.offset, num_bytes=where.num_bytes)


def cache(artifact: Artifact, slots: int) -> tuple[str, str]:
    return "--cache", str(slots * expert_bytes(artifact))


def metric(node: NodeProcess, name: str) -> float:
    """Return one sample of a node's metrics."""
    with urlopen(str(node.ready["metrics"]), timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return float(dict(line.rsplit(" ", 1) for line in lines if line[:1] != "#")[name])


def run_json(model: Path, *arguments: str) -> dict[str, Any]:
    """Run `shoal run MODEL --json`; return what must not depend on where experts are."""
    few = ("--prompt-ids", PROMPT, "--max-tokens", "8", "--ignore-eos", "--json")
    ended = shoal("run", model, *few, *arguments)
    assert ended.status == 0, ended
    report: dict[str, Any] = json.loads(ended.out)
    return {key: report[key] for key in ("token_ids", "logits_digest")}


def test_a_command_and_a_node_with_small_caches_say_the_same_bits(
    path: Path, artifact: Artifact, cluster: Cluster
) -> None:
    whole = run_json(path)
    assert run_json(path, *cache(artifact, 2)) == whole
    flags = (*cache(artifact, 5), "--verify", "always", "--io", Backend.PREAD)
    node = cluster.node(path, is_warm=False, extra=flags)
    assert run_json(path, "--moe-shards", f"0-15={node.endpoint}") == whole


def test_a_command_says_how_it_reads_what_does_not_fit(path: Path, artifact: Artifact) -> None:
    few = ("--prompt-ids", "1", "--max-tokens", "1", "--ignore-eos", "--json")
    small = shoal("run", path, *few, *cache(artifact, 2), "--io", Backend.BUFFERED)
    assert "experts that are not in memory are read by buffered" in small.err, small
    assert "not in memory" not in shoal("run", path, *few).err


@pytest.mark.parametrize("verb", ["run", "node"])
def test_a_cache_of_one_expert_is_refused_at_the_start(
    verb: str, path: Path, artifact: Artifact
) -> None:
    more = {"run": ("--prompt-ids", "1", "--json"), "node": ("--listen", "127.0.0.1:0")}[verb]
    ended = shoal(verb, path, *cache(artifact, 1), *more)
    assert_refused(ended, errors.UsageError.exit_code, "cache", "two")


def test_a_node_names_the_expert_that_its_disk_lost_and_lives(
    files: FuseFiles, artifact: Artifact, cluster: Cluster, expected: Sums
) -> None:
    """1. One expert's bytes give EIO. 2. Calls for it fail by name; others do not. 3. The disk
    recovers, and so does the call.
    """
    node = cluster.node(files.path, is_warm=False, extra=cache(artifact, 4))
    fail_for_ever(files, artifact, BROKEN)
    with closing(connect(artifact, node)) as dispatch:
        for _ in range(2):
            with pytest.raises(errors.ExpertUnavailable) as failed:
                sums(dispatch, artifact, EXPERTS)
            for word in (f"expert {BROKEN}", f"layer {LAYER}", node.endpoint):
                assert word in str(failed.value)
            assert sums(dispatch, artifact, [2, 11]) == expected([2, 11])
        files.clear()
        assert sums(dispatch, artifact, EXPERTS) == expected(EXPERTS)
    assert node.exit_status is None


def test_a_nodes_other_calls_are_answered_while_one_waits_for_the_disk(
    files: FuseFiles, artifact: Artifact, cluster: Cluster, expected: Sums
) -> None:
    """1. Two experts are in memory. 2. One coordinator's call waits for a held read. 3. Another's
    calls are answered. 4. The read goes on; the first gets its sums.
    """
    node = cluster.node(files.path, is_warm=False, extra=cache(artifact, 4))
    with closing(connect(artifact, node)) as one, closing(connect(artifact, node)) as other:
        assert sums(one, artifact, [1, 2]) == expected([1, 2])
        hold(files, artifact, BROKEN)
        pending = start(one, artifact, [BROKEN])
        files.wait_held(1)
        for experts in ([1, 2], [2], [1]):
            assert sums(other, artifact, experts) == expected(experts)
        files.release()
        assert pending.wait().tobytes() == expected([BROKEN])


def test_a_read_that_never_ends_costs_its_call_alone(
    files: FuseFiles, artifact: Artifact, cluster: Cluster, expected: Sums
) -> None:
    """1. A read is held. 2. Its call times out. 3. Others are served, from memory and from disk.
    4. The read goes on at last; its expert is served. 5. The node leaves in peace.
    """
    node = cluster.node(files.path, is_warm=False, extra=cache(artifact, 4))
    with closing(connect(artifact, node, call_timeout_s=1.0)) as dispatch:
        assert sums(dispatch, artifact, [1, 2]) == expected([1, 2])
        hold(files, artifact, BROKEN)
        pending = start(dispatch, artifact, [BROKEN])
        files.wait_held(1)
        with pytest.raises(errors.CallTimeout):
            pending.wait()
        assert sums(dispatch, artifact, [1, 2]) == expected([1, 2])
        assert sums(dispatch, artifact, [8]) == expected([8])
        files.release()
        assert sums(dispatch, artifact, [BROKEN]) == expected([BROKEN])
    node.send(signal.SIGTERM)
    node.wait()
    assert node.exit_status == 0


@pytest.mark.parametrize("transport", [Transport.FAST, Transport.GRPCIO])
def test_a_hint_begins_a_read_that_no_call_has_asked_for(
    files: FuseFiles, artifact: Artifact, expected: Sums, transport: Transport
) -> None:
    """1. A hint names an expert that is on the drive; its read begins. 2. Told again, it is told to
    nobody. 3. The call takes what was read. A node that holds everything is told nothing.
    """
    extra = (*cache(artifact, 8), "--prefetch", "markov")
    with Cluster(transport) as cluster:
        node, whole = cluster.nodes(
            files.path, [{"is_warm": False, "extra": extra}, {"extra": ("--prefetch", "off")}]
        )
        shards = f"0-7={node.endpoint},8-15={whole.endpoint}"
        with closing(open_remote_dispatch(artifact, shards, transport=transport)) as dispatch:
            assert sums(dispatch, artifact, [1, 2]) == expected([1, 2])
            hold(files, artifact, BROKEN)
            call = call_of(artifact, LAYER, [BROKEN, 11])
            plan = RoutingPlan(call.experts[None], call.weights[None])
            dispatch.hint(LAYER, plan)
            files.wait_held(1)
            assert dispatch._hinted.told(LAYER) == {BROKEN}, "and none for who reads nothing"
            dispatch.hint(LAYER, plan)
            pending = start(dispatch, artifact, [BROKEN, 11])
            assert not dispatch._hinted.told(LAYER)
            files.release()
            assert pending.wait().tobytes() == expected([BROKEN, 11])


def test_by_default_hints_are_tried_and_what_they_read_is_used(
    path: Path, artifact: Artifact, cluster: Cluster, expected: Sums
) -> None:
    """1. A node that reads ahead by its own judgement serves passes, each hinted at beforehand and
    each of other experts. 2. Its trial of hints comes to the windows in which they are followed:
    hints begin reads, calls use them, sums are right.
    """
    extra = (*cache(artifact, 12), "--metrics-listen", "127.0.0.1:0")
    node = cluster.node(path, is_warm=False, extra=extra)
    layers = sorted(artifact.owned_experts)

    def hinted_reads() -> float:
        return metric(node, "shoal_prefetch_hinted_reads_total")

    def used_reads() -> float:
        return metric(node, 'shoal_prefetch_reads_total{result="used"}')

    with closing(connect(artifact, node)) as dispatch:
        for turn in range(MANY_PASSES):
            chosen = [(4 * turn + place) % 16 for place in range(4)]
            calls = [call_of(artifact, layer, chosen) for layer in layers]
            plans = [RoutingPlan(call.experts[None], call.weights[None]) for call in calls]
            for layer, plan in zip(layers, plans, strict=True):
                dispatch.hint(layer, plan)
            for call, plan in zip(calls, plans, strict=True):
                sums = dispatch.start(call.layer, call.rows, plan).wait()
                if call.layer == LAYER:
                    assert sums.tobytes() == expected(chosen)
            if turn < 2:
                assert hinted_reads() == 0, "before a trial nothing is followed"
            elif hinted_reads() >= 8 and used_reads():
                break
    assert hinted_reads() >= 8 and used_reads() > 0
    assert metric(node, 'shoal_prefetch_governor{phase="hints",state="forced"}') == 0


def test_a_node_reads_a_hot_drive_gently_and_a_cool_one_at_full_depth(
    path: Path, artifact: Artifact, cluster: Cluster, expected: Sums, tmp_path: Path
) -> None:
    """1. The drive under the model has 85 C: the node says hot, reads one chunk at a time and none
    ahead, and still serves. 2. It cools: all as before. A reload looks at the sensors at once.
    """
    drive = FakeDrive(tmp_path / "sys", artifact.path / "experts", 40.0)
    extra = (*cache(artifact, 8), "--metrics-listen", "127.0.0.1:0", "--sysfs", str(drive.root))
    node = cluster.node(path, is_warm=False, extra=extra)

    def paced(celsius: float, state: str) -> tuple[float, float]:
        drive.set_celsius(celsius)
        node.send(signal.SIGHUP)
        while not metric(node, f'shoal_pacing_state{{state="{state}"}}'):
            assert node.exit_status is None
        depth = metric(node, "shoal_read_queue_depth")
        return depth, metric(node, "shoal_pacing_allows_prefetch")

    full, allows = paced(40.0, "full")
    assert full > 1 and allows == 1
    assert paced(85.0, "hot") == (1, 0)
    assert metric(node, 'shoal_drive_temperature_celsius{drive="nvme0n1"}') == 85
    with closing(connect(artifact, node)) as dispatch:
        assert sums(dispatch, artifact, EXPERTS) == expected(EXPERTS)
    assert paced(40.0, "full") == (full, 1)


def test_a_storm_of_reloads_under_load_fails_no_call(
    path: Path, artifact: Artifact, cluster: Cluster, expected: Sums, tmp_path: Path
) -> None:
    """1. A node serves. 2. Its file changes forty times, each followed by SIGHUP, with calls on
    their way: caches of 2 to 40 experts, all ways of checking, nonsense in between. 3. Every call
    has its sums. 4. Signals of a storm may become one reload; nonsense after it is told. 5. What
    the last file says is in force.
    """
    config = tmp_path / "node.toml"
    config.write_text("")
    extra = ("--config", str(config), "--metrics-listen", "127.0.0.1:0")
    node = cluster.node(path, is_warm=False, extra=extra)
    rng = np.random.default_rng(0)
    with closing(connect(artifact, node)) as dispatch:
        for turn in range(40):
            chosen = sorted(rng.choice(16, 3, replace=False).tolist())
            pending = start(dispatch, artifact, chosen)
            if turn % 5 == 4:
                config.write_text('cache = "much"\n')
            else:
                size = int(rng.integers(2, 41)) * expert_bytes(artifact)
                verify = rng.choice(["first", "always", "never"])
                config.write_text(f'cache = "{size}"\nverify = "{verify}"\n')
            node.send(signal.SIGHUP)
            assert sums(dispatch, artifact, EXPERTS) == expected(EXPERTS)
            assert pending.wait().tobytes() == expected(chosen)
    while "much" not in node.log_path.read_text():
        assert node.exit_status is None, "a refused configuration is not told"
        sleep(0.01)
    config.write_text(f'cache = "{7 * expert_bytes(artifact)}"\n')
    node.send(signal.SIGHUP)
    while metric(node, "shoal_cache_budget_bytes") != 7 * expert_bytes(artifact):
        assert node.exit_status is None, "the last file is not in force"
        sleep(0.01)


def test_a_full_disk_costs_the_heat_map_and_no_call(
    path: Path, artifact: Artifact, cluster: Cluster, expected: Sums, tmp_path: Path
) -> None:
    """1. Heat is recorded on a file system that is full. 2. Calls are served. 3. The node leaves
    with status 0, has said so, and left no half file behind.
    """
    with small_tmpfs(tmp_path / "small", 4096) as folder:
        heat = folder / "heat.json"
        (folder / "full").write_bytes(bytes(4096))
        node = cluster.node(path, extra=(*cache(artifact, 8), "--record-heat", str(heat)))
        with closing(connect(artifact, node)) as dispatch:
            assert sums(dispatch, artifact, EXPERTS) == expected(EXPERTS)
        node.send(signal.SIGTERM)
        node.wait()
        assert node.exit_status == 0
        assert "No space left" in node.log_path.read_text()
        assert [entry.name for entry in folder.iterdir()] == ["full"]
