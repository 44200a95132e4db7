"""Nodes are lost, hang and come back while tokens are made: the same tokens, and no error.

Faults are placed at a fan-out, not at a time: `Staged` counts the layers that go out and does the
bad thing before or after one of them is sent.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from coordinator.cancellation import Cancellation
from coordinator.engine import Engine, EngineConfig
from coordinator.expert_dispatch import ExpertDispatch, PendingSums
from coordinator.kv_arrays import KvArrays
from coordinator.map_reload import reload_on_hangup
from coordinator.remote_dispatch import RemoteDispatch, open_remote_dispatch
from coordinator.request import Finished, GenerationRequest, TokenGenerated
from coordinator.tokenizer import NoTokenizer
from coordinator.transformer import exact_transformer
from shoal import errors, ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.rows import Rows
from shoal.transport import Transport
from support.chaos_proxy import ChaosProxy, Direction, Weather
from support.cluster import Cluster, freeze, kill, thaw
from support.news import WAIT_S, News

pytestmark = pytest.mark.processes

NUM_TOKENS = 24
both_transports = pytest.mark.parametrize("transport", [Transport.FAST, Transport.GRPCIO])


class Staged:
    """A dispatch that does something at chosen fan-outs.

    before, after: by number of the fan-out, from 1: what to do just before or after it is sent.
    """

    def __init__(self, inner: ExpertDispatch) -> None:
        self.inner = inner
        self.stats = inner.stats
        self.before: dict[int, Callable[[], object]] = {}
        self.after: dict[int, Callable[[], object]] = {}
        self.count = 0

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        self.count += 1
        self.before.get(self.count, lambda: None)()
        pending = self.inner.start(layer, rows, plan)
        self.after.get(self.count, lambda: None)()
        return pending

    def close(self) -> None:
        self.inner.close()


def tokens(artifact: Artifact, dispatch: ExpertDispatch) -> tuple[int, ...]:
    """Generate. Raises what ended the request early."""
    engine = Engine(
        exact_transformer(artifact, dispatch),
        NoTokenizer(artifact.generation_config),
        lambda num_blocks: KvArrays(artifact.spec, artifact.kv_dtype, num_blocks),
        EngineConfig(64, 8),
        time.perf_counter,
    )
    sampling = ops.SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=3
    )
    request = GenerationRequest(
        prompt_ids=tuple(range(3, 20)),
        max_tokens=NUM_TOKENS,
        sampling=sampling,
        stop=(),
        ignore_eos=True,
        num_top_logprobs=None,
    )
    ids = []
    for event in engine.generate(request, Cancellation()):
        if isinstance(event, TokenGenerated):
            ids.append(event.token_id)
        if isinstance(event, Finished) and event.error is not None:
            raise event.error
    return tuple(ids)


@pytest.fixture(scope="module")
def alone(artifact: Artifact) -> tuple[int, ...]:
    """What this process says without nodes."""
    with closing(open_remote_dispatch(artifact, "0-15=local")) as dispatch:
        ids = tokens(artifact, dispatch)
    assert len(ids) == NUM_TOKENS and len(set(ids)) > NUM_TOKENS // 2
    return ids


@contextmanager
def staged(
    artifact: Artifact, shards: str, transport: Transport, news: News | None = None
) -> Iterator[tuple[Staged, RemoteDispatch]]:
    dispatch = open_remote_dispatch(
        artifact,
        shards,
        call_timeout_s=60,
        shard_wait_s=WAIT_S,
        transport=transport,
        notify=news or News(),
    )
    with closing(dispatch):
        yield Staged(dispatch), dispatch


@both_transports
def test_a_node_killed_mid_token_is_replaced_by_its_replica_and_met_again(
    path: Path, artifact: Artifact, alone: tuple[int, ...], transport: Transport
) -> None:
    """1. Node a freezes; a layer goes out to a and b; a is killed. 2. Not one token differs.
    3. a is started again and met again. 4. It computes, and then b is killed in the same way.
    """
    news = News()
    with Cluster() as cluster:
        a, b = cluster.nodes(path)
        address = a.endpoint.removeprefix("grpc://")
        with staged(artifact, f"0-15={a.endpoint}|{b.endpoint}", transport, news) as (stage, _):
            stage.before[20] = lambda: freeze(a)
            stage.after[20] = lambda: kill(a)
            assert tokens(artifact, stage) == alone
            assert stage.count > 40
            cluster.node(path, listen=address)
            news.wait(f"node {a.endpoint} is back")
            stage.count = 0
            stage.before = {30: lambda: freeze(b)}
            stage.after = {30: lambda: kill(b)}
            assert tokens(artifact, stage) == alone


@both_transports
def test_a_frozen_node_is_given_up_and_its_late_answers_are_dropped(
    path: Path, artifact: Artifact, alone: tuple[int, ...], transport: Transport
) -> None:
    """1. Node a freezes with a layer on its way. 2. Its replica answers; a is given up after two
    seconds of silence. 3. It goes on, is met again, and nothing it says late is believed.
    """
    news = News()
    with Cluster() as cluster:
        a, b = cluster.nodes(path)
        news.on["no sign of life"] = lambda: thaw(a)
        with staged(artifact, f"0-15={a.endpoint}|{b.endpoint}", transport, news) as (stage, _):
            stage.before[40] = lambda: freeze(a)
            assert tokens(artifact, stage) == alone
            news.wait("no sign of life")
            news.wait(f"node {a.endpoint} is back")
            assert tokens(artifact, stage) == alone


@both_transports
def test_a_range_without_a_node_waits_until_one_is_back(
    path: Path, artifact: Artifact, alone: tuple[int, ...], transport: Transport
) -> None:
    """1. The one node of a range is killed with a layer on its way. 2. It is started again.
    3. The request goes on where it was; the coordinator was never restarted.
    """
    news = News()
    with Cluster() as cluster:
        a, b = cluster.nodes(path)
        address = b.endpoint.removeprefix("grpc://")
        news.on[b.endpoint] = lambda: cluster.node(path, listen=address)
        shards = f"0-7={a.endpoint},8-15={b.endpoint}"
        with staged(artifact, shards, transport, news) as (stage, _):
            stage.before[10] = lambda: freeze(b)
            stage.after[10] = lambda: kill(b)
            assert tokens(artifact, stage) == alone


def test_a_replica_that_is_down_at_start_is_told_and_joins_later(
    path: Path, artifact: Artifact, alone: tuple[int, ...]
) -> None:
    news = News()
    with Cluster() as cluster:
        a, b = cluster.nodes(path)
        address = a.endpoint.removeprefix("grpc://")
        kill(a)
        shards = f"0-15={a.endpoint}|{b.endpoint}"
        with staged(artifact, shards, Transport.FAST, news) as (stage, dispatch):
            news.wait("going on without it")
            cluster.node(path, listen=address)
            news.wait(f"node {a.endpoint} is back")
            assert tokens(artifact, stage) == alone
            health = dispatch.health(a.endpoint)
            assert health is not None and health.num_replies > 10, "it has no work"


def stormy(number: int, direction: Direction, since_s: float) -> Weather:
    """5 % of segments 200 ms late; every connection is reset once a second."""
    is_reset = direction is Direction.DOWN and since_s % 1.0 > 0.98
    return Weather(late_share=0.05, late_s=0.2, slice_bytes=1000, resets=is_reset)


@both_transports
def test_late_segments_and_resets_every_second_cost_no_token(
    path: Path, artifact: Artifact, alone: tuple[int, ...], transport: Transport
) -> None:
    with Cluster() as cluster:
        nodes = cluster.nodes(path)
        with (
            ChaosProxy(nodes[0].endpoint, stormy, seed=1) as first,
            ChaosProxy(nodes[1].endpoint, seed=2) as second,
        ):
            shards = f"0-15={first.endpoint}|{second.endpoint}"
            with staged(artifact, shards, transport) as (stage, _):
                second.forecast = lambda n, way, s: stormy(n, way, s + 0.5)
                opened, num_requests = [first.num_connections, second.num_connections], 0
                while num_requests < 2 or any(
                    proxy.num_connections <= before
                    for proxy, before in zip((first, second), opened, strict=True)
                ):
                    assert tokens(artifact, stage) == alone
                    num_requests += 1
                    assert num_requests < 100, "the storm broke nothing off"


def test_the_map_changes_under_a_request(
    path: Path, artifact: Artifact, alone: tuple[int, ...], tmp_path: Path
) -> None:
    """1. The map names a. 2. Between two layers it is read again and names b; then a is killed.
    3. A map that is wrong, or names nobody who is there, changes nothing.
    """

    def write(endpoint: str, experts: str = "0-15") -> None:
        file.write_text(f'[[shard]]\nexperts = "{experts}"\nendpoints = ["{endpoint}"]\n')

    file = tmp_path / "map.toml"
    with Cluster() as cluster:
        a, b = cluster.nodes(path)
        write(a.endpoint)
        with staged(artifact, f"@{file}", Transport.FAST) as (stage, dispatch):

            def change() -> None:
                write(b.endpoint)
                assert dispatch.reload() == b.endpoint

            stage.before = {15: change, 20: lambda: kill(a)}
            assert tokens(artifact, stage) == alone
            write(b.endpoint, "0-14")
            with pytest.raises(errors.ShardMapError, match="no endpoint for expert 15"):
                dispatch.reload()
            write(a.endpoint)
            with pytest.raises(errors.NodeUnreachable, match="not reachable"):
                dispatch.reload()
            write("local")
            with pytest.raises(errors.ShardMapError, match="restart it"):
                dispatch.reload()
            assert tokens(artifact, stage) == alone


class FakeDispatch:
    """Stands for the dispatch: fails at first."""

    def __init__(self) -> None:
        self.num_reloads = 0

    def reload(self) -> str:
        self.num_reloads += 1
        if self.num_reloads == 1:
            raise errors.ShardMapError("a typo")
        return "grpc://b:1"


def test_a_hangup_reloads_the_map_and_says_how_it_went() -> None:
    news, before = News(), signal.getsignal(signal.SIGHUP)
    with reload_on_hangup(FakeDispatch(), news):
        os.kill(os.getpid(), signal.SIGHUP)
        news.wait("stays as it was: a typo")
        os.kill(os.getpid(), signal.SIGHUP)
        news.wait("is reloaded: grpc://b:1")
    assert signal.getsignal(signal.SIGHUP) is before


def test_sums_do_not_depend_on_the_replica(path: Path, artifact: Artifact) -> None:
    """A prefill's large calls, split over two replicas and a third that owns half."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(300, artifact.spec.model_dim)).astype(np.float32)
    experts = np.array([rng.permutation(16)[:4] for _ in range(300)], np.int32)
    plan = RoutingPlan(np.sort(experts, axis=1), np.full((300, 4), 0.25, np.float32))
    rows = ops.quantise_rows(artifact.scheme(1), x)
    with Cluster() as cluster:
        a, b = cluster.node(path), cluster.node(path, experts="0-7")
        shards = f"0-7={a.endpoint}|{b.endpoint},8-15={a.endpoint}"
        with (
            closing(open_remote_dispatch(artifact, "0-15=local")) as local,
            closing(open_remote_dispatch(artifact, shards)) as dispatch,
        ):
            wanted = local.start(1, rows, plan).wait().tobytes()
            for _ in range(4):
                assert dispatch.start(1, rows, plan).wait().tobytes() == wanted
