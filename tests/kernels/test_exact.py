"""The same bits for any number of rows and threads, on every instruction set, from fresh objects.

Compiles the kernels without Python, so that AVX-VNNI, AVX-512 and AMX can be emulated where the CPU
lacks them (SIMDe, and a model of the tile registers), and every object can be searched for symbols
that a linker might share between instruction sets.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from shoal import ops
from support.compiling import compile_objects

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
COMPILER = shutil.which("g++") or shutil.which("clang++")
SIMDE = Path("/usr/include/simde/x86/avx512.h")
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-w", "-Wno-psabi", f"-I{KERNELS}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
WIDE = {
    "_avxvnni": [*AVX2, "-mavxvnni"],
    "_avx512": AVX512,
    "_amx": [*AVX512, "-mamx-tile", "-mamx-int8"],
}
ISAS = ("scalar", "avx2", "avxvnni", "avx512", "amx")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 kernels"),
]


def flags_of(source: Path, emulate: bool) -> list[str]:
    if source.stem.endswith("_avx2"):
        return [*FLAGS, *AVX2]
    for ending, flags in WIDE.items():
        if source.stem.endswith(ending):
            emulated = [*AVX2, f"-isystem{KERNELS / 'tests' / 'simde'}"]
            return [*FLAGS, *(emulated if emulate else flags)]
    return FLAGS


def test_matrix_products_and_expert_calls_are_bit_identical(tmp_path: Path) -> None:
    assert COMPILER is not None
    emulate = "avx512" not in ops.available_isas() and SIMDE.exists()
    names = "matmul expert_sums pack tiles thread_pool quantise_scalar quantise_avx2"
    sources = [KERNELS / f"{name}.cpp" for name in names.split()]
    sources += [KERNELS / f"matmul_{isa}.cpp" for isa in ISAS]
    features = "tests/emulated_features.cpp" if emulate else "cpu_features.cpp"
    sources += [KERNELS / features, KERNELS / "tests" / "matrices_exact.cpp"]
    jobs = [(source, flags_of(source, emulate)) for source in sources]
    objects = compile_objects(COMPILER, jobs, tmp_path)
    program = tmp_path / "matrices_exact"
    subprocess.run([COMPILER, "-pthread", *objects, "-o", str(program)], check=True)
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout
    expected = ISAS if emulate else ops.available_isas()
    assert ran.stdout.splitlines()[0] == "instruction sets: " + " ".join(expected)
    digests = [line.split("digest ")[1] for line in ran.stdout.splitlines() if "digest" in line]
    assert digests == GOLDEN, ran.stdout


# What every machine, compiler and optimisation level gives; a change is a new numerics version.
GOLDEN = [
    "4d42aa7d885e5872", "f01432349b0dc413", "69d05ae50df7851b", "635f0c2a002cf6d9",
    "3ae1dded8bac883a", "4441d7360df0f535", "7fed6893f416e478", "4d0d11c4b851cc0e",
    "01a4cd6ff499fcb0", "3b493c64872ad1b2", "047177a22efb5b09", "6638a65aadcfe1e9",
    "f54462138974c26c", "ce4d917ca581d966", "b231e9be4ec08cae", "e83902dd0345e393",
    "faae40e7f4210633", "4c623f28d7fd24ee", "f2dced8f5d903388", "62744a5546f277c0",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize(
    "source",
    sorted(path for path in KERNELS.glob("*_a*.cpp") if path.stem.endswith(("_avx2", *WIDE))),
    ids=lambda path: path.stem,
)
def test_objects_of_an_instruction_set_share_no_symbol(source: Path, tmp_path: Path) -> None:
    """A weak symbol compiled for AVX-512 could be the one that an older CPU gets."""
    assert COMPILER is not None
    jobs = [(source, flags_of(source, emulate=False))]
    [compiled] = compile_objects(COMPILER, jobs, tmp_path)
    listed = subprocess.run(
        ["nm", "--defined-only", "-C", compiled], check=True, capture_output=True, text=True
    )
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    weak = [name for kind, name in symbols if kind in "WVuw"]
    exported = [name for kind, name in symbols if kind.isupper() and kind not in "WV"]
    assert weak == []
    assert exported, "nothing exported: the file is not a table of kernels"
    assert all(name.startswith("shoal::k") for name in exported), exported
