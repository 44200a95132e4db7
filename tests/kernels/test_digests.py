"""This build gives the golden digests on every instruction set; AVX-512 emulated if need be."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal import numerics, ops
from shoal.errors import NumericsMismatch
from support.compiling import compile_objects

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
GOLDEN = numerics.GOLDEN_PATH.read_text()
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
FLAGS = ["-std=c++17", "-ffp-contract=off", "-O0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ON_X86 = "avx2" in ops.available_isas()
HAS_SIMDE = Path("/usr/include/simde/x86/avx512.h").exists()


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


def test_this_build_reproduces_the_golden_digests(isa: str) -> None:
    assert numerics.verify() == numerics.NUMERICS
    assert re.fullmatch("[0-9a-f]{64}", numerics.NUMERICS)


def test_digests_do_not_depend_on_the_threads() -> None:
    threads = ops.num_threads()
    try:
        for count in (1, 2, 4):
            ops.set_threads(count)
            assert numerics.compute() == GOLDEN
    finally:
        ops.set_threads(threads)


def test_every_op_has_a_digest_of_its_own() -> None:
    lines = [line.split() for line in GOLDEN.splitlines()]
    assert len({digest for _, _, digest in lines}) == len(lines), "two ops have one digest"
    covered = {op for op, _, _ in lines}
    named_otherwise = {
        "embed": "unpack",
        "unpack_matrix": "unpack",
        "quantise_q4_k": "quantise_weights",
        "quantise_table": "quantise_weights",
        "logprob_of": "top_logprobs",
        "unpack_add_sums": "pack_sums",
        "unpack_add_bf16": "pack_bf16",
        "pack_matrix": "unpack",
        "pack_rows": "unpack",
        "pack_expert": "expert_ffn",
        "unpack_expert": "unpack",
    }
    computing = {name for name in ops.__all__ if name.islower()} - {
        "aligned_empty", "available_isas", "isa", "set_isa", "num_threads", "set_threads",
        "check_finite", "kv_shape",
    }  # fmt: skip
    assert {named_otherwise.get(name, name) for name in computing} <= covered


def test_a_kernel_that_computes_other_bits_is_named() -> None:
    line = next(line for line in GOLDEN.splitlines() if line.startswith("attention f16 "))
    wrong = GOLDEN.replace(line, "attention f16 0000000000000000")
    with pytest.raises(NumericsMismatch, match=r"attention f16 on avx2.*1 of"):
        numerics.check(wrong, GOLDEN, "avx2")
    with pytest.raises(NumericsMismatch, match="nothing"):
        numerics.check(GOLDEN.replace(line + "\n", ""), GOLDEN, "scalar")


@pytest.mark.processes
@pytest.mark.skipif(
    not ON_X86 or not COMPILERS or not HAS_SIMDE, reason="needs a compiler and libsimde-dev"
)
def test_emulated_avx512_reproduces_the_golden_digests(tmp_path: Path) -> None:
    """The whole of kernels/ in one program: scalar and AVX2 natively, AVX-512 through SIMDe."""
    tests = KERNELS / "tests"
    every = {path for path in KERNELS.glob("*.cpp") if not path.name.startswith("bind")}
    avx512 = {path for path in every if path.stem.endswith("_avx512")}
    avx2 = {path for path in every if path.stem.endswith("_avx2")}
    plain = every - avx512 - avx2 - {KERNELS / "cpu_features.cpp"}
    plain |= {tests / "digest_main.cpp", tests / "emulated_features.cpp"}
    emulated = [*AVX2, "-isystem", str(tests / "simde")]
    compiler = COMPILERS[0]
    jobs = [(path, [*FLAGS, *emulated]) for path in sorted(avx512)]  # what takes longest is first
    jobs += [(path, [*FLAGS, *AVX2]) for path in sorted(avx2)]
    jobs += [(path, FLAGS) for path in sorted(plain)]
    objects = compile_objects(compiler, jobs, tmp_path)
    program = tmp_path / "digests"
    link = [compiler, *objects, "-pthread", "-o", str(program)]
    subprocess.run(link, check=True, capture_output=True, timeout=120)
    run = subprocess.run([program], check=True, capture_output=True, text=True, timeout=120)
    sections = run.stdout.split("# ")[1:]
    names = [section.partition("\n")[0] for section in sections]
    assert names == ["scalar", "avx2", "avx512"]
    for name, section in zip(names, sections, strict=True):
        numerics.check(section.partition("\n")[2], GOLDEN, name)
