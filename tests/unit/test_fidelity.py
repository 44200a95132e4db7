"""`shoal bench fidelity`: what it measures where the answer is known, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.cli import main
from coordinator.corrected import compose
from coordinator.corrected.fidelity import Fidelity
from coordinator.corrected.fidelity_cmd import (
    FidelityReport,
    FidelityRequest,
    measure_fidelity,
    table,
)
from coordinator.corrected.fidelity_figures import (
    closeness,
    distinct_grams,
    first_difference,
    overlap,
    perplexity,
)
from shoal.artifact import Artifact
from shoal.artifact.shadow_build import make_shadow
from shoal.errors import RequestError, UsageError
from shoal.quant import Format
from support.tiny_model import make_tiny_artifact

NUM_LAYERS, NUM_PROMPT, NUM_TOKENS = 3, 5, 8
TEXT = "the rain in the street, and the sound of it on the roof"


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> FidelityRequest:
    """A sparse model of three layers and its stand-in of 3.5 bits a weight."""
    folder = tmp_path_factory.mktemp("fidelity")
    model = make_tiny_artifact(folder, "qwen3_moe", "bf16", num_hidden_layers=NUM_LAYERS)
    shadow = folder / "shadow.shoal"
    make_shadow(Artifact.open(model), Format.Q3_T, shadow, lambda _: None, force=False)
    return FidelityRequest(
        str(model),
        str(shadow),
        iters=(1, NUM_LAYERS),
        text=TEXT,
        num_prompt=NUM_PROMPT,
        num_tokens=NUM_TOKENS,
    )


@pytest.fixture(scope="module")
def report(request_: FidelityRequest) -> FidelityReport:
    return measure_fidelity(request_)


def measured(report: FidelityReport, mode: str, iters: int | None) -> Fidelity:
    [row] = [row for row in report.rows if (row.mode, row.iters) == (mode, iters)]
    return row.fidelity


def assert_exact(fidelity: Fidelity) -> None:
    forced, free = fidelity.forced, fidelity.free
    assert (forced.kl, forced.agreement, fidelity.routing) == (0.0, 1.0, 1.0)
    assert forced.perplexity == forced.exact_perplexity
    assert (free.kl, free.agreement, free.same_tokens) == (0.0, 1.0, NUM_TOKENS)


def test_the_exact_mode_token_by_token_is_the_text_read_at_once(report: FidelityReport) -> None:
    assert_exact(measured(report, "stream", None))


@pytest.mark.parametrize("mode", ["batch", "zeros"])
def test_as_many_sweeps_as_layers_leave_no_difference(report: FidelityReport, mode: str) -> None:
    """Whatever stands in: after a sweep a layer nothing of it is left."""
    fidelity = measured(report, mode, NUM_LAYERS)
    assert_exact(replace(fidelity, routing=1.0))
    assert fidelity.routing is not None and fidelity.routing > 0.9, "asked a sweep before the last"


def test_a_sweep_of_a_good_stand_in_is_near_and_one_of_nothing_is_not(
    report: FidelityReport,
) -> None:
    alone = measured(report, "shadow alone", None)
    batch, zeros = measured(report, "batch", 1), measured(report, "zeros", 1)
    assert 0.0 < batch.forced.kl < alone.forced.kl < zeros.forced.kl
    assert alone.routing is None, "it asks no node"


def test_local_bytes_are_those_of_the_stand_in(
    report: FidelityReport, request_: FidelityRequest
) -> None:
    files = (Path(request_.shadow) / "experts").iterdir()
    on_disk = sum(path.stat().st_size for path in files)
    by_mode = {row.mode: row.local_expert_bytes for row in report.rows}
    assert by_mode["stream"] == by_mode["zeros"] == 0
    assert 0.9 * on_disk < by_mode["batch"] == by_mode["shadow alone"] <= on_disk
    assert report.shadow_bits >= 3.5 and report.shadow_format == "q3_t"


def test_kl_agreement_and_perplexity_of_two_rows_worked_by_hand() -> None:
    """Shares of 3/4 and 1/4 beside 1/2 and 1/2 (a tie: the lower id); then beside their reverse."""
    exact = np.log(np.array([[3, 1], [1, 3]], np.float32))
    other = np.log(np.array([[1, 1], [3, 1]], np.float32))
    near = closeness(exact, other, next_ids=[0, 1])
    first = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    second = 3 / 4 * math.log(3) + 1 / 4 * math.log(1 / 3)
    assert near.kl == pytest.approx((first + second) / 2, rel=1e-6)
    assert near.agreement == 1 / 2
    assert near.exact_perplexity == pytest.approx(4 / 3, rel=1e-6)
    assert near.perplexity == pytest.approx(math.sqrt(2 * 4), rel=1e-6)
    assert perplexity(other, [0, 1]) == pytest.approx(near.perplexity)


def test_routing_overlap_counts_shared_experts_in_any_order() -> None:
    exact = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.int32)
    other = np.array([[3, 2, 1, 0], [4, 9, 8, 7]], np.int32)
    assert overlap(exact, other) == (1.0 + 0.5) / 2


def test_what_is_written_is_compared_up_to_the_first_other_token_and_for_repeats() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert distinct_grams([1, 2, 3, 4, 5]) == 1.0
    assert distinct_grams([7] * 8) == 1 / 5


def test_the_command_prints_one_object_or_a_table(
    request_: FidelityRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    asked = ["bench", "fidelity", request_.model, "--shadow", request_.shadow, "--iters", "2"]
    asked += ["--text", str(text), "--prompt-tokens", "5", "--tokens", "4", "--no-zeros"]
    assert main([*asked, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["identity"] == Artifact.open(Path(request_.model)).identity
    assert [(row["mode"], row["iters"]) for row in told["rows"]] == [
        ("stream", None),
        ("shadow alone", None),
        ("batch", 2),
    ]
    assert told["rows"][0]["fidelity"]["forced"]["kl"] == 0.0
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("| stream | - | 1.000 | 0 |") and lines[-1].startswith(
        "| batch | 2"
    )


def test_a_report_as_a_table_names_the_stand_in_and_its_share(report: FidelityReport) -> None:
    head, *_ = table(report).splitlines()
    share = 100 * report.rows[1].local_expert_bytes / report.expert_bytes
    assert f"q3_t, {report.shadow_bits:.2f} bits a weight, {share:.0f} % of the experts'" in head


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shadow": "q2"}, UsageError, "fewer than 3 bits"),
        ({"shadow": "nowhere"}, UsageError, "nowhere"),
        ({"num_tokens": 1}, UsageError, "--tokens 1: must be at least 2"),
        ({"num_prompt": 0}, UsageError, "--prompt-tokens 0"),
        ({"num_tokens": 400}, RequestError, "--tokens ask for 405: give a longer one"),
        ({"num_tokens": 600, "text": TEXT * 40}, RequestError, "do not fit the context of 512"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    request_: FidelityRequest, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        measure_fidelity(replace(request_, **change))


def test_a_stand_in_below_three_bits_is_refused_before_anything_is_run(
    request_: FidelityRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "expert_bits", lambda _: 2.5)
    with pytest.raises(UsageError, match=r"2\.5 bits a weight.*needs 3 or more"):
        measure_fidelity(request_)


@pytest.mark.parametrize("iters", ["0", "9", "1,x", ""])
def test_a_number_of_sweeps_out_of_bounds_is_refused(
    iters: str, request_: FidelityRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "fidelity", request_.model, "--iters", iters]) == 2
    assert "must be numbers in 1..8" in " ".join(capsys.readouterr().err.split())
