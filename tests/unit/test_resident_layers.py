"""Layers that are in memory whole: computed on without the cache, and never a byte too late."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
import pytest

from coordinator.expert_dispatch import LocalDispatch, call_of_plan
from shoal import ops
from shoal.artifact import Artifact
from shoal.errors import MalformedMessage, NotOwned, NumericError
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.experts.ownership import Ownership
from shoal.router import RoutingPlan
from support.held_reader import until
from support.stores import LAYER, expected, held, size_of, take, whole
from support.streaming import call_of
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact.open(make_tiny_artifact(tmp_path_factory.mktemp("model"), quant="q8_0"))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


def test_a_layer_gets_its_table_when_a_call_finds_all_of_it_in_memory(
    artifact: Artifact, opened: ExitStack
) -> None:
    store = whole(artifact, opened)
    executor, oracle = ExpertExecutor(artifact, store), whole_executor(artifact)
    some, every = call_of(artifact, LAYER, [3, 1]), call_of(artifact, LAYER, list(range(16)))
    assert executor.compute_resident(some) is None, "nothing was read yet"
    for call in (some, every):
        assert (executor.compute(call) == oracle.compute(call)).all()
    assert not store.tables, "no call has found everything"
    assert executor.compute_resident(some) is None
    executor.compute(some)
    assert list(store.tables) == [LAYER]
    figures = store.figures()
    assert (figures.hits, figures.misses) == (2 + 2, 2 + 14)
    for call in (some, every):
        computed = executor.compute_resident(call)
        assert computed is not None and (computed.sums == oracle.compute(call)).all()
        assert (executor.compute(call) == oracle.compute(call)).all()
    assert store.figures().hits == 4 + 2 * (2 + 16), "a hit is one with a table and without"


def test_a_cache_that_does_not_hold_all_has_no_tables(
    artifact: Artifact, opened: ExitStack
) -> None:
    store = whole(artifact, opened, cache_bytes=47 * size_of(artifact))
    for _ in range(2):
        for layer in (0, LAYER):
            take(store, layer, range(16))
    assert store.figures().num_resident >= 32 and not store.tables
    store.resize(None)
    take(store, LAYER, range(16))
    assert list(store.tables) == [LAYER]
    store.resize(40 * size_of(artifact))
    assert not store.tables
    take(store, LAYER, [0])
    assert not store.tables


def test_an_expert_that_was_read_ahead_counts_as_used_before_its_layer_has_a_table(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened)
    reader.let_all_go()
    take(store, LAYER, range(15))
    assert store.prefetch(LAYER, [15]) == 1
    while not store.is_resident(LAYER, [15]):
        pass
    take(store, LAYER, range(15))
    assert not store.tables
    take(store, LAYER, [15])
    assert store.tables and store.figures().prefetch_used == 1


def test_a_table_refuses_what_the_long_way_refuses(artifact: Artifact, opened: ExitStack) -> None:
    store = whole(artifact, opened)
    store.rebind(artifact, Ownership({LAYER: range(8)}))
    executor = ExpertExecutor(artifact, store)
    for _ in range(2):
        executor.compute(call_of(artifact, LAYER, list(range(8))))
    assert store.tables
    call = call_of(artifact, LAYER, [0, 5])
    with pytest.raises(NotOwned, match="expert 8 of layer 1"):
        executor.compute_resident(call_of(artifact, LAYER, [0, 8]))
    with pytest.raises(MalformedMessage, match="has 0-15"):
        executor.compute_resident(call_of(artifact, LAYER, [16]))
    with pytest.raises(MalformedMessage, match="layer 99"):
        rows = call.rows
        executor.compute_resident(
            ExpertCall(99, rows, call.row_offsets, call.experts, call.weights)
        )
    narrow = ops.quantise_rows(call.rows.scheme, np.ones((1, 32), np.float32))
    with pytest.raises(MalformedMessage, match="dim = 32"):
        executor.compute_resident(
            ExpertCall(LAYER, narrow, call.row_offsets, call.experts, call.weights)
        )
    call.weights[1] = np.inf
    with pytest.raises(NumericError, match=r"layer 1.* row 0") as caught:
        executor.compute_resident(call)
    assert caught.value.rows == (0,)
    former = call_of(artifact, LAYER, [0, 8])  # of a call that was let in before `rebind`
    assert (executor.compute(former) == whole_executor(artifact).compute(former)).all()


@pytest.mark.parametrize("num_rows", [1, 5])
def test_the_coordinators_own_rows_come_to_the_same_with_a_table_and_without(
    artifact: Artifact, opened: ExitStack, num_rows: int
) -> None:
    store = whole(artifact, opened)
    dispatch, oracle = LocalDispatch(ExpertExecutor(artifact, store)), whole_executor(artifact)
    rng = np.random.default_rng(num_rows)
    x = rng.normal(size=(num_rows, artifact.spec.model_dim)).astype(np.float32)
    rows = ops.quantise_rows(artifact.scheme(LAYER), x)
    experts = np.array([rng.permutation(16)[:3] for _ in range(num_rows)], np.int32)
    plan = RoutingPlan(experts, rng.random((num_rows, 3)).astype(np.float32))
    right = oracle.compute(call_of_plan(LAYER, rows, plan))
    for is_whole in (False, True):
        assert bool(store.tables) is is_whole
        assert (dispatch.start(LAYER, rows, plan).wait() == right).all()
        for _ in range(2):
            take(store, LAYER, range(16))
    assert dispatch.stats.summary().num_fanouts == 2
    plan.weights[num_rows - 1, 1] = np.inf
    with pytest.raises(NumericError, match="layer 1") as caught:
        dispatch.start(LAYER, rows, plan).wait()
    assert caught.value.rows == (num_rows - 1,)


def test_tables_make_room_for_a_demand_that_finds_none(
    artifact: Artifact, opened: ExitStack
) -> None:
    """All bytes fit, but each piece that a cache grew by ends in half an expert."""
    size = size_of(artifact)
    store = whole(artifact, opened, cache_bytes=size * 5 // 2)
    for halves in range(8, 96, 3):
        store.resize(size * halves // 2)
    store.resize(None)
    for _ in range(2):  # they fill it: 2 + 30 places
        for layer in (0, 1):
            take(store, layer, range(16))
    assert list(store.tables) == [0, 1] and store.figures().evictions == 0
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(take, store, 2, range(16))
        try:
            assert taken.result(10) == expected(artifact, 2, range(16))
        finally:
            store.resize(2 * size)  # ends a wait in vain
    assert store.figures().evictions >= 16


def test_calls_compute_the_same_in_a_storm_of_changes(
    artifact: Artifact, opened: ExitStack
) -> None:
    """Four threads compute on whole layers, whose memory is given back or goes to others."""
    store = whole(artifact, opened)
    executor, oracle = ExpertExecutor(artifact, store), whole_executor(artifact)
    calls = [call_of(artifact, layer, list(range(1, 16, 2)), layer) for layer in range(3)]
    right = [oracle.compute(call) for call in calls]
    is_over = threading.Event()

    def compute(seed: int) -> int:
        rng, num_quick = np.random.default_rng(seed), 0
        while not is_over.is_set():
            layer = int(rng.integers(3))
            computed = None
            with suppress(NotOwned):
                computed = executor.compute_resident(calls[layer])
            num_quick += computed is not None
            sums = executor.compute(calls[layer]) if computed is None else computed.sums
            assert (sums == right[layer]).all()
        return num_quick

    odd, even = [dict.fromkeys(range(3), range(first, 16, 2)) for first in (1, 0)]
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(compute, seed) for seed in range(4)]
        try:
            for turn in range(20):
                store.rebind(artifact, Ownership(odd))
                store.resize(None)
                until(lambda: bool(store.tables))
                if turn % 2:
                    store.resize(2 * size_of(artifact))
                else:
                    store.rebind(artifact, Ownership(even))
                    assert take(store, 0, even[0]) == expected(artifact, 0, even[0])
        finally:
            is_over.set()
        assert all(thread.result() > 0 for thread in running), "no call took the quick way"
    assert store.figures().misses > 100, "nothing ever left"
    # Whoever held what was withdrawn has let go of it: all can be evicted.
    store.resize(2 * size_of(artifact))
    assert store.figures().resident_bytes <= 2 * size_of(artifact)
