"""Compile the kernels for machines and compilers that are not this one, and compare their digests.

python tools/cross_check.py [TARGET ...]     part of `make check`

The target `clang` is this machine with the other compiler; the aarch64 ones are made by zig, which
PyPI has, for Linux (run under qemu-aarch64 where that is installed) and for macOS (compiled only).
kernels/tests/digest_main.cpp prints a digest of every op: where it can run, its output must be
shoal/golden_digests.txt. A target is skipped when nothing that it reads has changed.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
MAIN = KERNELS / "tests" / "digest_main.cpp"
GOLDEN = ROOT / "shoal" / "golden_digests.txt"
BUILD = ROOT / "build" / "cross"
ZIG = [sys.executable, "-m", "ziglang", "c++"]
WIDE = ("avx2", "avxvnni", "avx512", "amx")  # what such a file's name ends in
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-O2", "-pthread"]


@dataclass(frozen=True, slots=True)
class Target:
    """A compiler, and how its program is run here.

    runner None: it cannot run, so it is compiled and not linked (zig builds a C++ library to link
    with, which takes minutes the first time).
    """

    name: str
    compiler: list[str]
    link_flags: list[str]
    runner: list[str] | None
    x86: bool


def targets() -> list[Target]:
    """Return what this machine can check."""
    found = []
    if clang := shutil.which("clang++"):
        is_x86 = platform.machine() in ("x86_64", "AMD64")
        found.append(Target("clang", [clang], [], [], is_x86))
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    linux = [*ZIG, "-target", "aarch64-linux-musl"]
    found.append(Target("aarch64-linux-musl", linux, ["-static"], [qemu] if qemu else None, False))
    found.append(Target("aarch64-macos", [*ZIG, "-target", "aarch64-macos"], [], None, False))
    return found


def sources(target: Target) -> list[Path]:
    """Return the kernel files that know no Python, as CMakeLists.txt chooses them."""
    files = [p for p in sorted(KERNELS.glob("*.cpp")) if not p.name.startswith("bind")]
    return (
        files
        if target.x86
        else [p for p in files if not p.stem.endswith(tuple(f"_{isa}" for isa in WIDE))]
    )


def isa_flags(source: Path) -> list[str]:
    """Return the instruction-set flags that CMakeLists.txt gives to that file."""
    for isa in WIDE:
        if source.stem.endswith(f"_{isa}"):
            text = (ROOT / "CMakeLists.txt").read_text()
            found = re.search(rf"set\(SHOAL_{isa.upper()}_FLAGS ([^)]*)\)", text)
            assert found, f"CMakeLists.txt sets no SHOAL_{isa.upper()}_FLAGS"
            return found[1].split()
    return []


def fingerprint(target: Target) -> str:
    """Hash everything that the target's result depends on."""
    digest = hashlib.sha256(repr(target).encode())
    inputs = [
        *KERNELS.rglob("*.cpp"),
        *KERNELS.rglob("*.h"),
        ROOT / "CMakeLists.txt",
        Path(__file__),
    ]
    for path in sorted(inputs) + ([GOLDEN] if GOLDEN.exists() else []):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)  # zig leaves an empty a.o where it tells its version
    version = [*target.compiler, "--version"]
    told = subprocess.run(version, capture_output=True, check=True, cwd=BUILD)
    digest.update(told.stdout)
    return digest.hexdigest()


def build(target: Target) -> list[Path]:
    """Compile the kernels and the digest program. Raises CalledProcessError."""
    folder = BUILD / target.name
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        out = folder / (source.stem + ".o")
        flags = [*FLAGS, *isa_flags(source), f"-I{KERNELS}", "-c", str(source), "-o", str(out)]
        subprocess.run([*target.compiler, *flags], check=True)
        return out

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, [*sources(target), MAIN]))


def link_and_run(target: Target, runner: list[str], objects: list[Path]) -> str:
    """Return what the digest program prints. Raises CalledProcessError."""
    program = BUILD / target.name / "digests"
    linked = [*target.compiler, *target.link_flags, "-pthread", *map(str, objects)]
    subprocess.run([*linked, "-o", str(program)], check=True)
    run = [*runner, str(program)]
    return subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout


def by_isa(digests: str) -> dict[str, str]:
    """Split the digest program's output: each `# isa` starts a copy of the golden file."""
    parts = [part.partition("\n") for part in digests.split("# ")[1:]]
    return {isa: text for isa, _, text in parts}


def check(target: Target) -> str:
    """Build for the target, run where possible; return one line for people. Raises SystemExit."""
    stamp = BUILD / target.name / "passed"
    print_of_now = fingerprint(target)
    if stamp.exists() and stamp.read_text() == print_of_now:
        return "unchanged since it passed"
    line = "compiles"
    try:
        objects = build(target)
        if target.runner is not None:
            digests = link_and_run(target, target.runner, objects)
            isas = [isa for isa, text in by_isa(digests).items() if text == GOLDEN.read_text()]
            if len(isas) != len(by_isa(digests)) or not isas:
                differing = BUILD / target.name / "digests.txt"
                differing.write_text(digests)
                sys.exit(f"{target.name}: digests differ: diff {GOLDEN} {differing}")
            line = f"compiles, runs, and gives the golden digests ({', '.join(isas)})"
    except subprocess.CalledProcessError as error:
        sys.exit(f"{target.name}: {error}")
    stamp.write_text(print_of_now)
    return line


def main() -> None:
    """Check the targets named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*")
    wanted = parser.parse_args().target
    for target in targets():
        if not wanted or target.name in wanted:
            print(f"{target.name}: {check(target)}", flush=True)


if __name__ == "__main__":
    main()
