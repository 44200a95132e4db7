"""This build gives the golden digests on every instruction set; what the CPU lacks is emulated."""

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
        "add_branch": "finish_sums",
        "expert_table": "expert_sums",
        "run_layers": "expert_sums",
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
        "aligned_empty", "available_isas", "isa", "set_isa", "num_threads", "rest_threads",
        "set_threads",
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


@pytest.mark.parametrize(
    ("on_amx", "chosen", "used"),
    [(GOLDEN, "", "amx"), ("", "", "avx512"), (GOLDEN, "avx512", "avx512")],
)
def test_amx_is_used_if_its_digests_hold_and_nobody_chose_otherwise(
    on_amx: str, chosen: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_use = ["avx512"]
    monkeypatch.setenv("SHOAL_ISA", chosen)
    monkeypatch.setattr(numerics, "available_isas", lambda: ("scalar", "avx2", "avx512", "amx"))
    monkeypatch.setattr(numerics, "isa", lambda: in_use[-1])
    monkeypatch.setattr(numerics, "set_isa", in_use.append)
    monkeypatch.setattr(numerics, "compute", lambda: on_amx if in_use[-1] == "amx" else GOLDEN)
    assert numerics.verify() == numerics.NUMERICS
    assert in_use[-1] == used


@pytest.mark.processes
@pytest.mark.skipif(
    not ON_X86 or not COMPILERS or not HAS_SIMDE, reason="needs a compiler and libsimde-dev"
)
def test_emulated_avx512_and_amx_reproduce_the_golden_digests(tmp_path: Path) -> None:
    """The whole of kernels/ in one program: scalar and AVX2 natively, AVX-512 through SIMDe.

    AMX by a model of its tile registers.
    """
    tests = KERNELS / "tests"
    every = {path for path in KERNELS.glob("*.cpp") if not path.name.startswith("bind")}
    wide = {path for path in every if path.stem.endswith(("_avxvnni", "_avx512", "_amx"))}
    avx2 = {path for path in every if path.stem.endswith("_avx2")}
    plain = every - wide - avx2 - {KERNELS / "cpu_features.cpp"}
    plain |= {tests / "digest_main.cpp", tests / "emulated_features.cpp"}
    emulated = [*AVX2, "-isystem", str(tests / "simde")]
    compiler = COMPILERS[0]
    jobs = [(path, [*FLAGS, *emulated]) for path in sorted(wide)]  # what takes longest is first
    jobs += [(path, [*FLAGS, *AVX2]) for path in sorted(avx2)]
    jobs += [(path, FLAGS) for path in sorted(plain)]
    objects = compile_objects(compiler, jobs, tmp_path)
    program = tmp_path / "digests"
    link = [compiler, *objects, "-pthread", "-o", str(program)]
    subprocess.run(link, check=True, capture_output=True, timeout=120)
    run = subprocess.run([program], check=True, capture_output=True, text=True, timeout=120)
    sections = run.stdout.split("# ")[1:]
    names = [section.partition("\n")[0] for section in sections]
    assert names == ["scalar", "avx2", "avxvnni", "avx512", "amx"]
    for name, section in zip(names, sections, strict=True):
        numerics.check(section.partition("\n")[2], GOLDEN, name)
