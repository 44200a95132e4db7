"""Our Q4_K quantiser: bytes fixed for ever, error no larger than llama.cpp's search."""

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.ops_reference import matrices as reference
from shoal.quant import Format
from support.q4_k_search import quantise_like_llama_cpp

F32 = NDArray[np.float32]


def weights(kind: str, rows: int) -> F32:
    """Weights from integers and IEEE arithmetic alone: the same floats on every machine."""
    rng = np.random.Generator(np.random.PCG64(5))
    uniform = rng.integers(-(2**23), 2**23, (4, rows, 512)).astype(np.float32) / np.float32(2**23)
    bell = (uniform[0] + uniform[1]) + (uniform[2] + uniform[3])
    heavy = np.where(rng.integers(0, 50, bell.shape) == 0, np.float32(8), np.float32(1))
    made: dict[str, F32] = {
        "bell": bell * np.float32(0.03),
        "outliers": bell * heavy * np.float32(0.02),
        "one-sided": np.abs(bell) * np.float32(0.01),
        "tiny": bell * np.float32(1e-5),
    }
    return made[kind]


def squared_error(blocks: NDArray[np.uint8], values: F32) -> float:
    difference = reference.dequantise(Format.Q4_K, blocks) - values
    return float(np.sum(difference**2))


@pytest.mark.parametrize("kind", ["bell", "outliers", "one-sided", "tiny"])
def test_the_error_is_no_larger_than_that_of_llama_cpps_search(kind: str) -> None:
    values = weights(kind, 8)
    ours = squared_error(ops.quantise_q4_k(values), values)
    theirs = squared_error(quantise_like_llama_cpp(values), values)
    assert 0 < ours <= theirs, (ours, theirs)


def test_the_bytes_are_fixed_on_every_instruction_set_and_thread_count() -> None:
    """They decide an artifact's identity: a change of this digest is a new format version."""
    values = np.concatenate([weights(k, 3) for k in ("bell", "outliers", "one-sided", "tiny")])
    isa, threads = ops.isa(), ops.num_threads()
    digests = set()
    for name in ops.available_isas():
        for n in (1, 3):
            ops.set_isa(name)
            ops.set_threads(n)
            digests.add(hashlib.sha256(ops.quantise_q4_k(values).tobytes()).hexdigest()[:16])
    ops.set_isa(isa)
    ops.set_threads(threads)
    assert digests == {"4685ed591f63a589"}


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, 1e-38])
def test_constant_and_extreme_blocks_stay_finite_and_close(value: float) -> None:
    values = np.full((1, 256), value, np.float32)
    blocks = ops.quantise_q4_k(values)
    assert ops.check_finite(Format.Q4_K, blocks)
    got = reference.dequantise(Format.Q4_K, blocks)
    if abs(value) in (0.0, 1.0):
        assert np.all(np.abs(got - values) <= 2e-3), got[0, 0]


def test_a_matrix_that_fits_the_format_is_kept() -> None:
    """Integers 0..15 times one scale, minus one minimum: nothing to lose but f16 rounding."""
    quants = np.random.default_rng(2).integers(0, 16, (4, 256)).astype(np.float32)
    quants[:, ::32], quants[:, 1::32] = 0, 15  # every sub-block has the same range
    values = (quants - 6) * np.float32(0.0625)
    got = reference.dequantise(Format.Q4_K, ops.quantise_q4_k(values))
    assert np.max(np.abs(got - values)) < 1e-3 * 0.0625 * 15
