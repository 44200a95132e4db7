"""The corrected pass on tiny models: what it converges to, what travels when, and how it fails."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation, Cancelled
from coordinator.corrected.corrected_pass import CorrectedPass
from coordinator.corrected.experts import CorrectedExperts
from coordinator.corrected.surrogate import Shadow, expert_bits
from coordinator.dispatch_stats import DispatchStats
from coordinator.expert_branch import DispatchedExperts
from coordinator.expert_dispatch import LocalDispatch, PendingSums
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool
from coordinator.sequence import Sequence
from coordinator.transformer import Transformer
from coordinator.weights import load_weights
from shoal import limits
from shoal.artifact import Artifact
from shoal.errors import NodeUnreachable
from shoal.router import RoutingPlan
from shoal.rows import Rows
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor

F32 = NDArray[np.float32]
NUM_LAYERS = 4
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
MORE = [5, 3, 5, 8, 9]


class CountingDispatch:
    """A dispatch that writes down what is started, waited for and taken back.

    fails_in: the layer whose answer is lost; None: no layer.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._inner = LocalDispatch(whole_executor(artifact))
        self.stats = DispatchStats()
        self.log: list[tuple[str, int]] = []
        self.fails_in: int | None = None

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        self.log.append(("start", layer))
        return CountedSums(self, layer, self._inner.start(layer, rows, plan))

    def close(self) -> None:
        self._inner.close()


class CountedSums:
    def __init__(self, dispatch: CountingDispatch, layer: int, inner: PendingSums) -> None:
        self._dispatch, self._layer, self._inner = dispatch, layer, inner

    def wait(self) -> NDArray[np.int64]:
        self._dispatch.log.append(("wait", self._layer))
        if self._layer == self._dispatch.fails_in:
            raise NodeUnreachable("it is gone")
        return self._inner.wait()

    def abandon(self) -> None:
        self._dispatch.log.append(("abandon", self._layer))


class Passes:
    """One prompt, read exactly, and what follows, exactly or corrected."""

    def __init__(self, target: Path, shadow: Path) -> None:
        artifact, coarse = Artifact.open(target), Artifact.open(shadow)
        self.dispatch = CountingDispatch(artifact)
        stand_in = Shadow(coarse, LocalDispatch(whole_executor(coarse)))
        weights = load_weights(artifact)
        self.experts = CorrectedExperts(artifact, self.dispatch, stand_in)
        self.exact = Transformer(artifact.spec, weights, DispatchedExperts(artifact, self.dispatch))
        self.corrected = Transformer(artifact.spec, weights, self.experts)
        self.pool = KvBlockPool(32)
        self.kv = KvArrays(artifact.spec, artifact.kv_dtype, 32)

    def logits(self, num_sweeps: int | None, cancellation: Cancellation | None = None) -> F32:
        """Return the logits of MORE's rows, in one pass after the prompt's; None: exact ones."""
        sequence = Sequence(self.pool)
        sequence.extend(PROMPT + MORE)
        assert sequence.try_reserve(len(PROMPT + MORE))
        try:
            self.exact.forward(
                make_batch([Piece(sequence, len(PROMPT), 0)]), self.kv, Cancellation()
            )
            sequence.advance(len(PROMPT))
            self.dispatch.log.clear()
            batch = make_batch([Piece(sequence, len(MORE), len(MORE))])
            cancellation = cancellation or Cancellation()
            if num_sweeps is None:
                return self.exact.forward(batch, self.kv, cancellation)
            corrected = CorrectedPass(self.corrected, self.experts, num_sweeps)
            return corrected.forward(batch, self.kv, cancellation)
        finally:
            sequence.truncate(0)


@pytest.fixture(scope="module", params=["qwen3_moe", "llama"])
def passes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Passes:
    folder = tmp_path_factory.mktemp("corrected")
    family = request.param
    geometry: dict[str, Any] = {"num_hidden_layers": NUM_LAYERS, "intermediate_size": 512}
    target = make_tiny_artifact(folder, family, "bf16", name="target", **geometry)
    shadow = make_tiny_artifact(folder, family, "q4_0", name="shadow", **geometry)
    return Passes(target, shadow)


