"""Pacing: what a drive's temperature and latency make of the queue, without a drive or a clock."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.experts.pacing import (
    FORGET_S,
    HOT_SHARE,
    HYSTERESIS_C,
    PATIENCE_S,
    Pace,
    Pacer,
    PacingLimits,
    PacingState,
    Sample,
    quantile,
)

LIMITS = PacingLimits(thermal_limit_c=70, max_queue_depth=32)
READS = 100


class Drive:
    """Feeds a pacer one sample a second."""

    def __init__(self, limits: PacingLimits = LIMITS) -> None:
        self.pacer = Pacer(limits)
        self.now_s = 0.0

    def at(self, celsius: float | None, num_bytes: int = 0, warning_c: float | None = None) -> Pace:
        self.now_s += 1
        return self.pacer.on_sample(Sample(self.now_s, celsius, warning_c, num_bytes=num_bytes))

    def reads(self, p99_s: float, seconds: float = 1, num: int = READS) -> Pace:
        paces = []
        for _ in range(int(seconds)):
            self.now_s += 1
            sample = Sample(self.now_s, None, None, num, num << 18, p99_s)
            paces.append(self.pacer.on_sample(sample))
        self.pacer.check_integrity()
        return paces[-1]


def test_a_cool_drive_is_read_at_full_depth() -> None:
    drive = Drive()
    assert drive.at(45) == Pace(PacingState.FULL, 32, None, True)
    assert drive.at(70).state is PacingState.FULL


def test_a_warm_drive_gets_less_depth_the_warmer_it_is() -> None:
    drive = Drive()
    depths = [drive.at(celsius).queue_depth for celsius in (70, 72, 75, 78, 79)]
    assert depths == [32, 25, 16, 6, 3]
    assert drive.at(75).state is PacingState.WARM
    assert drive.at(75).allows_prefetch


def test_a_hot_drive_serves_demand_only_one_chunk_at_a_time() -> None:
    drive = Drive()
    drive.at(40, num_bytes=1_000_000_000)  # the best bandwidth that was seen
    drive.at(40, num_bytes=1_000_000_000)
    pace = drive.at(85)
    assert (pace.state, pace.queue_depth, pace.allows_prefetch) == (PacingState.HOT, 1, False)
    assert pace.bytes_per_s == int(1_000_000_000 * HOT_SHARE)
    assert "85 C is above 70 C" in pace.why


def test_the_drives_own_warning_comes_before_the_end_of_the_span() -> None:
    assert Drive().at(76, warning_c=75).state is PacingState.HOT
    assert Drive().at(71, warning_c=60).state is PacingState.HOT
    assert Drive().at(76, warning_c=95).state is PacingState.WARM


def test_a_reading_that_trembles_changes_nothing() -> None:
    drive = Drive()
    pace = drive.at(75)
    for celsius in (74.9, 73.5, 72.1, 74.0, 75.0):
        assert drive.at(celsius) == pace
    assert drive.at(75 - HYSTERESIS_C - 1).queue_depth > pace.queue_depth


def test_a_drive_that_has_cooled_is_read_at_full_depth_again() -> None:
    drive = Drive()
    drive.at(90)
    assert drive.at(69).state is PacingState.WARM, "not before it is the hysteresis below"
    assert drive.at(70 - HYSTERESIS_C) == Pace(PacingState.FULL, 32, None, True)


def test_a_sensor_that_stops_answering_is_believed_for_a_while_and_no_longer() -> None:
    drive = Drive()
    drive.at(85)
    assert [drive.at(None).state for _ in range(10)] == [PacingState.HOT] * 10
    assert drive.at(None).state is PacingState.FULL


def test_another_limit_holds_from_the_next_sample_on() -> None:
    drive = Drive()
    assert drive.at(75).state is PacingState.WARM
    drive.pacer.configure(PacingLimits(80, 8, max_bytes_per_s=5_000_000))
    assert drive.at(75) == Pace(PacingState.FULL, 8, 5_000_000, True)


def test_slow_reads_cost_first_the_prefetch_then_half_the_depth() -> None:
    drive = Drive()
    assert drive.reads(0.004, seconds=20).state is PacingState.FULL
    assert drive.reads(0.013, seconds=PATIENCE_S).state is PacingState.FULL
    first = drive.reads(0.013)
    assert (first.state, first.queue_depth, first.allows_prefetch) == (PacingState.SLOW, 32, False)
    assert drive.reads(0.013, seconds=PATIENCE_S + 1).queue_depth == 16
    assert drive.reads(0.013, seconds=PATIENCE_S + 1).queue_depth == 8
    assert drive.reads(0.013, seconds=PATIENCE_S + 1).queue_depth == 8


def test_reads_that_are_quick_again_give_everything_back_step_by_step() -> None:
    drive = Drive()
    drive.reads(0.004, seconds=20)
    drive.reads(0.02, seconds=40)
    depths = [drive.reads(0.004, seconds=PATIENCE_S + 1) for _ in range(3)]
    assert [pace.queue_depth for pace in depths] == [16, 32, 32]
    assert [pace.allows_prefetch for pace in depths] == [False, False, True]


def test_between_slow_and_calm_nothing_changes() -> None:
    drive = Drive()
    drive.reads(0.004, seconds=20)
    drive.reads(0.013, seconds=PATIENCE_S + 1)
    assert drive.reads(0.010, seconds=60).allows_prefetch is False


def test_a_longer_queue_alone_is_no_slowness() -> None:
    drive = Drive()
    drive.reads(0.001, seconds=20)
    assert drive.reads(0.016, seconds=30, num=8 * READS).state is PacingState.FULL


def test_the_same_load_or_less_excuses_nothing() -> None:
    for num in (READS, READS // 4):
        drive = Drive()
        drive.reads(0.001, seconds=20)
        assert drive.reads(0.004, seconds=PATIENCE_S + 1, num=num).state is PacingState.SLOW


def test_what_stays_slow_becomes_normal() -> None:
    drive = Drive()
    drive.reads(0.004, seconds=20)
    drive.reads(0.020, seconds=3 * PATIENCE_S + 3 + FORGET_S)
    assert drive.reads(0.020, seconds=60).state is PacingState.FULL


def test_a_few_reads_say_nothing() -> None:
    drive = Drive()
    drive.reads(0.004, seconds=20)
    assert drive.reads(1.0, seconds=60, num=3).state is PacingState.FULL


def test_heat_and_slowness_together_take_the_smaller_depth() -> None:
    drive = Drive()
    drive.reads(0.004, seconds=20)
    drive.reads(0.020, seconds=2 * PATIENCE_S + 3)
    pace = drive.at(72)
    assert (pace.state, pace.queue_depth) == (PacingState.WARM, 16)
    assert "times as long" in pace.why and "72 C" in pace.why


@given(
    st.lists(
        st.tuples(
            st.none() | st.floats(-40, 150),
            st.none() | st.floats(0, 120),
            st.integers(0, 1000),
            st.floats(0, 2),
            st.floats(0, 30),
        ),
        max_size=60,
    )
)
@example([(None, None, 0, 0.0, 0.0), (None, None, 16, 1.0, 1e-308), (None, None, 16, 1.0, 1.0)])
def test_whatever_comes_a_read_can_always_be_made(
    seen: list[tuple[float | None, float | None, int, float, float]],
) -> None:
    pacer = Pacer(PacingLimits(70, 32, 10_000_000))
    now_s = 0.0
    for celsius, warning_c, num_reads, p99_s, elapsed_s in seen:
        now_s += elapsed_s
        sample = Sample(now_s, celsius, warning_c, num_reads, num_reads << 18, p99_s)
        pace = pacer.on_sample(sample)
        pacer.check_integrity()
        assert 1 <= pace.queue_depth <= 32
        assert pace.bytes_per_s is not None and 1 <= pace.bytes_per_s <= 10_000_000
        assert (pace.why == "") == (pace.state is PacingState.FULL)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([0, 0, 0], 0.99, 0.0),
        ([10, 0, 0], 0.5, 0.5),
        ([0, 10, 0], 0.5, 1.5),
        ([5, 5, 0], 0.5, 1.0),
        ([0, 0, 7], 0.99, 2.0),
    ],
)
def test_a_quantile_lies_in_its_bucket(counts: list[int], share: float, expected: float) -> None:
    assert quantile((1.0, 2.0), counts, share) == pytest.approx(expected)
