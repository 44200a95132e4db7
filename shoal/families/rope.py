"""RoPE's inverse frequencies from a config, the same float32 bits on every CPU.

They are part of a model's identity, so no libm: powers are taken with Python's decimal arithmetic,
which is exact integer work, at 60 digits, and rounded once.
"""

import decimal
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UnsupportedModel
from shoal.families.config import Config

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
DIGITS = 60
SMALLEST, LARGEST = Decimal("1e-37"), Decimal("1e38")  # normal float32 numbers, with room
SCALINGS = ("default", "linear", "llama3", "factors")  # the last: GGUF's rope_freqs.weight


def inverse_frequencies(
    config: Config, rotary_dim: int, default_theta: float
) -> NDArray[np.float32]:
    """Return theta^(-2i / rotary_dim), scaled as the config says: [rotary_dim / 2] float32.

    Both config styles are read: `rope_parameters`, and `rope_theta` beside `rope_scaling`.

    Raises: UnsupportedModel for a scaling that is not default, linear or llama3.
    Source: transformers' modeling_rope_utils.py.
    """
    theta = Decimal(_theta(config, default_theta))
    scaling = _scaling(config)
    with decimal.localcontext(decimal.Context(prec=DIGITS)):
        log = theta.ln()
        plain = [(-log * (2 * i) / rotary_dim).exp() for i in range(rotary_dim // 2)]
        match kind := checked_rope_type(config):
            case "default":
                scaled = plain
            case "linear":
                factor = Decimal(scaling.number("factor"))
                scaled = [frequency / factor for frequency in plain]
            case "llama3":
                scaled = _llama3(scaling, plain)
            case "factors":
                scaled = _divided(scaling, plain)
            case _:
                raise AssertionError(f"checked_rope_type let {kind!r} pass")
    if not all(SMALLEST < frequency < LARGEST for frequency in scaled):
        raise UnsupportedModel(f"config: rope_theta = {theta}: frequencies leave float32's range")
    return np.array([float(frequency) for frequency in scaled], dtype=np.float32)


def checked_rope_type(config: Config) -> str:
    """Return the name of RoPE's scaling, `default` where there is none.

    Raises: UnsupportedModel for one that we do not implement.
    """
    values = _scaling(config).values
    kind = str(values.get("rope_type") or values.get("type") or "default")
    if kind not in SCALINGS:
        raise UnsupportedModel(
            f"config: RoPE scaling {kind!r} is not implemented: {', '.join(SCALINGS[:-1])} are"
        )
    return kind


def _theta(config: Config, default: float) -> float:
    nested = config.section("rope_parameters")
    source = nested if "rope_theta" in nested.values else config
    return source.number("rope_theta", default)


def _scaling(config: Config) -> Config:
    nested = config.section("rope_parameters")
    return nested if nested.values else config.section("rope_scaling")


def _llama3(scaling: Config, plain: list[Decimal]) -> list[Decimal]:
    factor = Decimal(scaling.number("factor"))
    low = Decimal(scaling.number("low_freq_factor"))
    high = Decimal(scaling.number("high_freq_factor"))
    context = Decimal(scaling.integer("original_max_position_embeddings"))
    if low == high:
        raise UnsupportedModel("config: low_freq_factor equals high_freq_factor")
    scaled: list[Decimal] = []
    for frequency in plain:
        turns = context * frequency / (2 * PI)  # over the original context
        if turns < low:
            scaled.append(frequency / factor)
        elif turns > high:
            scaled.append(frequency)
        else:
            smooth = (turns - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


def _divided(scaling: Config, plain: list[Decimal]) -> list[Decimal]:
    """GGUF files carry llama3's scaling as a tensor of divisors, `rope_freqs.weight`."""
    factors = scaling.values.get("factors")
    if not isinstance(factors, list) or len(factors) != len(plain):
        raise UnsupportedModel(f"rope_freqs.weight must hold {len(plain)} factors")
    if not all(0 < factor < float("inf") for factor in factors):
        raise UnsupportedModel("rope_freqs.weight holds a factor that is not positive and finite")
    return [
        frequency / Decimal(float(factor)) for frequency, factor in zip(plain, factors, strict=True)
    ]
