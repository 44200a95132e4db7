"""StreamingStore on a tiny artifact: right bytes at every size, one read each, errors."""

import asyncio
import errno
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from expert_node.lifecycle import StopSignal, WarmUpStopped, warm_up
from shoal.artifact import Artifact
from shoal.errors import (
    CallCancelled,
    CorruptArtifact,
    ExpertUnavailable,
    NotOwned,
    UsageError,
)
from shoal.experts.cache import POLICIES
from shoal.experts.catalogue import Catalogue, Listing
from shoal.experts.checks import Checker
from shoal.experts.open_store import open_store
from shoal.experts.options import Backend, Verify
from shoal.experts.ownership import Ownership
from shoal.experts.readers.open_reader import open_reader
from shoal.experts.readers.reader import U8, Origin
from shoal.experts.store import Key, StoreOptions, WarmUpProgress
from shoal.experts.streaming import StreamingStore
from support.held_reader import until
from support.stores import LAYER, expected, flip, held, size_of, take, whole
from support.tiny_model import make_tiny_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact.open(make_tiny_artifact(tmp_path_factory.mktemp("model"), quant="q8_0"))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize("places", [2, 3, 17, 48, None])
def test_every_size_of_cache_gives_the_right_bytes(
    artifact: Artifact, opened: ExitStack, backend: Backend, places: int | None
) -> None:
    cache_bytes = None if places is None else places * size_of(artifact)
    store = whole(artifact, opened, cache_bytes=cache_bytes, backend=backend)
    rng = np.random.default_rng(0)
    for layer in (0, 1, 2, 1, 0):
        experts = rng.permutation(16)[: rng.integers(1, 17)].tolist()
        assert take(store, layer, experts) == expected(artifact, layer, experts)
    figures = store.figures()
    assert figures.resident_bytes <= figures.budget_bytes == (cache_bytes or store.num_bytes)


def test_eight_calls_that_want_cold_experts_read_each_once(
    artifact: Artifact, opened: ExitStack
) -> None:
    """1. eight threads want the same experts in other orders; 2. each is read once, for all."""
    store = whole(artifact, opened, cache_bytes=20 * size_of(artifact))
    everybody_asked = threading.Barrier(8)
    experts = list(range(16))

    def demand(rotation: int) -> list[bytes]:
        everybody_asked.wait()
        order = experts[rotation:] + experts[:rotation]
        return sorted(take(store, LAYER, order))

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(demand, range(8)))
    assert answers == [sorted(expected(artifact, LAYER, experts))] * 8
    reader = store.figures().reader
    assert reader is not None and reader.num_reads == 16


def test_eight_calls_larger_than_a_cache_of_two_all_end(
    artifact: Artifact, opened: ExitStack
) -> None:
    store = whole(artifact, opened, cache_bytes=2 * size_of(artifact))
    with ThreadPoolExecutor(8) as threads:
        layers = [0, 1, 2, 0, 1, 2, 0, 1]
        answers = list(threads.map(lambda layer: take(store, layer, range(16)), layers))
    assert answers == [expected(artifact, layer, range(16)) for layer in layers]


def test_an_expert_is_not_in_memory_before_its_first_use(
    artifact: Artifact, opened: ExitStack
) -> None:
    store = whole(artifact, opened)
    assert store.try_acquire(LAYER, [0]) is None
    with store.acquire(LAYER, [0]) as got:
        assert not got.is_whole
        assert len(list(got)) == 1
        assert got.load_s > 0
    with store.acquire(LAYER, [0]) as got:
        assert got.is_whole and got.load_s == 0.0
        [wave] = got
        assert wave.weights[0].ctypes.data % 4096 == 0
    assert store.is_resident(LAYER, [0]) and not store.is_resident(LAYER, [0, 1])


