"""Resident store and executor on a tiny artifact: single reads, strict ownership, exact sums."""

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from expert_node.lifecycle import StopSignal, WarmUpStopped, warm_up
from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.reader import read_checked
from shoal.errors import CorruptArtifact, MalformedMessage, NotOwned, NumericError
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.experts.ownership import Ownership
from shoal.experts.resident import ResidentStore, WarmUpProgress
from shoal.quant import Scheme
from shoal.rows import Rows
from support.tiny_model import make_tiny_artifact

LAYER = 1


@pytest.fixture(scope="module", params=["f32", "q8_0"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("model")
    return Artifact.open(make_tiny_artifact(folder, quant=request.param))


def whole_store(artifact: Artifact) -> ResidentStore:
    return ResidentStore(artifact, Ownership(artifact.owned_experts))


def random_call(artifact: Artifact, num_rows: int, seed: int = 0) -> ExpertCall:
    router = artifact.spec.layers[LAYER].router
    assert router is not None
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, router.num_experts + 1, num_rows)
    chosen = [rng.permutation(router.num_experts)[:count] for count in counts]
    x = rng.normal(size=(num_rows, artifact.spec.model_dim)).astype(np.float32)
    return ExpertCall(
        LAYER,
        ops.quantise_rows(artifact.scheme(LAYER), x),
        np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        np.concatenate(chosen).astype(np.int32),
        rng.random(int(counts.sum())).astype(np.float32),
    )


@pytest.mark.parametrize("num_rows", [1, 2, 19])
def test_sums_are_each_rows_weighted_outputs_rounded_and_added(
    artifact: Artifact, num_rows: int
) -> None:
    # Oracle: one expert and one row at a time, the rounding in Python integers.
    call = random_call(artifact, num_rows)
    layout, grid = artifact.expert_layout(LAYER), artifact.grid(LAYER)
    expected = np.zeros((num_rows, artifact.spec.model_dim), np.int64)
    for row in range(num_rows):
        rows = call.rows.take(np.array([row]))
        for pair in range(call.row_offsets[row], call.row_offsets[row + 1]):
            weights = artifact.read_expert(LAYER, int(call.experts[pair]))[: layout.num_bytes]
            y = ops.expert_ffn(layout, weights, rows)[0]
            product = call.weights[pair] * y  # float32, as in the kernel
            expected[row] += np.rint(product.astype(np.float64) * 2.0**grid).astype(np.int64)
    assert np.unique(expected).size > expected.size // 2, "sums are degenerate"
    executor = ExpertExecutor(artifact, whole_store(artifact))
    executor.check(call)
    assert (executor.compute(call) == expected).all()


def test_halves_of_the_experts_add_up_to_the_whole(artifact: Artifact) -> None:
    call = random_call(artifact, 9)
    whole = ExpertExecutor(artifact, whole_store(artifact)).compute(call)
    total = np.zeros_like(whole)
    for parity in (0, 1):
        mine = call.experts % 2 == parity
        row_of_pair = np.repeat(np.arange(9), np.diff(call.row_offsets))
        counts = np.bincount(row_of_pair[mine], minlength=9)
        rows = np.flatnonzero(counts)
        part = ExpertCall(
            LAYER,
            call.rows.take(rows),
            np.concatenate(([0], np.cumsum(counts[rows]))).astype(np.int32),
            call.experts[mine],
            call.weights[mine],
        )
        owned = {LAYER: [e for e in artifact.owned_experts[LAYER] if e % 2 == parity]}
        executor = ExpertExecutor(artifact, ResidentStore(artifact, Ownership(owned)))
        total[rows] += executor.compute(part)
    assert (total == whole).all()


def test_concurrent_demands_for_one_expert_are_one_read(artifact: Artifact) -> None:
    """1. eight threads want the same experts in different orders; 2. each is read once."""
    reads: Counter[int] = Counter()
    everybody_asked = threading.Barrier(8)

    def counted(path: Path, offset: int, out: np.ndarray, blake3: str, what: str) -> None:
        reads[offset] += 1
        read_checked(path, offset, out, blake3, what)

    store = ResidentStore(artifact, Ownership(artifact.owned_experts), read=counted)
    experts = list(artifact.owned_experts[LAYER])

    def demand(rotation: int) -> list[bytes]:
        everybody_asked.wait()
        order = experts[rotation:] + experts[:rotation]
        with store.acquire(LAYER, order) as lease:
            [wave] = lease
            by_expert = dict(zip(order, wave.weights, strict=True))
            return [by_expert[expert].tobytes() for expert in experts]

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(demand, range(8)))
    size = artifact.expert_layout(LAYER).num_bytes
    expected = [artifact.read_expert(LAYER, expert)[:size].tobytes() for expert in experts]
    assert answers == [expected] * 8
    assert set(reads.values()) == {1}
    assert store.is_resident(LAYER, experts)


def test_an_expert_is_not_resident_before_its_first_use(artifact: Artifact) -> None:
    store = whole_store(artifact)
    assert not store.is_resident(LAYER, [0])
    with store.acquire(LAYER, [0]) as lease:
        assert lease.load_s > 0
    with store.acquire(LAYER, [0]) as lease:
        assert lease.load_s == 0
    assert store.is_resident(LAYER, [0])
    assert not store.is_resident(LAYER, [0, 1])


