"""Inverse frequencies: right to the last bit of float32, scaled as transformers scales."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from shoal.errors import UnsupportedModel
from shoal.families.config import Config
from shoal.families.rope import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _frequencies(rotary_dim: int, theta: float, **config: Any) -> np.ndarray[Any, Any]:
    return inverse_frequencies(Config({"rope_theta": theta, **config}), rotary_dim, 10000.0)


@pytest.mark.parametrize(("rotary_dim", "theta"), [(64, 1e5), (128, 1e6), (48, 500000.0), (2, 1e4)])
def test_unscaled_frequencies_are_powers_of_theta(rotary_dim: int, theta: float) -> None:
    found = _frequencies(rotary_dim, theta)
    exact = [theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    # float64 has 29 bits more: half a unit in the last place of float32 is all that may remain
    assert np.abs(found / np.array(exact) - 1).max() <= 2.0**-24 * 1.001
    assert found.dtype == np.float32 and found[0] == 1.0


def test_the_bits_are_part_of_a_models_identity_and_never_change() -> None:
    digest = hashlib.sha256(_frequencies(64, 1e5).tobytes())
    digest.update(_frequencies(128, 5e5, rope_scaling=LLAMA3).tobytes())
    assert digest.hexdigest() == "014c5fadbfd58ef7af33a71409ffd84b0a61b2542afd4118e7da3e073ed13738"


def test_linear_scaling_divides_and_the_default_theta_is_the_familys() -> None:
    plain = _frequencies(32, 1e4)
    scaled = _frequencies(32, 1e4, rope_scaling={"type": "linear", "factor": 4.0})
    assert (scaled == plain / np.float32(4)).all()
    assert (inverse_frequencies(Config({}), 32, 1e4) == plain).all()


def test_llama3_scaling_keeps_fast_turns_and_slows_long_waves() -> None:
    plain = _frequencies(128, 5e5).astype(np.float64)
    found = _frequencies(128, 5e5, rope_scaling=LLAMA3)
    expected = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength > 8192:
            expected.append(frequency / 8)
        elif wavelength < 8192 / 4:
            expected.append(frequency)
        else:
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert np.abs(found / np.array(expected) - 1).max() < 1e-6
    assert (found == plain.astype(np.float32)).any() and (found < plain / 7.9).any()


def test_ggufs_factors_divide() -> None:
    factors = {"rope_type": "factors", "factors": [1.0, 2.0, 4.0, 3.0]}
    plain = _frequencies(8, 1e4)
    scaled = _frequencies(8, 1e4, rope_scaling=factors)
    assert (scaled[:3] == plain[:3] / np.array([1, 2, 4], np.float32)).all()
    for wrong in ([1.0, 2.0], [1.0, 2.0, 4.0, 0.0], [1.0, 2.0, 4.0, math.inf]):
        with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
            _frequencies(8, 1e4, rope_scaling={"rope_type": "factors", "factors": wrong})


@pytest.mark.parametrize("theta", [1e-300, 1e300])
def test_frequencies_beyond_float32_are_refused(theta: float) -> None:
    with pytest.raises(UnsupportedModel, match=r"leave float32's range"):
        _frequencies(64, theta)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su"])
def test_other_scalings_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"RoPE scaling '{kind}' is not implemented"):
        _frequencies(8, 1e4, rope_scaling={"rope_type": kind, "factor": 2.0})
