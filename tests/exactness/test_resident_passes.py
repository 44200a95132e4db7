"""Passes whose experts are all in memory, several layers a native call: bits and errors as ever."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation, Cancelled
from coordinator.expert_branch import DispatchedExperts, WatchedExperts
from coordinator.expert_dispatch import LocalDispatch
from coordinator.transformer import MAX_ROWS_AT_ONCE, Transformer
from coordinator.weights import load_weights
from shoal import ops
from shoal.artifact import Artifact
from shoal.experts.executor import ExpertExecutor
from support.forward_passes import F32, ForwardPasses
from support.stores import whole
from support.tiny_model import make_tiny_artifact

IDS = list(range(20, 60))
NUM_LAYERS = 5


@pytest.fixture(scope="module", params=[("qwen3_moe", "q8_0"), ("llama", "q4_0")])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, quant = request.param
    tmp = tmp_path_factory.mktemp(family)
    return make_tiny_artifact(tmp, family, quant, num_hidden_layers=NUM_LAYERS)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Layers done by each native run."""
    seen: list[int] = []
    real = ops.LayerRun.in_memory

    def spied(run: ops.LayerRun, experts: Sequence[ops.ResidentExperts]) -> ops.RanLayers | None:
        ran = real(run, experts)
        seen.append(0 if ran is None else len(ran.experts))
        return ran

    monkeypatch.setattr(ops.LayerRun, "in_memory", spied)
    yield seen


@pytest.fixture
def resident(path: Path) -> Iterator[tuple[ForwardPasses, Any]]:
    """Passes on a store that has read everything, and the store."""
    artifact = Artifact.open(path)
    with ExitStack() as opened:
        store = whole(artifact, opened)
        store.warm_up(lambda _: None)
        yield ForwardPasses(path, executor=ExpertExecutor(artifact, store)), store


def served(passes: ForwardPasses) -> list[F32]:
    """A prompt, tokens one by one, two sequences side by side."""
    one, two = passes.sequence(IDS), passes.sequence(IDS[::-1])
    logits = [passes.run((one, 20)), passes.run((one, 1)), passes.run((one, 1))]
    logits += [passes.run((two, 25), (one, 1)), passes.run((one, 1), (two, 1))]
    return logits


def test_logits_are_those_of_experts_called_one_layer_at_a_time(
    path: Path, resident: tuple[ForwardPasses, Any], runs: list[int]
) -> None:
    right = [logits.tobytes() for logits in served(ForwardPasses(path))]
    assert runs == [], "its store has no tables"
    passes, store = resident
    assert [logits.tobytes() for logits in served(passes)] == right
    assert list(store.tables) == list(range(NUM_LAYERS))
    of_one = [size for size in runs if size == NUM_LAYERS]
    assert len(of_one) >= 2, runs


def test_a_table_that_is_withdrawn_sends_its_layer_the_long_way_and_comes_back(
    path: Path, resident: tuple[ForwardPasses, Any], runs: list[int]
) -> None:
    oracle = ForwardPasses(path)
    passes, store = resident
    mine, right = passes.sequence(IDS), oracle.sequence(IDS)

    def num_in_runs() -> int:
        runs.clear()
        assert passes.run((mine, 1)).tobytes() == oracle.run((right, 1)).tobytes()
        return sum(runs)

    assert num_in_runs() == 0, "a call has to find the experts first"
    for gone in (0, 2, 4):
        assert num_in_runs() == NUM_LAYERS
        assert store.tables[gone].withdraw(lambda: None), "nobody is inside"
        assert num_in_runs() == NUM_LAYERS - 1
        store.tables.pop(gone)
        assert num_in_runs() == NUM_LAYERS - 1
    assert num_in_runs() == NUM_LAYERS


def test_every_few_layers_somebody_looks_whether_to_go_on(
    resident: tuple[ForwardPasses, Any], runs: list[int]
) -> None:
    passes, _ = resident
    sequence = passes.sequence(IDS)
    assert sequence.try_reserve(16)
    batch = make_batch([Piece(sequence, 16, num_logits=16)])
    passes.transformer.forward(batch, passes.kv, Cancellation())
    assert runs == []
    passes.transformer.forward(batch, passes.kv, Cancellation())
    per_call = MAX_ROWS_AT_ONCE // 16
    assert runs == [per_call, NUM_LAYERS - per_call]
    cancellation = Cancellation()
    cancellation.request()
    with pytest.raises(Cancelled):
        passes.transformer.forward(batch, passes.kv, cancellation)


def test_what_the_rows_visited_is_told_as_if_each_layer_had_been_called(path: Path) -> None:
    artifact = Artifact.open(path)
    watched = []
    with ExitStack() as opened:
        store = whole(artifact, opened)
        executor = ExpertExecutor(artifact, store)
        for _ in range(2):  # the second pass finds the experts
            dispatch = LocalDispatch(executor)
            branch = WatchedExperts(artifact.spec, DispatchedExperts(artifact, dispatch))
            passes = ForwardPasses(path)
            model = Transformer(artifact.spec, load_weights(artifact), branch)
            sequence = passes.sequence(IDS)
            assert sequence.try_reserve(4)
            batch = make_batch([Piece(sequence, 4, num_logits=4)])
            model.forward(batch, passes.kv, Cancellation())
            watched.append(branch.last_rows(4))
            assert dispatch.stats.summary().num_fanouts == NUM_LAYERS
    assert watched[0] == watched[1]
