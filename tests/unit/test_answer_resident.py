"""From the bytes of a call to those of its reply in one step: what the long way would have said."""

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from shoal import ops, wire
from shoal.artifact import Artifact
from shoal.errors import NumericError
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.experts.ownership import Ownership
from shoal.experts.streaming import StreamingStore
from shoal.ops.frames import CallView
from shoal.quant import Scheme
from shoal.transport import Wire
from shoal.v1 import expert_pb2 as pb
from support.stores import LAYER, take, whole
from support.streaming import call_of
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor

MANY = 1 << 40  # bytes of weights


@pytest.fixture(scope="module", params=["q8_0", "f32", "q4_k"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("model")
    return Artifact.open(make_tiny_artifact(folder, quant=request.param))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def store(artifact: Artifact, opened: ExitStack) -> StreamingStore:
    """One whose layer LAYER is in memory whole."""
    store = whole(artifact, opened)
    for _ in range(2):
        take(store, LAYER, range(16))
    assert list(store.tables) == [LAYER]
    return store


@pytest.fixture
def executor(artifact: Artifact, store: StreamingStore) -> ExpertExecutor:
    return ExpertExecutor(artifact, store)


def rows_of(call: ExpertCall, num_rows: int) -> ExpertCall:
    """The same row so many times, each with one expert more than the one before."""
    rows = call.rows.take(np.zeros(num_rows, np.intp))
    experts = [np.roll(call.experts, row)[: row + 1] for row in range(num_rows)]
    offsets = np.cumsum([0, *map(len, experts)]).astype(np.int32)
    weights = np.linspace(-1, 2, offsets[-1], dtype=np.float32)
    return ExpertCall(LAYER, rows, offsets, np.concatenate(experts), weights)


def view_of(frame: bytes, shift: int = 0) -> CallView:
    view = wire.parse_call(memoryview(bytes(shift) + frame)[shift:])
    assert view is not None
    return view


@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("form", Wire)
def test_the_reply_is_that_of_the_long_way_byte_for_byte(
    artifact: Artifact, executor: ExpertExecutor, num_rows: int, form: Wire
) -> None:
    call = rows_of(call_of(artifact, LAYER, list(range(num_rows, num_rows + 8))), num_rows)
    sums = whole_executor(artifact).compute(call)
    assert sums.any(), "inputs are degenerate"
    for shift in range(4):  # values that are aligned in the frame, and values that are not
        view = view_of(wire.call_frame(2**50, 100, call, form), shift)
        frame = executor.answer_resident(view, MANY, 77)
        assert frame is not None
        took_us = pb.NodeFrame.FromString(frame).reply.compute_us
        assert frame == wire.reply_frame(
            2**50, sums, artifact.grid(LAYER), form, queue_us=77, compute_us=took_us
        )


def test_rows_out_of_range_are_named_as_on_the_long_way(
    artifact: Artifact, executor: ExpertExecutor
) -> None:
    call = rows_of(call_of(artifact, LAYER, list(range(8))), 3)
    weights = call.weights.copy()
    weights[[0, 4]] = np.inf
    bad = ExpertCall(LAYER, call.rows, call.row_offsets, call.experts, weights)
    with pytest.raises(NumericError) as expected:
        whole_executor(artifact).compute(bad)
    with pytest.raises(NumericError) as caught:
        executor.answer_resident(view_of(wire.call_frame(1, 100, bad)), MANY, 0)
    assert caught.value.rows == expected.value.rows == (0, 2)
    assert str(caught.value) == str(expected.value)


def other_shapes(artifact: Artifact) -> Iterator[ExpertCall]:
    call = call_of(artifact, LAYER, [3, 1])
    pairs = call.row_offsets, call.experts, call.weights
    yield ExpertCall(1 - LAYER, call.rows, *pairs)
    yield ExpertCall(LAYER, call.rows, pairs[0], np.array([3, 16], np.int32), pairs[2])
    for scheme in Scheme:
        for dim in (256, 512):
            if (scheme, dim) != (call.rows.scheme, call.rows.dim):
                rows = ops.quantise_rows(scheme, np.ones((1, dim), np.float32))
                yield ExpertCall(LAYER, rows, *pairs)


def test_what_the_layer_in_memory_is_not_for_goes_the_long_way(
    artifact: Artifact, store: StreamingStore, executor: ExpertExecutor
) -> None:
    hits = store.figures().hits
    for call in other_shapes(artifact):
        assert executor.answer_resident(view_of(wire.call_frame(1, 100, call)), MANY, 0) is None
    call = call_of(artifact, LAYER, [3, 1])
    view, num_bytes = view_of(wire.call_frame(1, 100, call)), executor.pair_bytes(call)
    assert executor.answer_resident(view, num_bytes - 1, 0) is None
    assert store.figures().hits == hits
    assert executor.answer_resident(view, num_bytes, 0) is not None
    assert store.figures().hits == hits + 2


def test_an_expert_that_is_not_owned_is_left_to_the_check_that_names_it(
    artifact: Artifact, store: StreamingStore, executor: ExpertExecutor
) -> None:
    store.rebind(artifact, Ownership({LAYER: [0, 1, 2]}))
    for _ in range(2):
        take(store, LAYER, [0, 1, 2])
    assert list(store.tables) == [LAYER]
    for experts, is_owned in (([2, 0], True), ([2, 3], False)):
        frame = wire.call_frame(1, 100, call_of(artifact, LAYER, experts))
        assert (executor.answer_resident(view_of(frame), MANY, 0) is not None) == is_owned


def test_a_table_that_was_withdrawn_answers_nothing(
    artifact: Artifact, store: StreamingStore, executor: ExpertExecutor
) -> None:
    table = store.tables[LAYER]
    view = view_of(wire.call_frame(1, 100, call_of(artifact, LAYER, [3, 1])))
    assert table.answer(view, artifact.grid(LAYER), MANY, 0) is not None
    store.rebind(artifact, store.ownership)
    assert LAYER not in store.tables
    assert table.answer(view, artifact.grid(LAYER), MANY, 0) is None
    assert executor.answer_resident(view, MANY, 0) is None
