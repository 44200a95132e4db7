"""What `--record-routing` keeps of passes whose guesses were wrong."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.batch import Batch
from coordinator.routing_recorder import RoutingRecorder
from shoal.artifact import Artifact
from shoal.experts.routing_trace import decode_trace
from support.tiny_model import make_tiny_artifact

TOP_K = 4


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact.open(make_tiny_artifact(tmp_path_factory.mktemp("model")))


def batch_of(first: int, token_ids: list[int]) -> Batch:
    positions = np.arange(first, first + len(token_ids), dtype=np.int32)
    return Batch(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        row_sequence=np.zeros(len(token_ids), np.int32),
        slots=positions,
        block_tables=np.zeros((1, 1), np.int32),
        logit_rows=np.arange(len(token_ids)),
    )


def test_a_wrong_guess_leaves_nothing_behind(artifact: Artifact, tmp_path: Path) -> None:
    """1. A prompt of three. 2. Its next token with two guesses; the second is wrong. 3. The pass
    that puts it right. 4. One more whose guess is wrong and was the last thing run.
    """
    path = tmp_path / "run.routing"
    recorder = RoutingRecorder(path, artifact.spec, artifact.identity)
    rng = np.random.default_rng(0)
    layers = range(artifact.spec.num_layers)
    wanted: dict[int, list[list[int]]] = {}
    for first, ids in ((0, [5, 6, 7]), (3, [8, 9, 99]), (5, [10]), (6, [11, 98])):
        batch = batch_of(first, ids)
        recorder.begin(batch)
        for layer in layers:
            experts = np.array([rng.permutation(16)[:TOP_K] for _ in ids], np.int32)
            recorder.visit(layer, experts)
            for row, position in enumerate(range(first, first + len(ids))):
                wanted.setdefault(position, [])[layer:] = [sorted(experts[row].tolist())]
        recorder.end(batch)
    said = recorder.write([5, 6, 7, 8, 9, 10, 11, 12])
    assert "routing of 7 tokens" in said
    [segment] = decode_trace(path.read_bytes(), "trace").segments
    assert segment.experts.tolist() == [wanted[position] for position in range(7)]
