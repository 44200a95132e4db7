"""Heat maps and recorded routing: what calls leave behind, and that files are read strictly."""

import io
from pathlib import Path

import numpy as np
import pytest

from expert_node.heat_keeper import HeatKeeper
from shoal import log
from shoal.errors import CorruptArtifact
from shoal.experts.call import ExpertCall
from shoal.experts.heat import HeatMap, decode_heat, encode_heat, ranked
from shoal.experts.recording import Geometry, Recorder, geometry_of
from shoal.experts.routing_trace import decode_trace, encode_trace
from shoal.log_options import LogFormat, LogLevel
from shoal.quant import Scheme
from shoal.rows import Rows

IDENTITY = "ab" * 32
GEOMETRY = Geometry(IDENTITY, {1: 8, 3: 8}, top_k=2)


def call(layer: int, *rows: tuple[int, ...]) -> ExpertCall:
    experts = np.array([index for row in rows for index in row], np.int32)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    values = np.zeros((len(rows), 4), np.float32)
    nothing = np.zeros((len(rows), 0), np.float32)
    weights = np.ones(experts.size, np.float32)
    return ExpertCall(layer, Rows(Scheme.F32, 4, values, nothing), offsets, experts, weights)


def recorded(*calls: ExpertCall, geometry: Geometry = GEOMETRY) -> Recorder:
    recorder = Recorder(geometry)
    for each in calls:
        recorder.on_call(7, each)
        recorder.check_integrity()
    return recorder


def test_every_row_counts_for_each_of_its_experts() -> None:
    recorder = recorded(call(1, (2, 5)), call(1, (5, 0), (5, 2)), call(3, (7, 6)), call(2, (1, 0)))
    heat = recorder.heat()
    assert heat.counts[1].tolist() == [1, 0, 2, 0, 0, 3, 0, 0]
    assert heat.counts[3].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert (heat.num_rows, recorder.num_calls) == (4, 3), "layer 2 is not this node's"
    assert heat.hottest() == [(1, 5), (1, 2), (1, 0), (3, 6), (3, 7)]


def test_a_heat_map_survives_its_file(tmp_path: Path) -> None:
    heat = recorded(call(1, (2, 5)), call(3, (0, 7))).heat()
    again = decode_heat(encode_heat(heat), "heat.json")
    assert (again.identity, again.num_rows) == (IDENTITY, 2)
    assert encode_heat(again) == encode_heat(heat)


def test_recording_goes_on_from_what_was_recorded_before() -> None:
    before = recorded(*[call(1, (2, 5))] * 5).heat().faded()
    recorder = Recorder(GEOMETRY, before)
    recorder.on_call(1, call(1, (2, 3)))
    assert recorder.heat().counts[1].tolist() == [0, 0, 3, 1, 0, 2, 0, 0]


def test_the_hottest_come_first_and_all_others_in_order() -> None:
    heat = HeatMap(IDENTITY, 1, {1: np.array([0, 3, 9, 9], np.int64)})
    owned = [(0, 0), (0, 1), (1, 1), (1, 3)]
    assert ranked(heat, owned) == [(1, 3), (1, 1), (0, 0), (0, 1)]
    assert ranked(None, owned) == owned


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"shoal-heat-1", b"shoal-heat-9"),
        (IDENTITY.encode(), b"no identity"),
        (b'"rows":2', b'"rows":-2'),
        (b'"rows":2', b'"row":2'),
        (b'"layer":3', b'"layer":1'),
        (b"[0,0,1,", b"[0,0,1.5,"),
        (b'{"counts"', b'["counts"'),
        (b"}", b""),
    ],
)
def test_a_damaged_heat_map_is_refused_by_name(old: bytes, new: bytes) -> None:
    data = encode_heat(recorded(call(1, (2, 5)), call(3, (0, 7))).heat())
    assert old in data
    with pytest.raises(CorruptArtifact, match=r"heat\.json"):
        decode_heat(data.replace(old, new), "heat.json")


def test_passes_become_a_trace_that_bench_reads() -> None:
    recorder = recorded(
        *(call(1, (5, 2), (1, 0)), call(3, (7, 3), (4, 5))),  # a prompt of two tokens
        *(call(1, (6, 1)), call(3, (0, 2))),
    )
    trace = recorder.trace()
    assert trace is not None
    again = decode_trace(encode_trace(trace), "trace")
    assert (again.identity, again.num_experts, again.top_k) == (IDENTITY, 8, 2)
    assert again.moe_layers == (1, 3)
    [segment] = again.segments
    assert segment.experts.tolist() == [
        [[2, 5], [3, 7]],
        [[0, 1], [4, 5]],
        [[1, 6], [0, 2]],
    ]


