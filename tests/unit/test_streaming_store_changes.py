"""StreamingStore while it serves: another size, other files, other experts, other directories."""

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from shoal.artifact import Artifact
from shoal.errors import (
    CorruptArtifact,
    NotOwned,
    UsageError,
)
from shoal.experts.cache.arena import Arena
from shoal.experts.catalogue import Catalogue
from shoal.experts.options import Backend
from shoal.experts.ownership import Ownership
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


def test_a_smaller_cache_serves_on_and_a_larger_one_holds_more(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened, places=16)
    reader.let_all_go()
    take(store, LAYER, range(16))
    with store.acquire(LAYER, [14, 15]) as got:
        [wave] = got
        store.resize(3 * size_of(artifact))
        assert [weights.tobytes() for weights in wave.weights] == expected(
            artifact, LAYER, [14, 15]
        )
        assert reader.registered[-1] == [3 * size_of(artifact)]
        assert store.figures().resident_bytes == 5 * size_of(artifact)
    assert store.figures().resident_bytes == 3 * size_of(artifact)
    assert take(store, LAYER, range(16)) == expected(artifact, LAYER, range(16))
    assert store.figures().num_resident <= 3
    store.resize(40 * size_of(artifact))
    for layer in (0, 1):
        assert take(store, layer, range(16)) == expected(artifact, layer, range(16))
    assert store.figures().num_resident > 30
    store.resize(None)
    assert store.figures().budget_bytes == store.num_bytes
    with pytest.raises(UsageError):
        store.resize(size_of(artifact))


@pytest.mark.parametrize("backend", Backend)
def test_a_cache_that_shrinks_and_grows_gives_the_right_bytes(
    artifact: Artifact, opened: ExitStack, backend: Backend
) -> None:
    store = whole(artifact, opened, cache_bytes=30 * size_of(artifact), backend=backend)
    for places in (30, 4, 48, 2, 20, None, 3, 10):
        store.resize(None if places is None else places * size_of(artifact))
        for layer in range(3):
            assert take(store, layer, range(16)) == expected(artifact, layer, range(16))


@pytest.mark.parametrize("backend", [Backend.IO_URING, Backend.PREAD])
def test_calls_get_the_right_bytes_in_a_storm_of_changes(
    artifact: Artifact, opened: ExitStack, backend: Backend
) -> None:
    """Five threads take experts; one resizes, pins, prefetches, cancels and rebinds meanwhile."""
    store = whole(artifact, opened, cache_bytes=6 * size_of(artifact), backend=backend)
    right = {layer: expected(artifact, layer, range(16)) for layer in range(3)}
    is_over = threading.Event()

    def take_many(seed: int) -> int:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            layer, count = int(rng.integers(3)), int(rng.integers(1, 17))
            experts = rng.permutation(16)[:count].tolist()
            if rng.random() < 0.2:  # gives up after the first wave
                with store.acquire(layer, experts) as got:
                    next(iter(got))
            else:
                assert take(store, layer, experts) == [right[layer][index] for index in experts]
        return seed

    def change() -> int:
        rng = np.random.default_rng(99)
        num_changes = 0
        while not is_over.is_set():
            num_changes += 1
            match rng.integers(6):
                case 0:
                    store.resize(int(rng.integers(2, 49)) * size_of(artifact))
                case 1:
                    store.pin([(1, index) for index in range(rng.integers(4))])
                case 2:
                    store.cancel_prefetch()
                case 3:
                    kept = {layer: range(rng.integers(4, 17)) for layer in range(3)}
                    store.rebind(artifact, Ownership(kept))
                case _:
                    store.prefetch(int(rng.integers(3)), rng.permutation(16)[:4].tolist())
        return num_changes

    with ThreadPoolExecutor(6) as threads:
        changes = threads.submit(change)
        try:
            assert list(threads.map(take_many, range(5))) == list(range(5))
        finally:
            is_over.set()
        assert changes.result() > 20, "nothing changed"
    assert store.figures().num_waiting == 0


def test_memory_that_an_arena_gives_back_is_the_systems_again() -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    arena = Arena()
    before = resident()
    arena.grow(0, 64 << 20)
    arena.view(0, 64 << 20)[:] = 1
    assert resident() - before > 60 << 20
    arena.give_back_from(16 << 20)
    assert resident() - before < 24 << 20
    assert arena.view(0, 16 << 20).all() and not arena.view(16 << 20, 48 << 20).any()


def test_another_folder_of_the_same_model_takes_over_what_is_in_memory(
    artifact: Artifact, tmp_path: Path, opened: ExitStack
) -> None:
    copy = Artifact.open(shutil.copytree(artifact.path, tmp_path / "copy.shoal"))
    store = whole(artifact, opened)
    take(store, LAYER, range(4))
    store.rebind(copy, Ownership({LAYER: range(2, 6), 2: range(16)}))
    assert store.is_resident(LAYER, [2, 3]) and not store.is_resident(LAYER, [0])
    with pytest.raises(NotOwned, match="layer 0"):
        store.ownership.check(0, [0])
    assert take(store, LAYER, [2, 4]) == expected(artifact, LAYER, [2, 4])
    assert take(store, 2, range(16)) == expected(artifact, 2, range(16))
    assert store.figures().budget_bytes == store.num_bytes == 20 * size_of(artifact)


