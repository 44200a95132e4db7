"""Streaming stores for tests: opened on a tiny artifact, their answers compared byte by byte."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from shoal.artifact import Artifact
from shoal.experts.cache import POLICIES
from shoal.experts.catalogue import Catalogue
from shoal.experts.open_store import open_store
from shoal.experts.ownership import Ownership
from shoal.experts.store import StoreOptions
from shoal.experts.streaming import StreamingStore
from support.held_reader import HeldReader

LAYER = 1


def size_of(artifact: Artifact) -> int:
    return artifact.expert_location(LAYER, 0).num_bytes


def whole(artifact: Artifact, opened: ExitStack, **options: Any) -> StreamingStore:
    ownership = Ownership(artifact.owned_experts)
    store = open_store(artifact, ownership, StoreOptions(**options))
    return opened.enter_context(closing(store))


def held(
    artifact: Artifact, opened: ExitStack, places: int | None = None
) -> tuple[StreamingStore, HeldReader]:
    """Return a store whose reads end when the test says so, and its reader."""
    readers: list[HeldReader] = []

    def open_held(paths: Collection[Path]) -> HeldReader:
        readers.append(HeldReader(paths))
        return readers[-1]

    store = StreamingStore(
        artifact,
        Ownership(artifact.owned_experts),
        Catalogue,
        POLICIES["lru"](8),
        open_held,
        cache_bytes=None if places is None else places * size_of(artifact),
    )
    opened.enter_context(closing(store))
    opened.callback(readers[0].let_all_go)
    return store, readers[0]


def take(store: StreamingStore, layer: int, experts: Sequence[int]) -> list[bytes]:
    """Return the bytes of these experts, however many waves they come in."""
    found: dict[int, bytes] = {}
    with store.acquire(layer, experts) as got:
        for wave in got:
            assert list(wave.positions) == sorted(wave.positions)
            found |= {p: w.tobytes() for p, w in zip(wave.positions, wave.weights, strict=True)}
    return [found[position] for position in range(len(experts))]


def expected(artifact: Artifact, layer: int, experts: Sequence[int]) -> list[bytes]:
    used = artifact.expert_layout(layer).num_bytes
    return [artifact.read_expert(layer, index)[:used].tobytes() for index in experts]


def flip(artifact: Artifact, index: int) -> None:
    where = artifact.expert_location(LAYER, index)
    with where.path.open("r+b") as file:
        file.seek(where.offset + 64)
        [byte] = file.read(1)
        file.seek(where.offset + 64)
        file.write(bytes([byte ^ 1]))
