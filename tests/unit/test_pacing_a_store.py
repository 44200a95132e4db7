"""Drives, keeper and a real streaming store together: what is sensed is how the store reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from expert_node.pace_keeper import PaceKeeper
from shoal.artifact import Artifact
from shoal.experts.drive_sensors import DriveSensors
from shoal.experts.options import Backend
from shoal.experts.pacing import PacingState
from shoal.experts.readers import ReaderFigures
from shoal.experts.store import ExpertStore
from support.streaming import expert_bytes, streaming_store
from support.sysfs import FakeDrive
from support.tiny_model import make_tiny_artifact

LAYER = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("model"), "qwen3_moe", "q8_0")


@pytest.fixture(params=[Backend.IO_URING, Backend.PREAD])
def store(request: pytest.FixtureRequest, model: Path) -> Iterator[ExpertStore]:
    with streaming_store(model, 8, backend=request.param) as store:
        yield store


def reader_of(store: ExpertStore) -> ReaderFigures:
    reader = store.figures().reader
    assert reader is not None
    return reader


def test_a_bandwidth_limit_holds_reads_back_until_it_is_lifted(
    store: ExpertStore, model: Path, tmp_path: Path
) -> None:
    """A byte a second: one read begins, and in debt for hours, no other; then there is no limit."""
    keeper = PaceKeeper(store, DriveSensors([], tmp_path), 70.0, 1)
    with store.acquire(LAYER, [3, 5, 7]) as got:
        waves = iter(got)
        assert len(next(waves).positions) == 1
        read = reader_of(store)
        assert read.bytes_per_s == 1 and read.num_bytes == expert_bytes(Artifact.open(model))
        keeper.configure(70.0, None)
        assert sum(len(wave.positions) for wave in waves) == 2
    assert reader_of(store).num_bytes == 3 * read.num_bytes


def test_a_hot_drive_is_read_one_chunk_at_a_time_and_never_ahead(
    store: ExpertStore, model: Path, tmp_path: Path
) -> None:
    drive = FakeDrive(tmp_path / "sys", model, 40.0)
    keeper = PaceKeeper(store, DriveSensors([model], drive.root), 70.0, None)
    keeper.sample()
    full = reader_of(store).queue_depth

    def state() -> PacingState:
        return keeper.view.pace.state

    assert full > 1 and state() is PacingState.FULL
    drive.set_celsius(85.0)
    keeper.sample()
    assert state() is PacingState.HOT
    assert keeper.view.temperatures[0].drive == "nvme0n1"
    assert reader_of(store).queue_depth == 1
    assert store.prefetch(LAYER, [9]) == 0
    with store.acquire(LAYER, [3, 5, 7]) as got:
        assert sum(len(wave.positions) for wave in got) == 3, "what is demanded comes all the same"
    drive.set_celsius(40.0)
    keeper.sample()
    assert state() is PacingState.FULL
    assert reader_of(store).queue_depth == full
    assert store.prefetch(LAYER, [9]) == 1