def test_a_call_under_way_ends_although_its_experts_are_not_owned_any_more(
    artifact: Artifact, opened: ExitStack
) -> None:
    store, reader = held(artifact, opened, places=2)
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(take, store, LAYER, range(6))
        reader.await_held(2)
        store.rebind(artifact, Ownership({2: range(16)}))
        reader.let_all_go()
        assert call.result(30) == expected(artifact, LAYER, range(6))
    assert store.figures().num_resident == 0
    assert take(store, LAYER, [1]) == expected(artifact, LAYER, [1]), "a call that was checked"


def test_another_model_is_refused_and_the_old_one_serves_on(
    artifact: Artifact, tmp_path: Path, opened: ExitStack
) -> None:
    other = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0", seed=1))
    store = whole(artifact, opened)
    with pytest.raises(UsageError, match="another model"):
        store.rebind(other, Ownership(other.owned_experts))
    assert take(store, LAYER, [1]) == expected(artifact, LAYER, [1])


@pytest.mark.parametrize("backend", Backend)
def test_a_file_that_took_anothers_name_is_verified_although_the_other_was(
    tmp_path: Path, opened: ExitStack, backend: Backend
) -> None:
    """1. an expert was right; 2. a damaged file takes its file's name; 3. the old file is still
    open, and right; 4. files are opened anew: the damage is found.
    """
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    right = expected(artifact, LAYER, range(4))
    store = whole(artifact, opened, cache_bytes=2 * size_of(artifact), backend=backend)
    assert take(store, LAYER, range(4)) == right
    file = artifact.expert_location(LAYER, 0).path
    shutil.copy2(file, tmp_path / "other")
    (tmp_path / "other").replace(file)
    flip(artifact, 0)
    assert [take(store, LAYER, [index])[0] for index in range(4)] == right
    store.rebind(artifact, Ownership(artifact.owned_experts))
    assert [take(store, LAYER, [index])[0] for index in (1, 2, 3)] == right[1:]
    with pytest.raises(CorruptArtifact, match=f"expert 0 of layer {LAYER}"):
        take(store, LAYER, [0])


def test_each_copy_of_an_expert_is_verified_when_it_is_first_read(
    tmp_path: Path, opened: ExitStack
) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    dirs = (tmp_path / "a", tmp_path / "b")
    for folder in dirs:
        shutil.copytree(artifact.path / "experts", folder / "experts")
    store = whole(artifact, opened, data_dirs=dirs, cache_bytes=2 * size_of(artifact))
    right = expected(artifact, LAYER, range(4))
    flip(artifact, 0)
    shutil.copy2(artifact.expert_location(LAYER, 0).path, dirs[1] / "experts")
    outcomes: list[bool | None] = []
    for index in (0, 1, 2, 3, 3, 2, 1, 0):  # each is read from the one copy, then from the other
        try:
            outcomes.append(take(store, LAYER, [index]) == [right[index]])
        except CorruptArtifact:
            outcomes.append(None)
    assert sorted(outcomes, key=str) == [None, *[True] * 7], "one copy of expert 0 is damaged"


def test_files_in_data_directories_are_read_instead(
    artifact: Artifact, tmp_path: Path, opened: ExitStack
) -> None:
    dirs = (tmp_path / "a", tmp_path / "b")
    for folder in dirs:
        shutil.copytree(artifact.path / "experts", folder / "experts")
    (dirs[1] / "experts" / "layer-002.safetensors").unlink()
    store = whole(artifact, opened, data_dirs=dirs, cache_bytes=40 * size_of(artifact))
    for layer in range(3):
        assert take(store, layer, range(16)) == expected(artifact, layer, range(16))
    listings = Catalogue(artifact, Ownership(artifact.owned_experts), dirs).listings
    found = {layer: [s.path.parts[-3] for s in listings[layer, 0].sources] for layer in (1, 2)}
    assert found == {1: ["a", "b"], 2: ["a"]}


def test_a_data_directory_without_experts_or_with_short_ones_is_refused(
    artifact: Artifact, tmp_path: Path
) -> None:
    catalogue = partial(Catalogue, artifact, Ownership(artifact.owned_experts))
    with pytest.raises(UsageError, match=r"--data-dir .*none of the expert files.*layer-000"):
        catalogue([tmp_path])
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "layer-001.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptArtifact, match=r"layer-001\.safetensors: 5 bytes"):
        catalogue([tmp_path])


def test_the_memory_of_a_bounded_cache_is_made_ready_also_after_it_grows(
    artifact: Artifact, opened: ExitStack
) -> None:
    store = whole(artifact, opened, cache_bytes=8 * size_of(artifact))
    until(lambda: store.figures().populated_bytes == 8 * size_of(artifact))
    store.resize(20 * size_of(artifact))
    until(lambda: store.figures().populated_bytes == 20 * size_of(artifact))
    assert take(store, LAYER, range(16)) == expected(artifact, LAYER, range(16))


def test_what_holds_everything_is_not_touched_before_it_is_read(
    artifact: Artifact, opened: ExitStack
) -> None:
    store = whole(artifact, opened)
    take(store, LAYER, [0])
    assert store.figures().populated_bytes == 0