def test_weights_lie_aligned_where_the_kernels_want_them(artifact: Artifact) -> None:
    with whole_store(artifact).acquire(LAYER, artifact.owned_experts[LAYER]) as lease:
        assert all(weights.ctypes.data % 4096 == 0 for wave in lease for weights in wave.weights)


def test_warm_up_reads_all_and_reports_each(artifact: Artifact) -> None:
    store = whole_store(artifact)
    reports: list[WarmUpProgress] = []
    store.warm_up(reports.append)
    assert [report.num_experts for report in reports] == list(range(1, len(reports) + 1))
    assert reports[-1].num_experts == store.ownership.num_experts == reports[-1].total_experts
    assert reports[-1].num_bytes == store.num_bytes
    for layer in store.ownership.layers:
        assert store.is_resident(layer, store.ownership.experts(layer))


def test_a_warm_up_can_be_stopped_between_experts(artifact: Artifact) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: WarmUpProgress) -> None:
        raise Stopped

    store = whole_store(artifact)
    with pytest.raises(Stopped):
        store.warm_up(stop)
    with store.acquire(LAYER, [0]):
        pass


def test_what_is_not_owned_is_an_error_and_never_zeros(artifact: Artifact) -> None:
    store = ResidentStore(artifact, Ownership({LAYER: [0, 1]}))
    with pytest.raises(NotOwned, match=f"expert 2 of layer {LAYER} .*experts 0-1"):
        store.acquire(LAYER, [0, 2])
    with pytest.raises(NotOwned, match="layer 0"):
        store.acquire(0, [0])
    assert not store.is_resident(0, [0])


def test_a_damaged_expert_is_never_given_out_and_is_tried_again(tmp_path: Path) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, quant="q8_0"))
    where = artifact.expert_location(LAYER, 1)

    def flip() -> None:
        with where.path.open("r+b") as file:
            file.seek(where.offset + 64)
            [byte] = file.read(1)
            file.seek(where.offset + 64)
            file.write(bytes([byte ^ 1]))

    flip()
    store = whole_store(artifact)
    for _ in range(2):
        with pytest.raises(CorruptArtifact, match=f"expert 1 of layer {LAYER}"):
            store.acquire(LAYER, [0, 1])
    assert store.is_resident(LAYER, [0])
    assert not store.is_resident(LAYER, [1])
    flip()
    with store.acquire(LAYER, [0, 1]) as lease:
        [wave] = lease
        assert wave.weights[1].any()


def test_a_call_that_does_not_fit_the_model_is_refused(artifact: Artifact) -> None:
    executor = ExpertExecutor(artifact, whole_store(artifact))
    call = random_call(artifact, 1)
    wrong = Rows(call.rows.scheme, 32, call.rows.values[:, :32].copy(), call.rows.scales[:, :1])
    spoiled = (
        (ExpertCall(99, call.rows, call.row_offsets, call.experts, call.weights), "layer 99"),
        (ExpertCall(LAYER, wrong, call.row_offsets, call.experts, call.weights), "dim = 32"),
        (
            ExpertCall(LAYER, call.rows, call.row_offsets, call.experts + 500, call.weights),
            "the model|has 0-",
        ),
    )
    for bad, complaint in spoiled:
        with pytest.raises(MalformedMessage, match=complaint):
            executor.check(bad)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["row", "weight"])
def test_what_is_not_finite_fails_its_row_and_no_other(
    artifact: Artifact, field: str, bad: float
) -> None:
    # The wire lets every float through: this is where it is caught, at every place of a row.
    call = random_call(artifact, 4)
    floats = call.rows.values if call.rows.scheme is Scheme.F32 else call.rows.scales
    executor = ExpertExecutor(artifact, whole_store(artifact))
    first, last = call.row_offsets[2], call.row_offsets[3]
    places = range(floats.shape[1]) if field == "row" else range(first, last)
    for place in places:
        target = floats[2:3, place] if field == "row" else call.weights[place : place + 1]
        kept = target.copy()
        target[:] = bad
        with pytest.raises(NumericError, match=f"layer {LAYER}") as caught:
            executor.compute(call)
        assert caught.value.rows == (2,)
        target[:] = kept
    executor.compute(call)


def test_a_result_beyond_the_grid_names_layer_and_rows(artifact: Artifact) -> None:
    call = random_call(artifact, 4)
    call.weights[call.row_offsets[2]] = 3e38
    with pytest.raises(NumericError, match=f"layer {LAYER}") as caught:
        ExpertExecutor(artifact, whole_store(artifact)).compute(call)
    assert caught.value.rows == (2,)


def test_a_warm_up_ends_early_when_the_node_is_told_to_leave(artifact: Artifact) -> None:
    async def story() -> None:
        stop = StopSignal()
        stop.set("a test")
        with pytest.raises(WarmUpStopped):
            await warm_up(whole_store(artifact), stop)

    asyncio.run(story())
