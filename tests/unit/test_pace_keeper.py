"""From drives and a reader's figures to a store's pace: the shell of the pacing core."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from expert_node import pace_keeper
from expert_node.pace_keeper import PaceKeeper
from shoal.experts.drive_sensors import Temperature
from shoal.experts.options import Backend
from shoal.experts.pacing import PacingState
from shoal.experts.readers import LATENCY_BOUNDS_S, ReaderFigures
from shoal.experts.store import StoreFigures

BUCKETS = len(LATENCY_BOUNDS_S) + 1
READER = ReaderFigures(
    *(Backend.PREAD, "", 0, 0, 0, 0, 0, 0, 0, 0, 16, 6, None, 0, 0, 0, False, 0),
    *((0,) * BUCKETS, 0.0, (), 0.0, {}),
)
STORE = StoreFigures(0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, (), READER)


@dataclass
class Drive:
    """A store and a sensor whose figures the test sets."""

    celsius: float | None = None
    reader: ReaderFigures = READER
    paces: list[tuple[int | None, float | None, bool]] = field(default_factory=list)
    now_s: float = 0.0
    drives: tuple[str, ...] = ("nvme0n1",)

    def figures(self) -> StoreFigures:
        return replace(STORE, reader=self.reader)

    def set_pace(
        self, queue_depth: int | None, bytes_per_s: float | None, *, allows_prefetch: bool
    ) -> None:
        self.paces.append((queue_depth, bytes_per_s, allows_prefetch))

    def read(self) -> list[Temperature]:
        return [] if self.celsius is None else [Temperature("nvme0n1", self.celsius, 80.0)]

    def reads(self, num: int, bucket: int) -> None:
        counts = list(self.reader.chunk_latency)
        counts[bucket] += num
        self.reader = replace(
            self.reader,
            num_bytes=self.reader.num_bytes + (num << 18),
            chunk_latency=tuple(counts),
        )

    def keeper(self, max_bytes_per_s: int | None = None) -> PaceKeeper:
        return PaceKeeper(self, self, 70.0, max_bytes_per_s, lambda: self.now_s)  # type: ignore[arg-type]

    def after(self, keeper: PaceKeeper, seconds: float = 1.0) -> None:
        self.now_s += seconds
        keeper.sample()


def test_a_bandwidth_limit_holds_from_the_start() -> None:
    drive = Drive()
    drive.keeper(max_bytes_per_s=5_000_000)
    assert drive.paces == [(None, 5_000_000, True)]


def test_a_hot_drive_slows_the_store_and_a_cool_one_frees_it() -> None:
    drive = Drive(celsius=40)
    keeper = drive.keeper()
    drive.after(keeper)
    assert drive.paces == [(None, None, True)], "nothing is said twice"
    first = drive.paces.pop()
    drive.celsius = 75
    drive.after(keeper)
    assert drive.paces[-1] == (8, None, True)
    drive.celsius = 95
    drive.after(keeper)
    assert drive.paces[-1] == (1, None, False)
    assert keeper.view.pace.state is PacingState.HOT
    assert keeper.view.temperatures[0].celsius == 95
    drive.celsius = 40
    drive.after(keeper)
    assert drive.paces[-1] == first


def test_slow_reads_slow_the_store() -> None:
    drive = Drive()
    keeper = drive.keeper()
    for _ in range(20):
        drive.reads(100, bucket=4)
        drive.after(keeper)
    assert drive.paces == [(None, None, True)]
    for _ in range(12):
        drive.reads(100, bucket=9)
        drive.after(keeper)
    assert keeper.view.pace.state is PacingState.SLOW
    assert drive.paces[-1] == (None, None, False)


def test_other_limits_are_taken_while_it_runs() -> None:
    drive = Drive(celsius=75)
    keeper = drive.keeper()
    drive.after(keeper)
    assert drive.paces[-1][0] == 8
    keeper.configure(90.0, 3_000_000)
    assert drive.paces[-1] == (None, 3_000_000, True)


def test_a_reader_that_is_new_is_not_compared_with_the_one_before() -> None:
    drive = Drive()
    keeper = drive.keeper()
    drive.reads(100, bucket=4)
    drive.after(keeper)
    drive.reader = READER
    drive.after(keeper)
    assert keeper.view.pace.state is PacingState.FULL


def test_a_closed_keeper_leaves_the_store_alone() -> None:
    drive = Drive(celsius=75)
    keeper = drive.keeper()
    keeper.close()
    drive.after(keeper)
    assert len(drive.paces) == 1


@pytest.mark.parametrize("folder", [Path("/nowhere")])
def test_without_sensors_there_is_no_temperature(folder: Path) -> None:
    from shoal.experts.drive_sensors import DriveSensors

    drive = Drive()
    keeper = PaceKeeper(drive, DriveSensors([folder], folder), 70.0, None, lambda: drive.now_s)
    drive.after(keeper)
    assert keeper.view.temperatures == () and keeper.view.pace.state is PacingState.FULL


def test_buffers_that_ran_out_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = Drive()
    keeper = drive.keeper()
    with capture_logs() as told:
        monkeypatch.setattr(pace_keeper, "_log", structlog.get_logger())
        drive.after(keeper)
        assert told == []
        for _ in range(3):
            drive.reader = replace(drive.reader, num_unbounced=drive.reader.num_unbounced + 1)
            drive.after(keeper)
    assert [(each["log_level"], each["chunks"]) for each in told] == [("warning", 1)]
