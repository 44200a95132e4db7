"""The executor on a tiny artifact: exact sums, in one wave or many; what is wrong is refused."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from shoal import ops
from shoal.artifact import Artifact
from shoal.errors import MalformedMessage, NumericError
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.experts.ownership import Ownership
from shoal.experts.prefetch.interface import PrefetchFigures
from shoal.experts.store import Wave
from shoal.quant import Scheme
from shoal.rows import Rows
from support.tiny_model import make_tiny_artifact
from support.whole_store import WholeAcquisition, WholeStore, whole_executor

LAYER = 1


@pytest.fixture(scope="module", params=["f32", "q8_0"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("model")
    return Artifact.open(make_tiny_artifact(folder, quant=request.param))


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
    executor = whole_executor(artifact)
    executor.check(call)
    assert (executor.compute(call) == expected).all()


def test_halves_of_the_experts_add_up_to_the_whole(artifact: Artifact) -> None:
    call = random_call(artifact, 9)
    whole = whole_executor(artifact).compute(call)
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
        executor = whole_executor(artifact, Ownership(owned))
        total[rows] += executor.compute(part)
    assert (total == whole).all()


def test_a_call_that_does_not_fit_the_model_is_refused(artifact: Artifact) -> None:
    executor = whole_executor(artifact)
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
    executor = whole_executor(artifact)
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
        whole_executor(artifact).compute(call)
    assert caught.value.rows == (2,)


class InWaves(WholeStore):
    """Gives out an expert a wave, in an order of its own."""

    def acquire(self, layer: int, experts: Sequence[int]) -> WholeAcquisition:
        [wave] = super().acquire(layer, experts)
        order = np.random.default_rng(0).permutation(len(experts)).tolist()
        return Waves([Wave([position], [wave.weights[position]]) for position in order])


class Waves(WholeAcquisition):
    def __init__(self, waves: list[Wave]) -> None:
        super().__init__(waves[0])
        self._waves = waves

    def __iter__(self) -> Iterator[Wave]:
        return iter(self._waves)


@pytest.mark.parametrize("num_rows", [1, 19])
def test_waves_in_any_order_give_the_sums_of_one(artifact: Artifact, num_rows: int) -> None:
    call = random_call(artifact, num_rows)
    whole = whole_executor(artifact).compute(call)
    assert (ExpertExecutor(artifact, InWaves(artifact)).compute(call) == whole).all()


def test_bad_rows_of_all_waves_are_named_together(artifact: Artifact) -> None:
    call = random_call(artifact, 6)
    for row in (1, 4):
        call.weights[call.row_offsets[row + 1] - 1] = np.inf
    for store in (WholeStore(artifact), InWaves(artifact)):
        with pytest.raises(NumericError, match=f"layer {LAYER}.* row 1, 4") as caught:
            ExpertExecutor(artifact, store).compute(call)
        assert caught.value.rows == (1, 4)


class Diary:
    """A prefetcher that writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[object, ...]] = []

    def on_call(
        self, call: ExpertCall, experts: Sequence[int], now_s: float, stream: int = 0
    ) -> None:
        self.lines.append(("call", call.layer, list(experts), stream))

    def on_loaded(self, layer: int, now_s: float, stream: int = 0) -> None:
        self.lines.append(("loaded", layer, stream))

    def on_done(self, layer: int, load_s: float, now_s: float, stream: int = 0) -> None:
        self.lines.append(("done", layer, load_s, stream))

    def on_hint(self, layer: int, experts: Sequence[int], now_s: float, stream: int = 0) -> None:
        self.lines.append(("hint", layer, list(experts), stream))

    def figures(self) -> PrefetchFigures:
        raise NotImplementedError

    def close(self) -> None: ...


@pytest.mark.parametrize("kind", [WholeStore, InWaves])
def test_a_prefetcher_learns_of_a_call_its_last_wave_and_its_end(
    artifact: Artifact, kind: type[WholeStore]
) -> None:
    diary = Diary()
    executor = ExpertExecutor(artifact, kind(artifact), prefetcher=diary)
    call = random_call(artifact, 3)
    executor.open(call, stream=7).compute()
    experts = np.unique(call.experts).tolist()
    assert diary.lines == [
        ("call", LAYER, experts, 7),
        ("loaded", LAYER, 7),
        ("done", LAYER, 0.0, 7),
    ]