def test_what_is_in_memory_comes_at_once_and_the_rest_when_it_is_read(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(take, store, LAYER, [4, 2])
        reader.await_held(2)
        reader.let_go(2)
        first.result(30)
        with store.acquire(LAYER, [1, 2, 3, 4]) as got:
            waves = iter(got)
            assert list(next(waves).positions) == [1, 3]
            reader.await_held(2)
            assert store.try_acquire(LAYER, [2, 4]) is not None
            reader.let_go(1)
            assert list(next(waves).positions) == [0]
            reader.let_go(1)
            assert list(next(waves).positions) == [2]
            assert next(waves, None) is None
    assert store.figures().stall_s > 0


def test_a_wait_can_be_ended_from_outside(artifact: Artifact, opened: ExitStack) -> None:
    store, reader = held(artifact, opened)
    acquisition = store.acquire(LAYER, [3])

    def wait() -> None:
        with acquisition as got:
            list(got)

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(wait)
        until(lambda: store.figures().num_waiting == 1)
        acquisition.abandon(CallCancelled("by the test"))
        with pytest.raises(CallCancelled, match="by the test"):
            waiting.result(30)
    reader.let_all_go()
    assert take(store, LAYER, [3]) == expected(artifact, LAYER, [3])


def test_what_a_call_that_gave_up_wanted_is_not_read(artifact: Artifact, opened: ExitStack) -> None:
    store, reader = held(artifact, opened, places=2)
    with store.acquire(LAYER, [0, 1, 2, 3]):
        reader.await_held(2)
    reader.let_all_go()
    until(lambda: store.is_resident(LAYER, [0, 1]))
    assert store.figures().num_loading == 0
    assert store.absent(LAYER, [2, 3]) == [2, 3]


def test_a_read_error_names_the_expert_and_is_not_sticky(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(take, store, LAYER, [5]) for _ in range(2)]
        until(lambda: store.figures().num_waiting == 2)
        reader.fail(errno.EIO)
        for call in calls:
            with pytest.raises(ExpertUnavailable, match=f"expert 5 of layer {LAYER}.*layer-001"):
                call.result(30)
        [(key, why)] = store.figures().unavailable
        assert key == (LAYER, 5) and "as the test says" in why
        reader.let_all_go()
        assert take(store, LAYER, [5]) == expected(artifact, LAYER, [5])
    assert store.figures().unavailable == ()


def test_a_truncated_file_is_told_as_damage(tmp_path: Path, opened: ExitStack) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    store = whole(artifact, opened, cache_bytes=4 * size_of(artifact))
    where = artifact.expert_location(LAYER, 8)
    with where.path.open("r+b") as file:
        file.truncate(where.offset + 100)
    assert take(store, LAYER, [0]) == expected(artifact, LAYER, [0])
    with pytest.raises(CorruptArtifact, match=f"truncated inside expert 8 of layer {LAYER}"):
        take(store, LAYER, [8])
    assert take(store, LAYER, [1]) == expected(artifact, LAYER, [1])


def test_a_damaged_expert_is_never_given_out_and_is_tried_again(
    tmp_path: Path, opened: ExitStack
) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    flip(artifact, 1)
    store = whole(artifact, opened)
    for _ in range(2):
        with pytest.raises(CorruptArtifact, match=f"layer-001.*expert 1 of layer {LAYER}"):
            take(store, LAYER, [0, 1])
    until(lambda: store.is_resident(LAYER, [0]))
    assert not store.is_resident(LAYER, [1])
    assert store.figures().num_corrupt == 2
    flip(artifact, 1)
    assert take(store, LAYER, [0, 1]) == expected(artifact, LAYER, [0, 1])


@pytest.mark.parametrize(
    ("verify", "verified"), [(Verify.FIRST, 4), (Verify.ALWAYS, 8), (Verify.NEVER, 0)]
)
def test_hashes_are_compared_as_often_as_asked(
    artifact: Artifact, opened: ExitStack, verify: Verify, verified: int
) -> None:
    store = whole(artifact, opened, cache_bytes=2 * size_of(artifact), verify=verify)
    for index in (0, 1, 2, 3) * 2:
        take(store, LAYER, [index])
    figures = store.figures()
    assert (figures.misses, figures.num_verified) == (8, verified)


def test_reads_go_on_while_a_hash_is_compared(artifact: Artifact, opened: ExitStack) -> None:
    """1. expert 1 is read and its hash takes for ever; 2. expert 2 is read, checked, given out."""

    class Held(Checker):
        has_begun, may_end = threading.Event(), threading.Event()

        def check(
            self,
            key: Key,
            listing: Listing,
            memory: U8,
            origin: Origin | None,
            *,
            is_alone: bool = True,
        ) -> None:
            if key == (LAYER, 1):
                self.has_begun.set()
                assert self.may_end.wait(30)
            super().check(key, listing, memory, origin, is_alone=is_alone)

    checker = Held(Verify.FIRST)
    store = StreamingStore(
        artifact,
        Ownership(artifact.owned_experts),
        Catalogue,
        POLICIES["lru"](8),
        lambda paths: open_reader(Backend.BUFFERED, None, paths),
        checker=checker,
    )
    opened.enter_context(closing(store))
    opened.callback(checker.may_end.set)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(take, store, LAYER, [1])
        assert checker.has_begun.wait(30)
        # One processor has one thread for hashes: then this one is read without a check.
        checker.verify = Verify.NEVER
        assert take(store, LAYER, [2]) == expected(artifact, LAYER, [2])
        assert store.try_acquire(LAYER, [1]) is None, "it was given out unchecked"
        checker.may_end.set()
        assert first.result(30) == expected(artifact, LAYER, [1])
    assert checker.num_verified == 1


@pytest.mark.processes
def test_a_store_that_nobody_closed_does_not_keep_the_process(artifact: Artifact) -> None:
    script = f"""
from pathlib import Path
from shoal.artifact import Artifact
from shoal.experts.open_store import open_store
from shoal.experts.ownership import Ownership
artifact = Artifact.open(Path({str(artifact.path)!r}))
store = open_store(artifact, Ownership(artifact.owned_experts))
with store.acquire(0, [0]) as got:
    print(sum(len(wave.positions) for wave in got))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_file_that_was_written_to_is_verified_again(tmp_path: Path, opened: ExitStack) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    store = whole(artifact, opened, cache_bytes=2 * size_of(artifact))
    take(store, LAYER, [3])
    take(store, LAYER, [0, 1])
    flip(artifact, 3)
    with pytest.raises(CorruptArtifact, match="expert 3"):
        take(store, LAYER, [3])


def test_warm_up_reads_all_and_reports_each(artifact: Artifact, opened: ExitStack) -> None:
    store = whole(artifact, opened)
    reports: list[WarmUpProgress] = []
    store.warm_up(reports.append)
    assert [report.num_experts for report in reports] == list(range(1, 49))
    assert reports[-1].num_experts == store.ownership.num_experts == reports[-1].total_experts
    assert reports[-1].num_bytes == store.num_bytes == reports[-1].total_bytes
    for layer in store.ownership.layers:
        assert store.is_resident(layer, store.ownership.experts(layer))


def test_a_warm_up_takes_the_first_that_fit_and_evicts_nothing(
    artifact: Artifact, opened: ExitStack
) -> None:
    store = whole(artifact, opened, cache_bytes=5 * size_of(artifact))
    reports: list[WarmUpProgress] = []
    order = [(LAYER, index) for index in (9, 3, 7, 1, 11, 2, 5)]
    store.warm_up(reports.append, order)
    assert reports[-1].total_experts == len(reports) == 5
    assert store.is_resident(LAYER, [9, 3, 7, 1, 11]) and not store.is_resident(LAYER, [2])
    assert store.figures().evictions == 0


def test_a_warm_up_can_be_stopped_between_experts(artifact: Artifact, opened: ExitStack) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: WarmUpProgress) -> None:
        raise Stopped

    store = whole(artifact, opened)
    with pytest.raises(Stopped):
        store.warm_up(stop)
    assert take(store, LAYER, [0]) == expected(artifact, LAYER, [0])


def test_a_warm_up_ends_at_the_first_damaged_expert(tmp_path: Path, opened: ExitStack) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    flip(artifact, 2)
    with pytest.raises(CorruptArtifact, match="expert 2"):
        whole(artifact, opened).warm_up(lambda _: None)


def test_a_warm_up_leaves_out_what_cannot_be_read(artifact: Artifact, opened: ExitStack) -> None:
    """1. the first expert's read fails; 2. the others are read; 3. the next call tries again."""
    store, reader = held(artifact, opened)
    with ThreadPoolExecutor(1) as thread:
        warming = thread.submit(store.warm_up, lambda _: None)
        reader.await_held(48)
        reader.fail(errno.EIO)
        reader.let_all_go()
        warming.result(30)
    assert [key for key, _ in store.figures().unavailable] == [(0, 0)]
    assert store.figures().num_resident == 47
    assert take(store, 0, [0]) == expected(artifact, 0, [0])
    assert store.figures().unavailable == ()


def test_damage_ends_a_warm_up_also_beside_an_expert_that_cannot_be_read(
    tmp_path: Path, opened: ExitStack
) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    flip(artifact, 2)
    store, reader = held(artifact, opened)
    with ThreadPoolExecutor(1) as thread:
        warming = thread.submit(store.warm_up, lambda _: None)
        reader.await_held(48)
        reader.fail(errno.EIO)
        reader.let_all_go()
        with pytest.raises(CorruptArtifact, match="expert 2 of"):
            warming.result(30)


def test_a_warm_up_that_waits_for_a_read_ends_when_the_node_is_told_to_leave(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened)

    async def story() -> None:
        stop = StopSignal()
        warming = asyncio.create_task(warm_up(store, stop))
        await asyncio.to_thread(reader.await_held, 48)
        stop.set("a test")
        with pytest.raises(WarmUpStopped):
            await warming

    asyncio.run(story())


def test_a_warm_up_ends_early_when_the_node_is_told_to_leave(
    artifact: Artifact, opened: ExitStack
) -> None:
    async def story() -> None:
        stop = StopSignal()
        stop.set("a test")
        with pytest.raises(WarmUpStopped):
            await warm_up(whole(artifact, opened), stop)

    asyncio.run(story())


def test_what_is_not_owned_is_an_error_and_never_zeros(
    artifact: Artifact, opened: ExitStack
) -> None:
    store = opened.enter_context(closing(open_store(artifact, Ownership({LAYER: [0, 1]}))))
    with pytest.raises(NotOwned, match=f"expert 2 of layer {LAYER} .*experts 0-1"):
        store.acquire(LAYER, [0, 2])
    with pytest.raises(NotOwned, match="layer 0"):
        store.acquire(0, [0])
    assert not store.is_resident(0, [0])


def test_less_than_two_experts_are_refused_at_the_start(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"two of the largest expert.*--cache"):
        open_store(
            artifact,
            Ownership(artifact.owned_experts),
            StoreOptions(cache_bytes=2 * size_of(artifact) - 1),
        )


def test_a_prefetch_becomes_a_demand_when_a_call_comes_for_it(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened)
    assert store.prefetch(LAYER, [3, 4]) == 2
    assert store.prefetch(LAYER, [3]) == 0 and store.prefetch(7, [0]) == 0
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(take, store, LAYER, [4])
        until(lambda: store.figures().num_waiting == 1)
        assert len(reader.promoted) == 1
        store.cancel_prefetch()
        until(lambda: store.absent(LAYER, [3, 4]) == [3])
        reader.let_all_go()
        assert call.result(30) == expected(artifact, LAYER, [4])
    assert store.prefetch_bytes() == tuple(n * size_of(artifact) for n in (2, 1, 1))


def test_a_demand_without_room_takes_the_place_of_prefetches(
    artifact: Artifact, opened: ExitStack
) -> None:
    """1. prefetches fill a part; 2. pins the rest; 3. a demand lacks room; 4. they are given up."""
    store, reader = held(artifact, opened, places=8)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(take, store, LAYER, range(6))
        reader.await_held(6)
        reader.let_go(6)
        first.result(30)
        assert store.pin([(LAYER, index) for index in range(6)]) == 6
        assert store.prefetch(LAYER, [10, 11]) == 2
        call = thread.submit(take, store, LAYER, [12])
        until(lambda: store.absent(LAYER, [10, 11]) == [10, 11])
        reader.let_all_go()
        assert call.result(30) == expected(artifact, LAYER, [12])
    assert store.is_resident(LAYER, range(6))


def test_a_pace_that_allows_no_prefetch_gives_up_those_under_way(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, _ = held(artifact, opened)
    assert store.prefetch(LAYER, [3]) == 1
    store.set_pace(1, 1e6, allows_prefetch=False)
    until(lambda: store.absent(LAYER, [3]) == [3])
    assert store.prefetch(LAYER, [3]) == 0
    store.set_pace(None, None, allows_prefetch=True)
    assert store.prefetch(LAYER, [3]) == 1
