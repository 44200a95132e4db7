"""Slow nodes, nodes that stop for a moment, ranges that nobody has, names that move: right sums.

Real processes on both transports. How many calls a slow node gets is the business of
tests/unit/test_busy_nodes.py, where no other process disturbs; here it must end, and be right.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from coordinator.node_health import MIN_SAMPLES
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from shoal import errors
from shoal.artifact import Artifact
from shoal.transport import Transport
from support.asking import sums_of_row
from support.cluster import Cluster, freeze, kill, thaw
from support.cpu_cap import throttled

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120.0  # a busy machine
ROWS = 512  # more work than the quota of some periods, on a fast CPU, too
MANY = 2000  # calls, until nodes are known
# Answers of a throttled node until it is demoted: ten in a simulated world; 3 to 11 of real ones on
# an idle machine, some more than twenty where others take the CPUs and every answer comes late, so
# that its own are nothing special. Calls are not what counts: while it is silent its replica gets
# them all, some hundreds in the time of one of its answers.
SOON_ANSWERED = 60
both_transports = pytest.mark.parametrize("transport", [Transport.FAST, Transport.GRPCIO])


def digests_here(artifact: Artifact, num_rows: int) -> list[bytes]:
    with closing(open_remote_dispatch(artifact, "0-15=local")) as dispatch:
        digests = [sums_of_row(dispatch, artifact, number, num_rows) for number in range(8)]
    assert len(set(digests)) == 8
    return digests


@pytest.fixture(scope="module")
def wanted(artifact: Artifact) -> list[bytes]:
    """The digests of eight rows' sums, computed here."""
    return digests_here(artifact, 1)


class Asker:
    """Asks a dispatch for rows in turn, and compares each time."""

    def __init__(
        self,
        dispatch: RemoteDispatch,
        artifact: Artifact,
        wanted: list[bytes],
        num_rows: int,
    ) -> None:
        self._dispatch, self._artifact, self._wanted = dispatch, artifact, wanted
        self._num_rows = num_rows
        self.count = 0

    def ask(self) -> None:
        number = self.count % len(self._wanted)
        self.count += 1
        sums = sums_of_row(self._dispatch, self._artifact, number, self._num_rows)
        assert sums == self._wanted[number]

    def num_replies(self, endpoint: str) -> int:
        health = self._dispatch.health(endpoint)
        return 0 if health is None else health.num_replies

    def until_silent(self, endpoint: str) -> int:
        """Ask until a frozen node answers nothing; return how often it has answered.

        What it said before it was frozen may still be on its way.
        """
        for _ in range(MANY):
            before = self.num_replies(endpoint)
            self.ask()
            if self.num_replies(endpoint) == before:
                return before
        raise AssertionError("a frozen node goes on answering")

    def until_known(self, *endpoints: str) -> None:
        while any(self.num_replies(endpoint) < MIN_SAMPLES for endpoint in endpoints):
            self.ask()
            assert self.count < MANY


@contextmanager
def asker(
    artifact: Artifact, shards: str, transport: Transport, wanted: list[bytes], num_rows: int = 1
) -> Iterator[tuple[Asker, RemoteDispatch]]:
    with closing(
        open_remote_dispatch(artifact, shards, shard_wait_s=WAIT_S, transport=transport)
    ) as dispatch:
        yield Asker(dispatch, artifact, wanted, num_rows), dispatch


@both_transports
def test_a_throttled_node_is_demoted(path: Path, artifact: Artifact, transport: Transport) -> None:
    """1. Two replicas are known, in good standing. 2. One is throttled: a call needs more than it
    gets in a period. 3. It is demoted, soon.
    """
    wanted = digests_here(artifact, ROWS)
    with Cluster(transport) as cluster:
        nodes = cluster.nodes(path)
        a, b = (node.endpoint for node in nodes)
        with asker(artifact, f"0-15={a}|{b}", transport, wanted, ROWS) as (asking, dispatch):
            asking.until_known(a, b)
            health = dispatch.health(a)
            assert health is not None
            while health.rank(time.monotonic()):  # of noise: it passes
                asking.ask()
            asked, answered = asking.count, health.num_replies
            before = health.demoted_until_s
            with throttled(nodes[0]):
                while health.demoted_until_s == before:
                    asking.ask()
                    assert asking.count - asked < 100 * MANY, "it is not demoted"
                    assert health.num_replies - answered < SOON_ANSWERED, "it is asked too often"


