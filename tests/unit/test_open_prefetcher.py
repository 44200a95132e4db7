"""open_prefetcher: what is guessed with, on real artifacts, stores and calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from client.slice_cmd import Preset, slice_
from shoal import ops
from shoal.artifact import Artifact
from shoal.errors import UsageError
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.experts.open_store import open_store
from shoal.experts.options import Mode
from shoal.experts.ownership import Ownership
from shoal.experts.prefetch import open_prefetcher as module
from shoal.experts.prefetch.open_prefetcher import open_prefetcher
from shoal.experts.store import StoreOptions
from shoal.experts.streaming import StreamingStore
from support.forward_passes import ForwardPasses
from support.pregates import without_pregates
from support.tiny_model import make_tiny_artifact

TOKENS = [5 + (7 * i * i) % 90 for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("artifact"), "qwen3_moe", "q8_0")


def owned(artifact: Artifact) -> Ownership:
    return Ownership(dict(artifact.owned_experts))


@contextmanager
def small_store(artifact: Artifact, num_experts: int = 16) -> Iterator[StreamingStore]:
    size = artifact.expert_layer(artifact.manifest.experts[0].layer).expert_bytes
    options = StoreOptions(cache_bytes=num_experts * size)
    store = open_store(artifact, owned(artifact), options)
    try:
        yield store
    finally:
        store.close()


def test_off_and_models_whose_every_expert_is_chosen_need_none(model: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(model)
    with small_store(artifact) as store:
        assert open_prefetcher(Mode.OFF, artifact, owned(artifact), store) is None
    dense = Artifact.open(make_tiny_artifact(tmp_path, "llama", "f32"))
    with small_store(dense, 2) as store:
        for mode in Mode:
            assert open_prefetcher(mode, dense, owned(dense), store) is None


def test_an_old_whole_artifact_makes_its_matrices_and_an_old_slice_does_without(
    model: Path, tmp_path: Path
) -> None:
    old = without_pregates(model, tmp_path / "old.shoal")
    new = Artifact.open(model)
    routers = {i: layer.router for i, layer in enumerate(new.spec.layers) if layer.router}
    rows = ops.quantise_rows(new.scheme(0), np.ones((1, new.spec.model_dim), np.float32))
    made, read = (module._pregates(each, routers, owned(each)) for each in (old, new))
    assert made.keys() == read.keys() == {0, 1}
    for layer, gate in made.items():
        assert gate.scores(rows).tobytes() == read[layer].scores(rows).tobytes()
    slice_(str(model), str(tmp_path / "n.shoal"), Preset.EXPERT_NODE, experts="0-7")
    part = without_pregates(tmp_path / "n.shoal", tmp_path / "oldn.shoal")
    with small_store(part, 8) as store:
        with pytest.raises(UsageError, match="has no pre-gate matrices: convert or slice"):
            open_prefetcher(Mode.PREGATE, part, owned(part), store)
        prefetcher = open_prefetcher(Mode.AUTO, part, owned(part), store)
        assert prefetcher is not None
        assert set(prefetcher.figures().predictors) == {"fused", "markov", "locality"}


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.OFF])
def test_guesses_are_read_and_no_bit_changes(model: Path, mode: Mode) -> None:
    artifact = Artifact.open(model)
    expected = ForwardPasses(model).logits_of_every_prefix(TOKENS)
    with small_store(artifact, 24) as store:
        prefetcher = open_prefetcher(mode, artifact, owned(artifact), store, is_governed=False)
        assert prefetcher is not None
        executor = ExpertExecutor(artifact, store, prefetcher=prefetcher)
        passes = ForwardPasses(model, executor=executor)
        for _ in range(4):  # the same text again: its routing can be learned
            logits = passes.logits_of_every_prefix(TOKENS)
            assert logits.tobytes() == expected.tobytes()
        figures = prefetcher.figures()
        prefetcher.close()
    assert figures.predictors["fused"].wanted > 500
    assert figures.predictors["fused"].recall > 0.3, "a quarter of the experts is chance"
    assert figures.mode is mode and figures.decode_state == "forced"
    if mode is not Mode.LOCALITY:  # this text repeats itself too seldom for it to dare
        assert figures.used_bytes > 0
    assert figures.issued_bytes >= figures.used_bytes + figures.wasted_bytes


def test_a_governed_one_begins_by_learning(model: Path) -> None:
    artifact = Artifact.open(model)
    with small_store(artifact) as store:
        prefetcher = open_prefetcher(Mode.AUTO, artifact, owned(artifact), store)
        assert prefetcher is not None
        figures = prefetcher.figures()
        assert (figures.decode_state, figures.prefill_state) == ("learn", "learn")


def test_rows_that_are_no_numbers_are_the_calls_problem_not_the_prefetchers(tmp_path: Path) -> None:
    artifact = Artifact.open(make_tiny_artifact(tmp_path, "qwen3_moe", "f32"))
    with small_store(artifact) as store:
        prefetcher = open_prefetcher(Mode.AUTO, artifact, owned(artifact), store)
        assert prefetcher is not None
        rows = ops.quantise_rows(artifact.scheme(0), np.ones((1, 64), np.float32))
        rows.values[:] = np.float32("nan")
        pairs = np.array([0, 1], np.int32)
        experts = np.array([3], np.int32)
        prefetcher.on_call(ExpertCall(0, rows, pairs, experts, np.ones(1, np.float32)), [3], 0.0)
        prefetcher.on_loaded(0, 0.1)
        prefetcher.on_done(0, 0.0, 0.2)
