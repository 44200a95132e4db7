"""Models are found by path or by name."""

from pathlib import Path

import pytest

from client.convert_cmd import output_path
from shoal.errors import UsageError
from shoal.paths import models_dir, resolve_model, shoal_home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_environment_names_the_home(home: Path) -> None:
    assert shoal_home() == home


def test_without_the_environment_the_platforms_cache_folder_is_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SHOAL_HOME")
    assert shoal_home().name == "shoal"


def test_a_name_is_looked_up_among_the_models_with_and_without_suffix() -> None:
    (models_dir() / "tiny.shoal").mkdir(parents=True)
    assert resolve_model("tiny") == models_dir() / "tiny.shoal"
    assert resolve_model("tiny.shoal") == models_dir() / "tiny.shoal"


def test_a_path_wins_over_a_name() -> None:
    (models_dir() / "tiny.shoal").mkdir(parents=True)
    Path("tiny.shoal").mkdir()
    assert resolve_model("tiny") == Path("tiny.shoal")


def test_a_missing_model_lists_those_that_are_there() -> None:
    (models_dir() / "tiny.shoal").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no model 'huge'.*tiny"):
        resolve_model("huge")


def test_an_empty_home_says_how_to_get_a_model() -> None:
    with pytest.raises(UsageError, match="shoal pull"):
        resolve_model("huge")


def test_a_file_is_told_to_be_converted_first(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="shoal convert"):
        resolve_model(file)


def test_a_bare_name_is_written_among_the_models_and_a_path_where_it_says() -> None:
    assert output_path("tiny") == models_dir() / "tiny.shoal"
    assert output_path("tiny.shoal") == Path("tiny.shoal")
    assert output_path("sub/tiny") == Path("sub/tiny.shoal")
    with pytest.raises(UsageError):
        output_path("..")


@pytest.mark.parametrize("wrong", ["", "~nobody-of-that-name/model"])
def test_a_name_that_no_folder_can_have_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError):
        resolve_model(wrong)
