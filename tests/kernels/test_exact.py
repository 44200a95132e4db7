"""The same bits for any number of rows and threads, on every instruction set, from fresh objects.

Compiles the kernels without Python, so that AVX-512 can be emulated where the CPU lacks it (SIMDe)
and every object can be searched for symbols that a linker might share between instruction sets.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from shoal import ops

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
COMPILER = shutil.which("g++") or shutil.which("clang++")
SIMDE = Path("/usr/include/simde/x86/avx512.h")
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-w", "-Wno-psabi", f"-I{KERNELS}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 kernels"),
]


def compile_object(source: Path, into: Path, flags: list[str]) -> Path:
    assert COMPILER is not None
    target = into / f"{source.stem}.o"
    command = [COMPILER, *FLAGS, *flags, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def flags_of(source: Path, emulate: bool) -> list[str]:
    if source.stem.endswith("_avx2"):
        return AVX2
    if source.stem.endswith("_avx512"):
        return [*AVX2, f"-isystem{KERNELS / 'tests' / 'simde'}"] if emulate else AVX512
    return []


def test_matrix_products_and_expert_calls_are_bit_identical(tmp_path: Path) -> None:
    assert COMPILER is not None
    emulate = "avx512" not in ops.available_isas() and SIMDE.exists()
    names = "matmul expert_sums pack tiles thread_pool quantise_scalar quantise_avx2"
    sources = [KERNELS / f"{name}.cpp" for name in names.split()]
    sources += [KERNELS / f"matmul_{isa}.cpp" for isa in ("scalar", "avx2", "avx512")]
    features = "tests/emulated_features.cpp" if emulate else "cpu_features.cpp"
    sources += [KERNELS / features, KERNELS / "tests" / "matrices_exact.cpp"]
    objects = [
        str(compile_object(source, tmp_path, flags_of(source, emulate))) for source in sources
    ]
    program = tmp_path / "matrices_exact"
    subprocess.run([COMPILER, "-pthread", *objects, "-o", str(program)], check=True)
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout
    expected = ops.available_isas() + (("avx512",) if emulate else ())
    assert ran.stdout.splitlines()[0] == "instruction sets: " + " ".join(expected)
    digests = [line.split("digest ")[1] for line in ran.stdout.splitlines() if "digest" in line]
    assert digests == GOLDEN, ran.stdout


# What every machine, compiler and optimisation level gives; a change is a new numerics version.
GOLDEN = [
    "34b51cb1981f74e6", "62a7eda9aa1fee40", "9614d2f531cd92f3", "5cbbd5e4c1776e19",
    "bdac05afaf57119d", "da8e1d8c5a74c998", "bfac03edd87134e9", "e30f732dab650758",
    "ca126a78678b4b2c", "9a3097863eed0f91", "8b23bb41fef8c5d9", "467d9e47e931bd6c",
    "e1e48c0e77f5f6c1", "0a568c65ffacc321", "91a8034eb92c2bc8", "7b9b409ac070b085",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*_avx*.cpp")), ids=lambda path: path.stem)
def test_objects_of_an_instruction_set_share_no_symbol(source: Path, tmp_path: Path) -> None:
    """A weak symbol compiled for AVX-512 could be the one that an older CPU gets."""
    compiled = compile_object(source, tmp_path, flags_of(source, emulate=False))
    listed = subprocess.run(
        ["nm", "--defined-only", "-C", str(compiled)], check=True, capture_output=True, text=True
    )
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    weak = [name for kind, name in symbols if kind in "WVuw"]
    exported = [name for kind, name in symbols if kind.isupper() and kind not in "WV"]
    assert weak == []
    assert exported, "nothing exported: the file is not a table of kernels"
    assert all(name.startswith("shoal::k") for name in exported), exported
