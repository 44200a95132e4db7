"""The model that comes with shoal: found by name, and run where none is named."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from client.cli import main
from shoal.artifact import Artifact
from shoal.paths import BUNDLED, default_model, is_artifact, models_dir, resolve_model
from support.fables import NUM_EXPERTS, NUM_LAYERS, PROMPT, TOP_K

FEW = ("--max-tokens", "4", "--json")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["run", *FEW, *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_its_name_resolves_and_a_model_of_the_users_wins() -> None:
    assert resolve_model(BUNDLED) == default_model()
    assert resolve_model("fables.shoal") == default_model()
    (models_dir() / "fables.shoal").mkdir(parents=True)
    assert resolve_model(BUNDLED) == models_dir() / "fables.shoal"
    assert default_model() != models_dir() / "fables.shoal"


@pytest.mark.parametrize("text", ["Once upon a time", "x" * 5000, "a\0b", "", "~nobody-at-all/x"])
def test_a_prompt_is_no_model(text: str) -> None:
    assert not is_artifact(text)
    assert is_artifact(BUNDLED)


def test_it_is_a_sparse_mixture_of_experts() -> None:
    spec = Artifact.open(default_model()).spec
    assert spec.num_layers == NUM_LAYERS
    for layer in spec.layers:
        assert layer.router is not None
        assert (layer.router.num_experts, layer.router.experts_per_token) == (NUM_EXPERTS, TOP_K)


def test_a_prompt_alone_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    alone = report(capsys, PROMPT)
    named = report(capsys, BUNDLED, PROMPT)
    assert alone["model"] == named["model"] == BUNDLED
    assert alone["token_ids"] == named["token_ids"]
    assert alone["identity"] == Artifact.open(default_model()).identity


def test_a_folder_of_its_name_does_not_hide_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / BUNDLED).mkdir()
    assert report(capsys, PROMPT)["model"] == BUNDLED


def test_ids_alone_run_it_and_a_word_beside_them_is_the_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = report(capsys, "--prompt-ids", "5,6,7")
    named = report(capsys, BUNDLED, "--prompt-ids", "5,6,7")
    assert alone["prompt_ids"] == [5, 6, 7]
    assert alone["token_ids"] == named["token_ids"]


def test_stdin_is_its_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    piped = report(capsys, "-")
    assert piped["prompt_ids"] == report(capsys, PROMPT)["prompt_ids"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no prompt"),
        ([BUNDLED], "no prompt"),
        (["fables.shoal"], "no prompt"),
        (["missing.shoal"], "no prompt"),
        (["nothing", PROMPT], "with shoal comes: fables"),
        ([BUNDLED, "Once", "upon"], "put the prompt in quotes"),
        ([BUNDLED, PROMPT, "--prompt-ids", "1"], "not both"),
        (["--chat", "--prompt-ids", "1"], "--chat needs a prompt"),
    ],
)
def test_unclear_words_are_refused_with_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["run", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_chat_talks_to_it_and_follows_its_template(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n/exit\n"))
    assert main(["chat", "--max-tokens", "20", "--temperature", "0"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_an_answer_may_be_as_long_as_the_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", PROMPT, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["finish_reason"] == "eos", "a story comes to its end"
    assert len(whole["token_ids"]) > 128, "the default for models that say nothing"


def test_it_samples_as_its_makers_say_unless_the_command_line_says_otherwise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = report(capsys, PROMPT, "--max-tokens", "40")
    said = report(capsys, PROMPT, "--max-tokens", "40", "--temperature", "0.7", "--min-p", "0.02")
    greedy = report(capsys, PROMPT, "--max-tokens", "40", "--temperature", "0")
    other = report(capsys, PROMPT, "--max-tokens", "40", "--temperature", "0", "--seed", "5")
    assert own["token_ids"] == said["token_ids"] != greedy["token_ids"] == other["token_ids"]


@pytest.mark.parametrize(
    ("config", "status"),
    [
        ({"do_sample": True, "temperature": "hot"}, 3),
        ({"do_sample": True, "top_k": 2.5}, 3),
        ({"do_sample": True, "temperature": -1.0}, 2),
        ({"do_sample": False, "temperature": "hot"}, 0),
    ],
)
def test_a_models_own_sampling_is_checked_where_it_counts(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], status: int
) -> None:
    monkeypatch.setattr(Artifact, "generation_config", property(lambda _self: config))
    assert main(["run", PROMPT, *FEW]) == status


def test_the_wheel_carries_its_licence_and_its_card() -> None:
    folder = default_model().parent
    assert "Apache License" in (folder / "LICENSE").read_text()
    card = (folder / "README.md").read_text()
    assert Artifact.open(default_model()).identity in card