def distance(a: F32, b: F32) -> float:
    return float(np.abs(a - b).max())


def test_as_many_sweeps_as_layers_give_the_exact_logits_bit_for_bit(passes: Passes) -> None:
    exact = passes.logits(None)
    assert passes.logits(NUM_LAYERS).tobytes() == exact.tobytes()
    assert passes.logits(NUM_LAYERS - 1).tobytes() != exact.tobytes(), "a blunt test"


def test_a_sweep_comes_nearer_to_the_exact_logits(passes: Passes) -> None:
    exact = passes.logits(None)
    far = [distance(passes.logits(num_sweeps), exact) for num_sweeps in (1, 2, 3)]
    assert far[0] > far[1] > far[2] > 0
    assert far[0] < float(np.abs(exact).max())


def test_a_sweep_sends_every_layers_call_before_it_waits_for_any(passes: Passes) -> None:
    before = passes.experts.num_round_trips
    passes.logits(1)
    starts = [("start", layer) for layer in range(NUM_LAYERS)]
    waits = [("wait", layer) for layer in range(NUM_LAYERS)]
    assert passes.dispatch.log == starts + waits
    assert passes.experts.num_round_trips - before == 1


def test_each_further_sweep_is_one_more_round_trip(passes: Passes) -> None:
    """A layer's next call leaves once its last answer is there, and nobody waits for it."""
    before = passes.experts.num_round_trips
    passes.logits(3)
    log = passes.dispatch.log
    assert [what for what, _ in log].count("start") == 3 * NUM_LAYERS
    per_layer = [[what for what, layer in log if layer == index] for index in range(NUM_LAYERS)]
    assert per_layer == [["start", "wait"] * 3] * NUM_LAYERS
    assert passes.experts.num_round_trips - before == 3


def test_a_lost_answer_fails_the_pass_and_takes_the_other_calls_back(passes: Passes) -> None:
    passes.dispatch.fails_in = 1
    try:
        with pytest.raises(NodeUnreachable):
            passes.logits(2)
    finally:
        passes.dispatch.fails_in = None
    ended = [layer for what, layer in passes.dispatch.log if what in ("wait", "abandon")]
    started = [layer for what, layer in passes.dispatch.log if what == "start"]
    assert sorted(ended) == sorted(started), "a call was left behind"
    assert passes.logits(NUM_LAYERS).tobytes() == passes.logits(None).tobytes()


def test_a_cancelled_pass_leaves_no_call_behind(passes: Passes) -> None:
    class CancelledInTheSecondPass(Cancellation):
        num_checks = 0

        def check(self) -> None:
            self.num_checks += 1
            if self.num_checks == NUM_LAYERS + 2:
                raise Cancelled

    with pytest.raises(Cancelled):
        passes.logits(2, CancelledInTheSecondPass())
    log = passes.dispatch.log
    assert [what for what, _ in log].count("abandon") == NUM_LAYERS
    assert passes.logits(NUM_LAYERS).tobytes() == passes.logits(None).tobytes()


@pytest.fixture
def few_calls_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(limits, "MAX_CALLS_AHEAD", 2)
    yield


@pytest.mark.usefixtures("few_calls_ahead")
def test_calls_ahead_are_bounded_and_the_result_is_the_same(passes: Passes) -> None:
    exact = passes.logits(None)
    assert passes.logits(NUM_LAYERS).tobytes() == exact.tobytes()
    in_flight = most = 0
    for what, _ in passes.dispatch.log:
        in_flight += 1 if what == "start" else -1
        most = max(most, in_flight)
    assert most == 2


def test_the_bits_of_a_weight_are_those_of_its_format(tmp_path: Path) -> None:
    for quant, bits in (("q4_0", 4.5), ("bf16", 16.0)):
        path = make_tiny_artifact(tmp_path, "qwen3_moe", quant, name=quant, num_hidden_layers=1)
        assert expert_bits(Artifact.open(path)) == bits
