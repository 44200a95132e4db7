"""Norms, adds, rope and routing against float64, and bit for bit over instruction sets."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.errors import NumericError
from shoal.model_spec import RouterKind
from shoal.ops_reference import floats as reference
from support.isas import same_bits_everywhere

F32 = NDArray[np.float32]
ROWS = (1, 2, 3, 8, 17, 32, 512)


def normal(seed: int, *shape: int) -> F32:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    assert np.unique(values).size > values.size // 2, "inputs are degenerate"
    return values


def assert_is_rms_norm(op: Callable[[F32, F32, float], F32], dim: int) -> None:
    # Rows of many magnitudes; eps matters for the smallest.
    x = (normal(1, 5, dim) * 10.0 ** np.arange(-4, 6, 2)[:, None]).astype(np.float32)
    weight = normal(2, dim)
    expected = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-5)
    # Three roundings a value, and a sum of dim squares in 16 partials: below 1e-6 relative.
    np.testing.assert_allclose(op(x, weight, 1e-5), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 576, 2048])
def test_rms_norm_is_that_of_float64(dim: int) -> None:
    assert_is_rms_norm(ops.rms_norm, dim)


def test_rms_norms_that_are_wrong_are_refused() -> None:
    def skips_the_tail(x: F32, weight: F32, eps: float) -> F32:
        squares = np.square(x[:, : x.shape[1] // 16 * 16])
        root = np.sqrt(squares.mean(axis=1, keepdims=True) + np.float32(eps))
        return np.asarray(x / root * weight, np.float32)

    def forgets_eps(x: F32, weight: F32, eps: float) -> F32:
        return ops.rms_norm(x, weight, 0.0)

    def sums_instead_of_mean(x: F32, weight: F32, eps: float) -> F32:
        return ops.rms_norm(x, weight, eps) / np.float32(np.sqrt(x.shape[1]))

    for mutant in (skips_the_tail, forgets_eps, sums_instead_of_mean):
        with pytest.raises(AssertionError):
            assert_is_rms_norm(mutant, 577)


@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm_gives_the_same_bits_everywhere(rows: int) -> None:
    x, weight = normal(3, rows, 200), normal(4, 200)
    same_bits_everywhere(lambda: [ops.rms_norm(x, weight, 1e-6)])
    alone = np.concatenate([ops.rms_norm(x[t : t + 1], weight, 1e-6) for t in range(rows)])
    assert ops.rms_norm(x, weight, 1e-6).tobytes() == alone.tobytes()


def test_heads_are_normalised_one_by_one_and_in_place() -> None:
    x, weight = normal(5, 3, 4, 20), normal(6, 20)
    expected = ops.rms_norm(x.reshape(12, 20), weight, 1e-6).reshape(3, 4, 20)
    assert ops.rms_norm(x, weight, 1e-6, out=x) is x
    assert x.tobytes() == expected.tobytes()


@pytest.mark.parametrize("n", [1, 16, 31, 40000])
def test_add_and_clamp_are_one_rounding_each(n: int) -> None:
    a, b = normal(7, n), normal(8, n)
    assert ops.add(a, b).tobytes() == (a + b).tobytes()
    assert ops.clamp(a, 0.5).tobytes() == np.clip(a, -0.5, 0.5).tobytes()
    same_bits_everywhere(lambda: [ops.add(a, b), ops.clamp(a, 0.5)])


def test_clamp_lets_a_nan_through_to_where_it_is_named() -> None:
    assert np.isnan(ops.clamp(np.array([np.nan] * 20, np.float32), 1.0)).all()


def rope_angles(positions: NDArray[np.int32], inv_freq: F32) -> NDArray[np.float64]:
    return (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64)


def assert_is_rope_table(table: Callable[..., tuple[F32, F32]]) -> None:
    inv_freq = (1e4 ** (-np.arange(0, 128, 2) / 128)).astype(np.float32)
    rng = np.random.default_rng(9)
    positions = np.concatenate(
        [np.arange(300), rng.integers(0, 2**20, 300), 2**20 - np.arange(20), 2**23 - np.arange(5)]
    ).astype(np.int32)
    angles = rope_angles(positions, inv_freq)
    cos, sin = table(inv_freq, positions, 1.0)
    for actual, expected in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        # Half a unit in the last place from rounding a double that is right to 2^-50.
        ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
        assert (np.abs(actual - expected) / ulp).max() < 0.501


def test_rope_tables_are_right_to_half_an_ulp() -> None:
    assert_is_rope_table(ops.rope_table)


def test_rope_tables_that_reduce_badly_are_refused() -> None:
    def reduces_in_float32(
        inv_freq: F32, positions: NDArray[np.int32], _: float
    ) -> tuple[F32, F32]:
        angles = rope_angles(positions, inv_freq).astype(np.float32) % np.float32(2 * np.pi)
        return np.cos(angles), np.sin(angles)

    def multiplies_in_float64(
        inv_freq: F32, positions: NDArray[np.int32], _: float
    ) -> tuple[F32, F32]:
        angles = positions[:, None].astype(np.float64) * inv_freq
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    for mutant in (reduces_in_float32, multiplies_in_float64):
        with pytest.raises(AssertionError):
            assert_is_rope_table(mutant)


def test_the_attention_factor_multiplies_once() -> None:
    inv_freq, positions = np.ones(3, np.float32), np.arange(4, dtype=np.int32)
    plain, scaled = ops.rope_table(inv_freq, positions), ops.rope_table(inv_freq, positions, 1.3)
    for a, b in zip(plain, scaled, strict=True):
        assert (a * np.float32(1.3)).tobytes() == b.tobytes()


def test_an_angle_beyond_the_reduction_is_refused_by_position() -> None:
    with pytest.raises(NumericError, match="16777216") as caught:
        ops.rope_table(np.ones(2, np.float32), np.array([0, 2**24, 5], np.int32))
    assert caught.value.rows == (1,)


@pytest.mark.parametrize(("dim", "half"), [(64, 32), (80, 20), (20, 10), (33, 16), (2, 1)])
def test_rope_turns_pairs_half_a_rotation_apart(dim: int, half: int) -> None:
    inv_freq = (1e4 ** (-np.arange(half) / half)).astype(np.float32)
    positions = np.arange(5, 12, dtype=np.int32)
    x = normal(10, 7, 3, dim)
    cos, sin = ops.rope_table(inv_freq, positions)
    turned = x.copy()
    ops.rope(turned, cos, sin)
    expected = reference.rope(x.astype(np.float64), rope_angles(positions, inv_freq))
    np.testing.assert_allclose(turned, expected, rtol=0, atol=2e-6)
    interleaved = reference.rope(x.astype(np.float64), rope_angles(positions, inv_freq)[:, ::-1])
    if half > 1:
        assert np.abs(turned - interleaved).max() > 0.1, "the order of frequencies does not show"

    def op() -> list[NDArray[np.generic]]:
        copy = x.copy()
        ops.rope(copy, *ops.rope_table(inv_freq, positions))
        return [copy]

    same_bits_everywhere(op)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("num_experts", "picked"), [(1, 1), (8, 2), (60, 4), (128, 8), (130, 64)])
def test_routing_picks_the_largest_of_softmax(
    num_experts: int, picked: int, renormalise: bool
) -> None:
    logits = normal(11, 33, num_experts) * 2
    plan = ops.route(RouterKind.SOFTMAX, logits, picked, renormalise)
    experts, weights = reference.route(logits.astype(np.float64), picked, renormalise)
    np.testing.assert_array_equal(plan.experts, experts)
    np.testing.assert_allclose(plan.weights, weights, rtol=1e-6)
    same_bits_everywhere(
        lambda: [ops.route(RouterKind.SOFTMAX, logits, picked, renormalise).weights]
    )


def test_routing_ties_go_to_the_lower_index() -> None:
    logits = np.zeros((1, 20), np.float32)
    logits[0, [17, 3, 11]] = 1.0
    plan = ops.route(RouterKind.SOFTMAX, logits, 5, True)
    assert plan.experts.tolist() == [[3, 11, 17, 0, 1]]


def test_renormalised_weights_are_summed_in_ascending_expert_index() -> None:
    logits = normal(12, 500, 40) * 3
    chosen = ops.route(RouterKind.SOFTMAX, logits, 8, False)
    order = np.argsort(chosen.experts, axis=1)
    ascending = np.take_along_axis(chosen.weights, order, axis=1)
    total = np.zeros(500, np.float32)
    for a in range(8):
        total = total + ascending[:, a]
    expected = chosen.weights / total[:, None]
    actual = ops.route(RouterKind.SOFTMAX, logits, 8, True).weights
    assert actual.tobytes() == expected.tobytes()
    assert (chosen.weights / chosen.weights.sum(axis=1, keepdims=True)).tobytes() != (
        expected.tobytes()
    ), "the order of the sum does not show"


def test_a_non_finite_logit_fails_its_row_alone() -> None:
    logits = normal(13, 4, 16)
    logits[1, 3], logits[2, 15] = np.nan, np.inf
    with pytest.raises(NumericError) as caught:
        ops.route(RouterKind.SOFTMAX, logits, 2, True)
    assert caught.value.rows == (1, 2)


def test_slices_of_a_dense_ffn_are_all_chosen_with_weight_one() -> None:
    plan = ops.route(RouterKind.ALL, np.empty((3, 4), np.float32), 4, False)
    assert plan.experts.tolist() == [[0, 1, 2, 3]] * 3
    assert (plan.weights == 1).all()


def test_wrong_dtypes_and_shapes_are_refused_not_converted() -> None:
    x, weight = normal(14, 2, 8), normal(15, 8)
    doubles = cast(F32, x.astype(np.float64))
    with pytest.raises(TypeError):
        ops.rms_norm(doubles, weight, 1e-6)
    with pytest.raises(TypeError):
        ops.rms_norm(normal(16, 8, 2).T, weight, 1e-6)
    with pytest.raises(ValueError, match="weight"):
        ops.rms_norm(x, normal(17, 7), 1e-6)
    with pytest.raises(ValueError, match="shape"):
        ops.add(x, x[:1])
