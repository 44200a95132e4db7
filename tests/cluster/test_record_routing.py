"""`shoal run --record-routing`: where every token went, though no node sees all of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.cli import main
from shoal.artifact import Artifact
from shoal.errors import UsageError
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor, OpenCall
from shoal.experts.routing_trace import decode_trace
from support.cluster import Cluster
from support.forward_passes import ForwardPasses
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor

PROMPT = [5, 9, 11, 5, 9, 11, 5, 9, 11, 5, 9]  # repeats itself, so that guesses are made
MORE = ("--max-tokens", "24", "--ignore-eos", "--json", "--prefill-chunk", "5")


class Watching(ExpertExecutor):
    """Knows what every call asked for."""

    calls: list[NDArray[np.uint16]]

    def open(self, call: ExpertCall, stream: int = 0) -> OpenCall:
        self.calls.append(np.sort(call.experts).astype(np.uint16))
        return super().open(call, stream)


def run_json(
    capsys: pytest.CaptureFixture[str], model: Path, file: Path, *options: str
) -> dict[str, Any]:
    ids = ",".join(map(str, PROMPT))
    command = ["run", str(model), "--prompt-ids", ids, *MORE, "--record-routing", str(file)]
    status = main([*command, *options])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert f"added to {file}" in said.err
    report: dict[str, Any] = json.loads(said.out)
    return report


def truth(model: Path, token_ids: list[int]) -> NDArray[np.uint16]:
    """[T, layers, k]: one row a pass, without an engine."""
    artifact = Artifact.open(model)
    executor = Watching(artifact, whole_executor(artifact).store)
    executor.calls = []
    ForwardPasses(model, executor=executor).logits_of_every_prefix(token_ids)
    return np.stack(executor.calls).reshape(len(token_ids), artifact.spec.num_layers, -1)


@pytest.mark.processes
def test_the_trace_is_the_routing_of_the_text_whoever_computed_it(
    path: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1. A request runs over two nodes that own half of each layer, in chunks, with guesses
    where any pay. 2. Another is added to the file, in this process and without guesses.
    3. Both are what one row a pass visits.
    """
    a, b = cluster.nodes(path, [{"experts": "0-7"}, {"experts": "8-15"}])
    shards = ("--moe-shards", f"0-7={a.endpoint},8-15={b.endpoint}")
    file = tmp_path / "run.routing"
    guessed = run_json(capsys, path, file, *shards, "--speculate", "lookup")
    plain = run_json(capsys, path, file, "--speculate", "off")
    assert guessed["token_ids"] == plain["token_ids"]
    trace = decode_trace(file.read_bytes(), "trace")
    expected = truth(path, [*PROMPT, *plain["token_ids"]][:-1])
    assert [segment.name for segment in trace.segments] == ["run-0", "run-1"]
    for segment in trace.segments:
        np.testing.assert_array_equal(segment.experts, expected[: len(segment.experts)])
        assert len(segment.experts) == len(expected)
    assert (trace.num_experts, trace.top_k, trace.moe_layers) == (16, 4, (0, 1, 2))


def test_recording_changes_no_bit(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = run_json(capsys, path, tmp_path / "run.routing")
    ids = ",".join(map(str, PROMPT))
    assert main(["run", str(path), "--prompt-ids", ids, *MORE]) == 0
    plain = json.loads(capsys.readouterr().out)
    for key in ("token_ids", "logits_digest"):
        assert recorded[key] == plain[key]


def test_what_cannot_be_recorded_is_refused_before_any_work(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, dense = (make_tiny_artifact(tmp_path / name, name, "f32") for name in ("olmoe", "llama"))
    run_json(capsys, other, tmp_path / "other.routing")
    (tmp_path / "text").write_text("no trace")
    before = (tmp_path / "other.routing").read_bytes()
    for model, file, message in (
        (path, "nowhere/run.routing", "there is no folder"),
        (path, "other.routing", "recorded with another model"),
        (path, "text", "not a routing trace"),
        (dense, "run.routing", "chooses no experts"),
    ):
        command = ["run", str(model), "--prompt-ids", "1,2", "--max-tokens", "2", "--json"]
        status = main([*command, "--record-routing", str(tmp_path / file)])
        said = capsys.readouterr()
        assert status == UsageError.exit_code and message in said.err, said.err
        assert not said.out
    assert (tmp_path / "other.routing").read_bytes() == before
    assert not (tmp_path / "run.routing").exists()
