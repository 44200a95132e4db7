"""`shoal run` and `shoal chat` as somebody types them, on a tiny model, in this process."""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from client.cli import main
from shoal.artifact import Artifact
from support.command import run_json
from support.tiny_model import make_tiny_artifact


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("run"), "qwen3_moe", "q8_0", seed=3)


def test_json_tells_what_was_asked_what_came_and_who_answered(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_json(
        capsys, path, "--prompt-ids", "5,6,7", "--max-tokens", "4", "--ignore-eos",
        "--top-logprobs", "2",
    )  # fmt: skip
    assert report["prompt_ids"] == [5, 6, 7]
    assert len(report["token_ids"]) == 4
    assert report["finish_reason"] == "length"
    assert report["identity"] == Artifact.open(path).identity
    assert report["model"] == "tiny"
    assert [entry["token_id"] for entry in report["logprobs"]] == report["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in report["logprobs"])
    assert report["timings"]["prompt_tokens"] == 3
    assert report["dispatch"]["decode"]["fanouts"] == 3 * Artifact.open(path).spec.num_layers


def test_the_prefill_chunk_and_the_threads_change_no_bit(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ",".join(str(i) for i in range(10, 40))
    common = ("--prompt-ids", ids, "--max-tokens", "6", "--ignore-eos", "--top-logprobs", "5")
    ways = [("--prefill-chunk", "1"), ("--prefill-chunk", "7"), ("--threads", "1"), ()]
    reports = [run_json(capsys, path, *common, *way) for way in ways]
    assert len({report["logits_digest"] for report in reports}) == 1
    assert all(report["token_ids"] == reports[0]["token_ids"] for report in reports)
    assert all(report["logprobs"] == reports[0]["logprobs"] for report in reports)


def test_text_is_streamed_to_stdout_and_figures_to_stderr(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_json(capsys, path, "the answer", "--max-tokens", "5", "--ignore-eos")
    assert main(["run", str(path), "the answer", "--max-tokens", "5", "--ignore-eos"]) == 0
    shown = capsys.readouterr()
    assert shown.out == report["text"] + "\n"
    for words in ("prompt ", "decode 5", "first token", "dispatch per layer p50", "length"):
        assert words in shown.err


def test_a_prompt_can_come_from_stdin(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = run_json(capsys, path, "in the end", "--max-tokens", "2")
    monkeypatch.setattr(sys, "stdin", io.StringIO("in the end"))
    assert run_json(capsys, path, "-", "--max-tokens", "2")["prompt_ids"] == typed["prompt_ids"]


def test_the_chat_template_is_applied_when_asked_for(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = run_json(capsys, path, "hello", "--max-tokens", "1")["prompt_ids"]
    chat = run_json(capsys, path, "hello", "--max-tokens", "1", "--chat")["prompt_ids"]
    system = run_json(
        capsys, path, "hello", "--max-tokens", "1", "--chat", "--system", "Be brief."
    )["prompt_ids"]
    assert len(raw) < len(chat) < len(system)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no prompt"),
        (["hello", "--prompt-ids", "1"], "not both"),
        (["--prompt-ids", "1,x"], "'x' at place 1"),
        (["--prompt-ids", "1,100000"], "prompt id 100000 at index 1"),
        (["hello", "--top-logprobs", "3"], "needs --json"),
        (["hello", "--system", "x"], "needs --chat"),
        (["hello", "--threads", "0"], "--threads 0"),
        (["hello", "--temperature", "-1"], "temperature"),
        (["hello", "--max-context", "9999999"], "--max-context 9999999"),
        (["hello", "--max-tokens", "600"], "do not fit the context"),
        (["hello", "--prefill-chunk", "0"], "prefill_chunk = 0"),
        (["hello", "--call-timeout", "0"], "--call-timeout"),
        (["hello", "--moe-shards", "0-3"], "--moe-shards"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(
    path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["run", str(path), *options]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""


def test_a_missing_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no-such-model", "hello"]) == 2
    assert "no-such-model" in capsys.readouterr().err


def chat(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    path: Path,
    lines: list[str],
    *options: str,
) -> list[str]:
    """Return stdout's lines; the answers have none within them as long as --max-tokens is small."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(path), "--max-tokens", "3", *options]) == 0
    return capsys.readouterr().err.splitlines()


def test_a_conversation_reuses_its_beginning_and_forgets_on_reset(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = chat(monkeypatch, capsys, path, ["hello", "again", "/reset", "other", "/exit", "no"])
    assert len(figures) == 3, "one line of figures an answer, none after /exit"
    assert "reused" not in figures[0]
    assert "reused" in figures[1]
    counts = [int(line.split()[1]) for line in figures]
    assert counts[1] > counts[0] and counts[2] < counts[1]


def test_a_system_prompt_starts_a_new_conversation(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = chat(monkeypatch, capsys, path, ["hello"])
    typed = chat(monkeypatch, capsys, path, ["/system Be brief.", "hello"])
    option = chat(monkeypatch, capsys, path, ["hello"], "--system", "Be brief.")
    counts = [int(figures[0].split()[1]) for figures in (plain, typed, option)]
    assert counts[0] < counts[1] == counts[2]


def test_an_unknown_command_from_a_pipe_is_an_error(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/frobnicate\n"))
    assert main(["chat", str(path)]) == 2
    assert "/frobnicate is not a command" in capsys.readouterr().err


def damage(path: Path, tmp_path: Path, file: str, change: Callable[[bytearray], None]) -> Path:
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    data = bytearray((copy / file).read_bytes())
    change(data)
    (copy / file).write_bytes(data)
    return copy


def flip_last_bit(data: bytearray) -> None:
    data[-1] ^= 1


def cut_last_byte(data: bytearray) -> None:
    del data[-1]


@pytest.mark.parametrize("change", [flip_last_bit, cut_last_byte])
@pytest.mark.parametrize("file", ["dense.safetensors", "experts/layer-001.safetensors"])
def test_a_damaged_artifact_is_refused_by_name_before_any_text(
    path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: Callable[[bytearray], None],
) -> None:
    copy = damage(path, tmp_path, file, change)
    assert main(["run", str(copy), "hello"]) == 3
    shown = capsys.readouterr()
    assert file in shown.err
    assert shown.out == ""


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(path), "hello " * 600]) == 2
    shown = capsys.readouterr()
    assert "the context holds 512" in shown.err
    assert "shorten the prompt" in shown.err
