"""The `shoal` command: finding verbs, and what becomes of failures."""

import importlib
import inspect
import io
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from client import cli, doctor
from shoal import __version__, errors

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert [verb for verb in cli.VERBS if f"\n  {verb} " not in printed] == []


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"shoal {__version__}\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_of_the_table_is_there(verb: str) -> None:
    module, _, name = cli.VERBS[verb].target.partition(":")
    function = getattr(importlib.import_module(module), name)
    parts = [function]
    if isinstance(function, typer.Typer):  # a verb of several commands
        parts = [command.callback for command in function.registered_commands]
    assert parts and all(map(inspect.isfunction, parts))
    assert all(map(inspect.getdoc, parts)), "typer shows the docstring as the verb's help"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert f"Usage: shoal {verb}" in capsys.readouterr().out


def test_a_misspelt_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["covnert"]) == 2
    assert "did you mean `shoal convert`?" in capsys.readouterr().err


def test_a_word_near_no_verb_is_answered_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["zzzzzz"]) == 2
    assert "run, chat, node" in capsys.readouterr().err


def test_an_option_before_the_verb_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--json", "run"]) == 2
    assert "options follow the verb" in capsys.readouterr().err


def test_a_verbs_own_usage_error_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--no-such-option"]) == 2
    assert "no-such-option" in capsys.readouterr().err


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a verb whose body raises `error`; return the exit status."""

    def body(as_json: bool = False) -> None:
        raise error

    monkeypatch.setattr(doctor, "doctor", body)
    return cli.main(["doctor"])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (errors.UsageError("the flag is wrong"), 2, "error: the flag is wrong\n"),
        (errors.CorruptArtifact("a.shoal: bad"), 3, "error: a.shoal: bad\n"),
        (errors.NodeUnreachable("nobody at a:1"), 4, "error: nobody at a:1\n"),
        (errors.NumericsMismatch("exp differs"), 6, "error: exp differs\n"),
        (OSError(28, "No space left on device", "/x"), 1, "error: /x: No space left on device\n"),
        (MemoryError(), 1, "error: out of memory\n"),
    ],
)
def test_an_operating_error_is_one_line_and_a_status(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SHOAL_DEBUG", raising=False)
    assert raising(error, monkeypatch) == status
    assert capsys.readouterr().err == message


def test_debug_adds_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    assert raising(errors.UsageError("wrong"), monkeypatch) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(ZeroDivisionError("oops"), monkeypatch) == cli.EXIT_BUG
    printed = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in printed
    assert "bug in shoal" in printed


def test_an_interrupt_exits_as_a_shell_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    assert raising(KeyboardInterrupt(), monkeypatch) == 130


def test_colour_is_for_terminals_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, terminal = io.StringIO(), Terminal()
    for out in (stream, terminal):
        cli._report(errors.UsageError("wrong"), out)
    assert stream.getvalue() == "error: wrong\n"
    assert "\x1b[" in terminal.getvalue()


def test_every_exit_status_is_documented() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    classes = [c for c in vars(errors).values() if inspect.isclass(c)]
    statuses = {c.exit_code for c in classes if issubclass(c, errors.ShoalError)}
    for status in statuses | {0, cli.EXIT_BUG, cli.EXIT_INTERRUPTED}:
        assert f"\n| {status} |" in page, status


@pytest.mark.processes
def test_help_imports_neither_typer_nor_a_service() -> None:
    code = "import sys; from client.cli import main; main(['--help']); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.splitlines()[-1].split())
    heavy = {"typer", "rich", "numpy", "grpc", "asyncio", "coordinator", "expert_node"}
    assert loaded & heavy == set()


@pytest.mark.processes
def test_a_closed_pipe_ends_the_command_quietly() -> None:
    code = "import sys; from client.cli import main; sys.exit(main(['--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == 1


@pytest.mark.processes
@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_waits_for_no_heavy_import(verb: str) -> None:
    code = (
        "import sys; from client.cli import main; main([sys.argv[1], '--help']);print(*sys.modules)"
    )
    run = [sys.executable, "-c", code, verb]
    ran = subprocess.run(run, capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.splitlines()[-1].split())
    heavy = {"numpy", "grpc", "gguf", "tokenizers", "rich", "structlog", "asyncio", "psutil"}
    assert loaded & heavy == set()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "others"),
    [
        (
            "from client.cli import main; main(['run', 'Once upon a time', '--max-tokens', '1'])",
            {"grpc", "google", "asyncio", "jinja2", "gguf", "rich", "prometheus_client"},
        ),
        ("import expert_node.app", {"grpc", "gguf", "rich", "prometheus_client", "tokenizers"}),
    ],
    ids=["run", "node"],
)
def test_a_start_imports_only_what_it_uses(code: str, others: set[str]) -> None:
    code += "; import sys; print(); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ran.stdout.splitlines()[-1].split()) & others == set()
