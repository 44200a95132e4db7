"""Sampling against an independent one in float64 and Python integers, and its own promises."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal import ops
from shoal.errors import NumericError, RequestError
from shoal.ops import SamplingParams
from shoal.ops_reference import floats as reference
from support.isas import same_bits_everywhere

F32 = NDArray[np.float32]
NOTHING = np.zeros(0, np.int32)


def logits_of(seed: int, vocab: int, spread: float = 3.0) -> F32:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(vocab) * spread).astype(np.float32)


def expected_token(
    logits: F32, params: SamplingParams, history: NDArray[np.int32], key: tuple[int, int, int]
) -> tuple[int, float]:
    """Return the token and by how much it beat the next (small: roundings may decide)."""
    adjusted = reference.adjusted(logits.astype(np.float64), params, history)
    if params.temperature > 0:
        adjusted = adjusted / params.temperature
        kept = reference.candidates(adjusted, params)
        values = [(adjusted[i] + reference.gumbel(*key, i), i) for i in kept]
    else:
        values = [(value, i) for i, value in enumerate(adjusted)]
    values.sort(key=lambda pair: (-pair[0], pair[1]))
    return values[0][1], float(values[0][0] - values[1][0]) if len(values) > 1 else math.inf


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "repetition_penalty": 0.7, "top_p": 0.95},
    {"temperature": 2.0, "logit_bias": ((3, 5.0), (7, -math.inf), (100, -2.0))},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_those_of_the_definition(case: dict[str, Any]) -> None:
    params = SamplingParams(**case)
    history = np.array([3, 3, 17, 100, 3], np.int32)
    drawn = set()
    for position in range(40):
        logits = logits_of(position, 300)
        key = (0x123456789ABCDEF0, position % 3, position)
        token, margin = expected_token(logits, params, history, key)
        drawn.add(ops.sample(logits, params, history, *key))
        if margin > 1e-5:
            assert ops.sample(logits, params, history, *key) == token, position
    assert len(drawn) > 20, "the cases are degenerate"


def test_philox_is_the_published_one() -> None:
    # Source: the known-answer tests of Random123, philox4x32 with 10 rounds.
    assert reference.philox((0, 0), (0, 0, 0, 0)) == (
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    )
    ones = 0xFFFFFFFF
    assert reference.philox((ones, ones), (ones, ones, ones, ones)) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert reference.philox((0xA4093822, 0x299F31D0), pi) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


def test_draws_have_the_frequencies_of_softmax() -> None:
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    logits = np.log(probabilities).astype(np.float32)
    params = SamplingParams(temperature=1.0)
    n = 20_000
    drawn = [ops.sample(logits, params, NOTHING, 7, 0, position) for position in range(n)]
    counts = np.bincount(drawn, minlength=6)
    chi_squared = float(((counts - n * probabilities) ** 2 / (n * probabilities)).sum())
    assert chi_squared < 20.5, counts  # 5 degrees of freedom: exceeded once in 1,000 seeds


@pytest.mark.parametrize("vocab", [1, 17, 1000, 50_000])
def test_the_same_token_everywhere(vocab: int) -> None:
    logits, history = logits_of(1, vocab), np.zeros(3, np.int32)
    params = [SamplingParams(**case) for case in CASES if "logit_bias" not in case]

    def op() -> list[NDArray[np.generic]]:
        tokens = [
            ops.sample(logits, p, history, 5, 1, position) for p in params for position in range(5)
        ]
        ids, logprobs = ops.top_logprobs(logits, min(vocab, 20))
        return [np.array(tokens), ids, logprobs, np.array([ops.logprob_of(logits, 0)])]

    same_bits_everywhere(op)


def test_seed_choice_and_position_each_change_the_noise() -> None:
    logits, params = np.zeros(1000, np.float32), SamplingParams(temperature=1.0)
    keys = [(1, 0, 0), (2, 0, 0), (1 + 2**32, 0, 0), (1, 1, 0), (1, 0, 1)]
    tokens = [ops.sample(logits, params, NOTHING, *key) for key in keys]
    assert len(set(tokens)) == len(keys), tokens


def test_ties_go_to_the_lower_id() -> None:
    logits = np.array([1, 5, 2, 5, 5, -0.0, 0.0], np.float32)
    assert ops.sample(logits, SamplingParams(), NOTHING, 0, 0, 0) == 1
    one = SamplingParams(temperature=1.0, top_k=1)
    assert {ops.sample(logits, one, NOTHING, 0, 0, p) for p in range(50)} == {1}
    two = SamplingParams(temperature=1.0, top_k=2)
    assert {ops.sample(logits, two, NOTHING, 0, 0, p) for p in range(50)} == {1, 3}
    assert ops.top_logprobs(logits, 7)[0].tolist() == [1, 3, 4, 2, 0, 5, 6]


def test_top_p_keeps_the_token_that_crosses_and_cuts_exactly() -> None:
    # Two tokens of equal mass: half of it is held by the first alone.
    logits = np.zeros(2, np.float32)
    half = SamplingParams(temperature=1.0, top_p=0.5)
    assert {ops.sample(logits, half, NOTHING, 0, 0, p) for p in range(50)} == {0}
    more = SamplingParams(temperature=1.0, top_p=0.5 + 2**-31)
    assert {ops.sample(logits, more, NOTHING, 0, 0, p) for p in range(50)} == {0, 1}
    tiny = SamplingParams(temperature=1.0, top_p=1e-12)
    assert {ops.sample(logits_of(3, 5000), tiny, NOTHING, 0, 0, p) for p in range(20)} == {
        int(logits_of(3, 5000).argmax())
    }


def test_a_flat_distribution_survives_top_p() -> None:
    # Thousands of candidates pass: the search for the cut has to widen several times.
    logits = logits_of(4, 20_000, spread=0.01)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    for position in range(5):
        token, margin = expected_token(logits, params, NOTHING, (9, 0, position))
        assert margin > 1e-5
        assert ops.sample(logits, params, NOTHING, 9, 0, position) == token


def test_min_p_keeps_what_reaches_its_share() -> None:
    logits = np.array([0.0, np.log(0.5), np.log(0.1)], np.float32)
    params = SamplingParams(temperature=1.0, min_p=0.2)
    assert {ops.sample(logits, params, NOTHING, 0, 0, p) for p in range(100)} == {0, 1}


def test_a_banned_token_is_never_drawn() -> None:
    logits = np.zeros(3, np.float32)
    banned = ((0, -math.inf), (2, -math.inf))
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, logit_bias=banned)
        assert {ops.sample(logits, params, NOTHING, 0, 0, p) for p in range(20)} == {1}
    everything = SamplingParams(logit_bias=(*banned, (1, -math.inf)))
    with pytest.raises(RequestError, match="every token is banned"):
        ops.sample(logits, everything, NOTHING, 0, 0, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.1, 30))
def test_logprobs_are_those_of_float64(seed: int, spread: float) -> None:
    logits = logits_of(seed, 500, spread)
    expected = reference.logprobs(logits.astype(np.float64))
    ids, logprobs = ops.top_logprobs(logits, 500)
    np.testing.assert_array_equal(ids, np.lexsort((np.arange(500), -logits)))
    # exp is right to 3e-7 relative, so the sum and its logarithm to 3e-7 absolute.
    np.testing.assert_allclose(logprobs, expected[ids], rtol=1e-6, atol=1e-6)
    assert ops.logprob_of(logits, int(ids[7])) == logprobs[7]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_logit_is_refused(value: float) -> None:
    logits = logits_of(0, 40)
    logits[39] = value
    with pytest.raises(NumericError):
        ops.sample(logits, SamplingParams(), NOTHING, 0, 0, 0)
    with pytest.raises(NumericError):
        ops.top_logprobs(logits, 1)
    with pytest.raises(NumericError):
        ops.logprob_of(logits, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": -101.0},
        {"seed": 2**64},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": ((-1, 1.0),)},
    ],
    ids=str,
)
def test_a_bad_parameter_is_named_with_its_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    logits = logits_of(0, 10)
    with pytest.raises(RequestError, match="logit_bias"):
        ops.sample(logits, SamplingParams(logit_bias=((10, 1.0),)), NOTHING, 0, 0, 0)
    with pytest.raises(RequestError, match="history"):
        ops.sample(logits, SamplingParams(), np.array([10], np.int32), 0, 0, 0)