def test_a_layer_may_come_in_several_calls() -> None:
    recorder = recorded(
        *(call(1, (0, 1)), call(1, (2, 3), (4, 5))),
        *(call(3, (6, 7), (0, 1)), call(3, (2, 3))),
    )
    trace = recorder.trace()
    assert trace is not None
    assert trace.segments[0].experts[:, 1].tolist() == [[6, 7], [0, 1], [2, 3]]


def test_streams_do_not_mix() -> None:
    recorder = Recorder(GEOMETRY)
    for layer in (1, 3):
        for stream_id in (1, 2):
            recorder.on_call(stream_id, call(layer, (stream_id, stream_id + layer)))
    trace = recorder.trace()
    assert trace is not None
    assert [s.experts.tolist() for s in trace.segments] == [
        [[[1, 2], [1, 4]]],
        [[[2, 3], [2, 5]]],
    ]


@pytest.mark.parametrize(
    "broken",
    [
        [call(3, (0, 1))],  # no first layer
        [call(1, (0, 1)), call(3, (0, 1), (2, 3))],  # more rows than there are
        [call(1, (0, 1), (2, 3)), call(3, (0, 1))],  # fewer
        [call(1, (0, 1)), call(3, (0,))],  # not the whole row
    ],
)
def test_what_does_not_fit_together_is_left_out_and_the_next_pass_is_not(
    broken: list[ExpertCall],
) -> None:
    recorder = recorded(*broken, call(1, (0, 1)), call(3, (2, 3)), call(1, (0, 2)), call(3, (2, 4)))
    trace = recorder.trace()
    assert trace is not None
    assert trace.segments[0].experts[-1].tolist() == [[0, 2], [2, 4]]
    assert trace.segments[0].experts.shape[0] <= 2
    assert recorder.heat().num_rows > 4, "heat counts them all the same"


def test_a_pass_that_is_not_over_is_no_part_of_the_trace() -> None:
    recorder = recorded(call(1, (0, 1)))
    assert recorder.trace() is None
    recorder.on_stream_end(7)
    assert recorder.trace() is None and recorder.num_dropped == 1


def test_the_oldest_segments_go_when_memory_is_full() -> None:
    recorder = Recorder(GEOMETRY, max_bytes=10 * 8)  # ten rows of two layers, two experts
    for stream_id in range(6):
        for _ in range(3):
            recorder.on_call(stream_id, call(1, (0, 1)))
            recorder.on_call(stream_id, call(3, (2, 3)))
            recorder.check_integrity()
        recorder.on_stream_end(stream_id)
        recorder.check_integrity()
    trace = recorder.trace()
    assert trace is not None
    assert [segment.name for segment in trace.segments] == ["4-3", "5-4", "6-5"]


def test_a_node_with_a_part_of_a_layer_records_heat_alone() -> None:
    experts = {0: 4, 1: 4}
    assert geometry_of(IDENTITY, experts, 2, {0: range(4), 1: range(4)}).top_k == 2
    assert geometry_of(IDENTITY, experts, 2, {1: range(4)}) == Geometry(IDENTITY, {1: 4}, 2)
    part = geometry_of(IDENTITY, experts, 2, {0: range(4), 1: range(3)})
    recorder = recorded(call(0, (1,)), call(1, (0, 1)), geometry=part)
    assert recorder.trace() is None
    assert recorder.heat().num_rows == 2


def test_memory_is_bounded_however_many_streams_are_open() -> None:
    recorder = Recorder(GEOMETRY, max_bytes=10 * 8)
    for stream_id in range(30):
        recorder.on_call(stream_id, call(1, (0, 1)))
        recorder.on_call(stream_id, call(3, (2, 3)))
        recorder.check_integrity()
    trace = recorder.trace()
    assert trace is not None and len(trace.segments) == 10


def test_rows_that_a_trace_lacks_are_told_also_after_a_reload(tmp_path: Path) -> None:
    keeper = HeatKeeper(GEOMETRY, tmp_path / "heat.json")
    keeper.on_call(7, 2, lambda: call(1, (2, 5), (2, 6)))
    keeper.on_stream_end(7)
    dropped = keeper.figures().num_dropped
    assert dropped == 2, "a pass that stopped in the middle"
    other = Geometry(IDENTITY, {1: 8}, top_k=2)
    keeper.rebind(keeper.prepare(other, tmp_path / "heat.json"))
    assert keeper.figures().num_dropped == dropped


def test_who_records_heat_alone_is_told_and_where_traces_come_from(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: log.configure(LogFormat.CONSOLE, LogLevel.INFO))
    stream = io.StringIO()
    log.configure(LogFormat.JSON, LogLevel.INFO, stream)
    HeatKeeper(GEOMETRY, tmp_path / "whole.json")
    assert not stream.getvalue()
    HeatKeeper(Geometry(IDENTITY, {1: 8}, top_k=None), tmp_path / "part.json")
    assert "shoal run --record-routing" in stream.getvalue()