@both_transports
def test_a_node_that_stops_for_a_moment_answers_late_and_in_vain(
    path: Path, artifact: Artifact, wanted: list[bytes], transport: Transport
) -> None:
    """1. Node a stops with a call on its way; its replica answers. 2. a goes on, on the same
    connection or met anew, and says what it made of that call. 3. It is nobody's answer.
    """
    with Cluster(transport) as cluster:
        nodes = cluster.nodes(path)
        a, b = (node.endpoint for node in nodes)
        with asker(artifact, f"0-15={a}|{b}", transport, wanted) as (asking, _):
            asking.until_known(a, b)
            for _ in range(3):
                freeze(nodes[0])
                before = asking.until_silent(a)
                thaw(nodes[0])
                asked = asking.count
                while asking.num_replies(a) == before:
                    asking.ask()
                    assert asking.count - asked < 100 * MANY, "it never speaks again"


def test_a_range_that_nobody_has_is_named_after_the_wait(
    cluster: Cluster, path: Path, artifact: Artifact
) -> None:
    a, b = cluster.nodes(path)
    shards = f"0-7={a.endpoint},8-15={b.endpoint}"
    for transport in (Transport.FAST, Transport.GRPCIO):
        with closing(
            open_remote_dispatch(artifact, shards, shard_wait_s=0.2, transport=transport)
        ) as dispatch:
            sums_of_row(dispatch, artifact, 1)
            kill(b)
            with pytest.raises(errors.ShardUnavailable) as caught:
                sums_of_row(dispatch, artifact, 1)
        words = "no node is left for experts 8-15", "(waited 0.2 s: --shard-wait)", b.endpoint
        assert all(word in str(caught.value) for word in words), caught.value
        b = cluster.node(path, listen=b.endpoint.removeprefix("grpc://"))


@contextmanager
def asking_with_hosts(hosts: Path, path: Path, shards: str) -> Iterator["subprocess.Popen[str]"]:
    """A coordinator with an /etc/hosts of its own. Skips where that cannot be had."""
    in_own_mounts = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"']
    try:
        subprocess.run([*in_own_mounts, hosts, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespace of our own: {error}")
    before = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before])
    process = subprocess.Popen(
        [*in_own_mounts, hosts, sys.executable, "-m", "support.asking", path, shards],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "no_grpc_proxy": "*"},
    )
    try:
        yield process
    finally:
        process.communicate()


def test_a_name_that_moves_is_resolved_anew(
    cluster: Cluster, path: Path, artifact: Artifact, wanted: list[bytes], tmp_path: Path
) -> None:
    """1. A name leads to node a. 2. It leads elsewhere, and a dies. 3. The coordinator, whichever
    its transport, finds the node that is there now.
    """

    def lead_to(address: str) -> None:
        hosts.write_text(f"127.0.0.1 localhost\n{address} moving-node.test\n")

    def digests(number: int) -> list[str]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        return process.stdout.readline().split()

    hosts = tmp_path / "hosts"
    lead_to("127.0.0.1")
    a = cluster.node(path)
    port = a.endpoint.rpartition(":")[2]
    with asking_with_hosts(hosts, path, f"0-15=grpc://moving-node.test:{port}") as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        assert digests(3) == [wanted[3].decode()] * 2
        lead_to("127.0.0.2")
        kill(a)
        cluster.node(path, listen=f"127.0.0.2:{port}")
        assert digests(5) == [wanted[5].decode()] * 2
