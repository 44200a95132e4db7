"""What the command line says of speculation: wrong combinations are refused with what to do."""

import shutil
from pathlib import Path

import pytest

from client.cli import main
from support.tiny_model import make_tiny_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return make_tiny_artifact(folder, "qwen3_moe", "q8_0", seed=3, name="one")


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    return make_tiny_artifact(folder, "olmoe", "q8_0", seed=4, name="other")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--speculate", "draft"], "--speculate draft needs --draft-model"),
        (["--speculate", "shadow"], "--speculate shadow needs --shadow"),
        (["--speculate", "batch"], "--speculate batch needs --shadow"),
        (["--speculate", "maybe"], "maybe"),
        (["--speculate", "lookup", "--draft-model", "fables"], "--draft-model does nothing"),
        (["--speculate", "lookup", "--shadow", "q4"], "--shadow does nothing"),
        (["--speculate", "off", "--history"], "--history does nothing with --speculate off"),
        (["--max-draft", "0"], "--max-draft 0: must be in 1..32"),
        (["--max-draft", "33"], "--max-draft 33"),
        (["--draft-divergence", "0"], "--draft-divergence 0"),
        (["--draft-divergence", "1.5"], "--draft-divergence 1.5"),
        (["--draft-model", "no-such-model"], "no-such-model"),
        (["--shadow", "no-such-shadow"], "no-such-shadow"),
        (["--shadow", "q2"], "q2"),
    ],
)
def test_what_cannot_be_is_refused_before_any_text(
    path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["run", str(path), "hello", *options]) == 2
    shown = capsys.readouterr()
    assert words in " ".join(shown.err.split())
    assert shown.out == ""


def test_a_draft_model_of_another_vocabulary_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(path), "hello", "--draft-model", "fables"]) == 2
    assert "a draft model needs the same vocabulary" in " ".join(capsys.readouterr().err.split())


def test_a_draft_model_of_another_architecture_with_the_same_vocabulary_drafts(
    path: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for options in ([], ["--speculate", "draft", "--draft-model", str(other)]):
        assert (
            main(["run", str(path), "hello", "--max-tokens", "12", "--ignore-eos", *options]) == 0
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_a_slice_is_no_draft_model(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "front.shoal"
    assert main(["slice", str(path), str(out), "--preset", "coordinator"]) == 0
    capsys.readouterr()
    assert main(["run", str(path), "hello", "--draft-model", str(out)]) == 2
    assert "use the whole artifact" in " ".join(capsys.readouterr().err.split())


def test_a_shadow_is_made_on_first_use_and_used_on_the_second(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "one.shoal"
    shutil.copytree(path, copy)
    command = ["run", str(copy), "hello", "--max-tokens", "4", "--ignore-eos", "--shadow", "q4"]
    assert main(command) == 0
    first = capsys.readouterr()
    assert main(command) == 0
    second = capsys.readouterr()
    assert "making the q4 shadow of one" in first.err
    assert "making" not in second.err
    assert first.out == second.out
