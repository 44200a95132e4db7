"""A decoder layer in one native call, bit for bit against its ops one after the other."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.layer_weights import stacked
from shoal.errors import NumericError
from shoal.model_spec import QkNorm, RouterKind
from shoal.quant import Format, Scheme
from support.isas import same_bits_everywhere
from support.layer_parts import Parts, World, composed, make_parts, make_world

Index = NDArray[np.intp]
Floats = NDArray[np.float32]
F32, F16, Q4_0, Q4_K = Format.F32, Format.F16, Format.Q4_0, Format.Q4_K

ALIKE = (Q4_K,) * 3
KINDS: dict[str, Callable[[], Parts]] = {
    "mixtral": lambda: make_parts(ALIKE, window=60),
    "qwen3": lambda: make_parts(ALIKE, qk_norm=QkNorm.HEAD),
    "olmoe": lambda: make_parts(
        (F32,) * 3, qk_norm=QkNorm.PROJECTION, clip=0.7, renormalise=False, scheme=Scheme.F32
    ),
    "biases": lambda: make_parts((F16,) * 3, has_bias=True, scheme=Scheme.INT8_32),
    "formats apart": lambda: make_parts((Q4_K, Q4_0, F32), clip=0.5, scheme=Scheme.INT8_32),
    "every head its own": lambda: make_parts((Q4_0,) * 3, heads=(4, 4, 64), qk_norm=QkNorm.HEAD),
    "no whole groups": lambda: make_parts((F32,) * 3, heads=(3, 1, 22), has_bias=True),
    "every expert": lambda: make_parts(ALIKE, router=RouterKind.ALL),
    "dense": lambda: make_parts(ALIKE, router=None, window=1),
}


def run(parts: Parts, world: World, going_on: Index | None, qkv: int) -> list[NDArray[np.generic]]:
    """Return all that the native layer makes, its cache included; qkv: matrices, 1 or 3."""
    world = world.with_own_cache()
    together = stacked(ops.HugeArena(), *parts.qkv)
    layer = parts.layer(together if qkv == 1 else None)
    assert qkv == 3 or len(together) == 1, "these do not stack"
    made = layer.run(world.hidden, world.branch, world.places(), world.cache, going_on)
    return [*flat(made), *world.cache]


def expected(parts: Parts, world: World, going_on: Index | None) -> list[NDArray[np.generic]]:
    world = world.with_own_cache()
    residual, normed, rows, plan = composed(parts, world, going_on)
    if rows is None or plan is None:
        return [residual, normed, *world.cache]
    return [*flat(ops.Routed(residual, normed, rows, plan)), *world.cache]


def flat(made: ops.Routed | tuple[Floats, Floats]) -> Sequence[NDArray[np.generic]]:
    if not isinstance(made, ops.Routed):
        return made
    rows, plan = made.rows, made.plan
    return [made.residual, made.normed, rows.values, rows.scales, plan.experts, plan.weights]


def assert_same(made: Sequence[NDArray[np.generic]], right: Sequence[NDArray[np.generic]]) -> None:
    assert [(a.shape, a.dtype) for a in made] == [(a.shape, a.dtype) for a in right]
    assert [a.tobytes() for a in made] == [a.tobytes() for a in right]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_gives_the_bits_of_its_ops_on_every_machine(
    kind: str, num_rows: int, dtype: str
) -> None:
    parts = KINDS[kind]()
    for has_branch, rotary in ((True, 1.0), (False, 0.5)):
        world = make_world(parts, num_rows, dtype, has_branch=has_branch, rotary=rotary)
        assert_same(run(parts, world, None, 3), expected(parts, world, None))
    same_bits_everywhere(lambda: run(parts, world, None, 3))
    if len(stacked(ops.HugeArena(), *parts.qkv)) == 1:
        same_bits_everywhere(lambda: run(parts, world, None, 1))
        assert_same(run(parts, world, None, 1), run(parts, world, None, 3))
    else:
        assert kind in ("formats apart", "no whole groups")


@pytest.mark.parametrize("going_on", [None, [0, 2]])
def test_sums_of_experts_are_finished_and_added_as_by_their_ops(going_on: list[int] | None) -> None:
    parts = KINDS["qwen3"]()
    index = None if going_on is None else np.array(going_on, np.intp)
    world = make_world(parts, 3, "float16", has_branch=False)
    drawn = np.random.default_rng(7).integers(-(2**50), 2**50, world.hidden.shape)
    sums = ops.Sums(drawn, 48)
    finished = ops.finish_sums(*sums)
    right = replace(world, branch=finished)
    assert_same(run(parts, replace(world, branch=sums), index, 1), expected(parts, right, index))
    whole = ops.add(world.hidden, finished)
    for branch in (sums, finished):
        assert ops.add_branch(world.hidden, branch).tobytes() == whole.tobytes()


@pytest.mark.parametrize("going_on", [[], [2], [0, 5, 16], list(range(17))])
@pytest.mark.parametrize("kind", ["qwen3", "every expert", "dense"])
def test_rows_that_stop_after_their_keys_are_as_if_all_went_on(
    kind: str, going_on: list[int]
) -> None:
    parts = KINDS[kind]()
    world = make_world(parts, 17, "float16")
    index = np.array(going_on, np.intp)
    made = run(parts, world, index, 1)
    if index.size:
        assert_same(made, expected(parts, world, index))
    every = run(parts, world, None, 1)
    assert_same(made, [*(array[index] for array in every[:-2]), *every[-2:]])


def with_spec(parts: Parts, **changed: Any) -> Parts:
    return replace(parts, spec=replace(parts.spec, **changed))


@pytest.mark.parametrize(
    ("kind", "mutant"),
    [
        ("mixtral", lambda p: replace(p, window=61)),
        ("mixtral", lambda p: replace(p, window=None)),
        ("mixtral", lambda p: with_spec(p, scale=p.spec.scale * 2)),
        ("mixtral", lambda p: replace(p, norms=p.norms[::-1])),
        ("mixtral", lambda p: replace(p, qkv=(p.qkv[0], p.qkv[2], p.qkv[1]))),
        ("qwen3", lambda p: replace(p, q_norm=p.k_norm, k_norm=p.q_norm)),
        ("qwen3", lambda p: replace(p, router=replace(p.router, renormalise=False))),
        ("olmoe", lambda p: with_spec(p, clip_qkv=0.71)),
        ("olmoe", lambda p: replace(p, router=replace(p.router, renormalise=True))),
        ("biases", lambda p: replace(p, o=replace(p.o, bias=None))),
        ("biases", lambda p: replace(p, qkv=(*p.qkv[:2], replace(p.qkv[2], bias=None)))),
    ],
)
def test_a_layer_made_of_anything_else_is_refused(
    kind: str, mutant: Callable[[Parts], Parts]
) -> None:
    parts = KINDS[kind]()
    world = make_world(parts, 3, "float16")
    right = expected(parts, world, None)
    assert_same(run(parts, world, None, 3), right)
    with pytest.raises(AssertionError):
        assert_same(run(mutant(parts), world, None, 3), right)


def zero_matrix(dim: int) -> ops.Linear:
    return ops.Linear(ops.pack_matrix(F32, np.zeros((dim, 4 * dim), np.uint8), dim, dim))


def spoiled(case: str) -> tuple[Parts, World]:
    """Return a layer and three rows, of which row 1, and no other, leaves the numbers.

    Row 1 alone has a value in column 5, where a weight is large.
    """
    router = None if case == "ffn" else RouterKind.SOFTMAX
    parts = make_parts((F32,) * 3, scheme=Scheme.F32, router=router)
    world = make_world(parts, 3, "float16", has_branch=False)
    if case == "input":
        world.hidden[1, 7] = np.inf
        return parts, world
    world.hidden[:, 5] = 0.0
    world.hidden[1] = 0.0
    world.hidden[1, 5] = 1.0
    steep = np.ones(parts.dim, np.float32)
    if case == "key":
        steep[5] = 1e20
        return replace(parts, norms=(steep, parts.norms[1])), world
    # Without attention the residual is what came in.
    parts = replace(parts, o=zero_matrix(parts.dim))
    steep[5] = {"normed": 1e38, "router": 1e37, "ffn": 1e30}[case]
    if case == "router":
        gate = np.ones((8, parts.dim), np.float32)
        gate[:, 5] = 100.0
        matrix = ops.pack_matrix(F32, gate.view(np.uint8), 8, parts.dim)
        parts = replace(parts, gate=ops.Linear(matrix))
    return replace(parts, norms=(parts.norms[0], steep)), world


@pytest.mark.parametrize("going_on", [None, [1], [0, 1]])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("input", "a value that is not finite in row 1"),
        ("key", "a key or value beyond float16 in row 1"),
        ("normed", "a value that is not finite in row 1"),
        ("router", "a router logit that is not finite in row 1"),
        ("ffn", "an FFN output that is not finite in row 1"),
    ],
)
def test_rows_that_leave_the_numbers_are_named(
    case: str, message: str, going_on: list[int] | None
) -> None:
    parts, world = spoiled(case)
    index = None if going_on is None else np.array(going_on, np.intp)
    with pytest.raises(NumericError, match=f"^{message}$") as raised:
        run(parts, world, index, 3)
    assert raised.value.rows == (1,)
    with pytest.raises(NumericError) as composed_raised:
        expected(parts, world, None)
    assert composed_raised.value.rows == (1,)
    if case not in ("input", "key"):  # a row that stops earlier is not looked at
        run(parts, world, np.array([0, 2], np.intp), 3)


def test_attention_that_leaves_the_numbers_names_rows_of_the_call() -> None:
    parts = make_parts(ALIKE, qk_norm=QkNorm.HEAD)
    assert parts.q_norm is not None
    parts = replace(parts, q_norm=np.full_like(parts.q_norm, 3e38))
    world = make_world(parts, 17, "float16")
    with pytest.raises(NumericError, match=r"a value that is not finite in row 3, 16$") as raised:
        run(parts, world, np.array([3, 16], np.intp), 1)
    assert raised.value.rows == (3, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": np.zeros((3, 255), np.float32)}, "columns of hidden: expected 256, got 255"),
        ({"hidden": np.zeros((2, 256), np.float32)}, "rows of hidden: expected 3, got 2"),
        ({"branch": np.zeros((2, 256), np.float32)}, "branch: expected 3, got 2"),
        ({"branch": ops.Sums(np.zeros((3, 255), np.int64), 0)}, "sums: expected 256, got 255"),
        ({"branch": ops.Sums(np.zeros((3, 256), np.int64), 127)}, r"grid must be in -126\.\.126"),
        ({"slots": np.array([0, 1, 6 * 64], np.int32)}, "row 2: slot 384 is outside the cache"),
        ({"slots": np.array([0, 1], np.int32)}, "one row each"),
        ({"positions": np.array([0, 1, 192], np.int32)}, "row 2: position 192 is outside"),
        ({"row_sequence": np.array([0, 2, 0], np.int32)}, "row 1: sequence 2 has no block"),
        ({"block_tables": np.full((2, 3), 6, np.int32)}, "row 0: block 6 is outside the cache"),
        ({"cos": np.zeros((3, 33), np.float32), "sin": np.zeros((3, 33), np.float32)}, "rotary"),
    ],
)
def test_a_call_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    parts = make_parts(ALIKE)
    world = replace(make_world(parts, 3, "float16"), **changed)
    with pytest.raises(ValueError, match=message):
        run(parts, world, None, 1)


@pytest.mark.parametrize("going_on", [[3], [-1], [1, 1], [2, 0]])
def test_rows_that_go_on_must_be_rows_in_order(going_on: list[int]) -> None:
    parts = make_parts(ALIKE)
    with pytest.raises(ValueError, match="going_on must ascend within the rows"):
        run(parts, make_world(parts, 3, "float16"), np.array(going_on, np.intp), 1)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda p: replace(p, window=0), "window = 0: must be at least 1"),
        (lambda p: replace(p, norms=(p.norms[0], p.norms[1][1:])), "length of the FFN norm"),
        (lambda p: replace(p, norms=(p.norms[0][1:], p.norms[1])), "length of the attention norm"),
        (lambda p: replace(p, q_norm=p.q_norm[1:]), "length of q_norm: expected 64, got 63"),
        (lambda p: replace(p, k_norm=None), "q_norm and k_norm: both or none"),
        (lambda p: replace(p, qkv=p.qkv[:2]), "matrices of q, k and v: expected 3, got 2"),
        (lambda p: replace(p, qkv=p.qkv[::-1]), "rows of q: expected 256, got 128"),
        (lambda p: replace(p, gate=None), "a router of kind softmax with the gate None"),
        (lambda p: replace(p, gate=p.o), "router: must be float32"),
        (
            lambda p: replace(p, router=replace(p.router, experts_per_token=9)),
            "experts_per_token must be in 1",
        ),
    ],
)
def test_a_layer_whose_parts_do_not_fit_is_refused(
    mutant: Callable[[Parts], Parts], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mutant(make_parts(ALIKE, qk_norm=QkNorm.HEAD)).layer()


def test_a_cache_of_other_heads_is_refused() -> None:
    parts, other = make_parts(ALIKE), make_parts(ALIKE, heads=(4, 4, 64))
    theirs = make_world(other, 3, "float16")
    world = replace(make_world(parts, 3, "float16"), keys=theirs.keys, values=theirs.values)
    with pytest.raises(ValueError, match="the cache is not this attention's"):
        run(parts, world, None, 1)


def test_a_layer_keeps_its_weights_and_places_alive() -> None:
    parts = KINDS["biases"]()
    world = make_world(parts, 3, "float16")
    right = expected(parts, world, None)
    layer, own = parts.layer(), world.with_own_cache()
    places = ops.Places(
        (world.cos.copy(), world.sin.copy()),
        world.slots.copy(),
        world.row_sequence.copy(),
        world.positions.copy(),
        world.block_tables.copy(),
    )
    del parts
    others = [make_parts((F16,) * 3, has_bias=True, qk_norm=QkNorm.HEAD) for _ in range(3)]
    made = layer.run(own.hidden, own.branch, places, own.cache, None)
    assert_same([*flat(made), *own.cache], right)
    assert others


def test_threads_may_run_one_layer_at_once() -> None:
    parts = KINDS["qwen3"]()
    layer, worlds = parts.layer(), [make_world(parts, n, "float16") for n in (1, 3, 17, 9)]
    right = [expected(parts, world, None) for world in worlds]

    def many(world: World) -> list[NDArray[np.generic]]:
        own = world.with_own_cache()
        for _ in range(20):
            layer.run(own.hidden, own.branch, own.places(), own.cache, None)
        made = layer.run(own.hidden, own.branch, own.places(), own.cache, None)
        return [*flat(made), *own.cache]

    with ThreadPoolExecutor(4) as pool:
        for made, expects in zip(pool.map(many, worlds), right, strict=True):
            assert_same(made, expects)
