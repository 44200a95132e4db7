"""What the build promises: speed, exact arithmetic, one instruction set a file, one version."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import shoal

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "dev"
ELF = sys.platform == "linux"
WIDE = ("_avx2.cpp", "_avxvnni.cpp", "_avx512.cpp", "_amx.cpp")


def compile_commands() -> dict[str, list[str]]:
    """Return the command line that compiled each kernel file of the in-place build."""
    listing = BUILD / "compile_commands.json"
    assert listing.exists(), "no build to look at: run `make native`"
    return {
        Path(entry["file"]).name: shlex.split(entry["command"])
        for entry in json.loads(listing.read_text())
        if Path(entry["file"]).parent == ROOT / "kernels"
    }


def objects() -> dict[str, Path]:
    """Return the object file of each kernel file."""
    return {p.name.removesuffix(".o"): p for p in BUILD.glob("CMakeFiles/**/kernels/*.cpp.o")}


def test_every_kernel_file_is_compiled() -> None:
    assert set(compile_commands()) >= {"bindings.cpp", "thread_pool.cpp"}
    assert set(objects()) == set(compile_commands())


def test_every_kernel_file_is_compiled_for_speed() -> None:
    # The last -O wins, and nanobind appends -Os unless told not to: half the speed.
    levels = {
        name: [flag for flag in command if flag.startswith("-O")]
        for name, command in compile_commands().items()
    }
    assert {name: flags for name, flags in levels.items() if not flags or flags[-1] != "-O3"} == {}


def test_no_kernel_file_may_fuse_or_reorder_float_operations() -> None:
    for name, command in compile_commands().items():
        contracting = [flag for flag in command if flag.startswith("-ffp-contract")]
        assert contracting == ["-ffp-contract=off"], name
        assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"} & set(command), name


def test_a_file_gets_the_flags_of_its_instruction_set_alone() -> None:
    for name, command in compile_commands().items():
        wide = [flag for flag in command if re.match(r"-m(avx|fma|f16c|arch|cpu|tune)", flag)]
        assert bool(wide) == name.endswith(WIDE), (name, wide)


@pytest.mark.skipif(not ELF or shutil.which("nm") is None, reason="needs ELF objects and nm")
def test_no_wide_instruction_can_leak_through_a_shared_symbol() -> None:
    # The linker keeps one copy of a weak symbol (an inline function, a template): were it the AVX
    # one, a CPU without AVX would run it.
    wide = {n: p for n, p in objects().items() if n.endswith(WIDE)}
    for name, path in wide.items():
        ran = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = [line for line in ran.stdout.splitlines() if re.match(r"\S* +[WVu] ", line)]
        assert weak == [], name


@pytest.mark.skipif(not ELF or shutil.which("objdump") is None, reason="needs objdump")
def test_baseline_files_hold_no_wide_instruction() -> None:
    baseline = {n: p for n, p in objects().items() if not n.endswith(WIDE)}
    for name, path in baseline.items():
        ran = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True)
        assert re.search(r"%[yz]mm", ran.stdout) is None, name


def test_there_is_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == shoal.__version__
    assert f"## {shoal.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_cannot_reach_a_public_index() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]


def test_the_console_script_is_the_command_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"shoal": "client.cli:main"}
