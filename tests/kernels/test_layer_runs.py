"""Layers in a row with their experts in one native call: the bits of one call each."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal import ops
from shoal.errors import NumericError
from shoal.model_spec import QkNorm, RouterKind
from shoal.quant import Format, Scheme
from support.isas import same_bits_everywhere
from support.layer_parts import Parts, World, make_parts, make_world
from support.weights import make_expert

F32, F16, Q4_K = Format.F32, Format.F16, Format.Q4_K
NUM_EXPERTS, GRID = 8, 20
EXPERT_FORMATS = {Scheme.F32: F32, Scheme.INT8_32: Format.Q8_0, Scheme.INT8_256: Q4_K}
KINDS: dict[str, Callable[[], Parts]] = {
    "qwen3": lambda: make_parts((Q4_K,) * 3, qk_norm=QkNorm.HEAD),
    "olmoe": lambda: make_parts(
        (F32,) * 3, qk_norm=QkNorm.PROJECTION, clip=0.7, renormalise=False, scheme=Scheme.F32
    ),
    "biases": lambda: make_parts((F16,) * 3, has_bias=True, scheme=Scheme.INT8_32),
    "no whole groups": lambda: make_parts((F32,) * 3, heads=(3, 1, 22), scheme=Scheme.F32),
    "every expert": lambda: make_parts((Q4_K,) * 3, router=RouterKind.ALL),
}
Arrays = Sequence[NDArray[Any]]


def make_table(parts: Parts, seed: int, numbers: Sequence[int] = range(8)) -> ops.ExpertTable:
    fmt = EXPERT_FORMATS[parts.scheme]
    made = {n: make_expert(fmt, Format.Q8_0, parts.dim, 48, seed=10 * seed + n) for n in numbers}
    return ops.expert_table(made[0].layout, {n: each.data for n, each in made.items()})


class Run:
    """Three layers, each with experts and a cache of its own."""

    def __init__(self, parts: Parts, grids: Sequence[int] = (GRID, GRID - 1, GRID + 1)) -> None:
        self.parts, self.grids = parts, grids
        layer = parts.layer()
        assert isinstance(layer, ops.RoutedLayer)
        self.layers = [layer] * len(grids)
        self.tables = [make_table(parts, seed) for seed in range(len(grids))]

    def together(self, world: World) -> tuple[ops.RanLayers | None, Arrays]:
        """Return what the run says, and all that it made."""
        caches = [world.with_own_cache().cache for _ in self.grids]
        ran = self.of(world, caches).in_memory(self.lent())
        if ran is None:
            return None, []
        assert len(ran.expert_seconds) == len(ran.experts)
        assert all(each >= 0.0 for each in ran.expert_seconds)
        made: list[NDArray[Any]] = [ran.residual, ran.sums.values, *ran.experts]
        return ran, made + [array for cache in caches for array in cache]

    def of(self, world: World, caches: Sequence[Any]) -> ops.LayerRun:
        return ops.LayerRun(self.layers, world.hidden, world.branch, world.places(), caches)

    def lent(self) -> list[ops.ResidentExperts]:
        return [ops.ResidentExperts(*each) for each in zip(self.tables, self.grids, strict=True)]

    def one_by_one(self, world: World, num_layers: int = 3) -> Arrays:
        caches = [world.with_own_cache().cache for _ in self.grids]
        hidden, branch = world.hidden, world.branch
        visited = []
        sums = np.empty(hidden.shape, np.int64)
        for i in range(num_layers):
            routed = self.layers[i].run(hidden, branch, world.places(), caches[i], None)
            rows, plan = routed.rows, routed.plan
            bad = self.tables[i].sums(
                rows.scheme,
                rows.dim,
                rows.values,
                rows.scales,
                None,
                plan.experts,
                plan.weights,
                self.grids[i],
                sums,
            )
            assert bad == []
            hidden, branch = routed.residual, ops.Sums(sums.copy(), self.grids[i])
            visited.append(plan.experts)
        made: list[NDArray[Any]] = [hidden, sums, *visited]
        return made + [array for cache in caches for array in cache]


def bytes_of(arrays: Arrays) -> list[bytes]:
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_gives_the_bits_of_its_layers_one_by_one_on_every_machine(
    kind: str, num_rows: int
) -> None:
    run = Run(KINDS[kind]())
    for has_branch in (True, False):
        world = make_world(run.parts, num_rows, "float16", has_branch=has_branch)
        ran, made = run.together(world)
        assert ran is not None and ran.stopped is None and len(ran.experts) == 3
        assert ran.sums.grid == run.grids[-1]
        assert bytes_of(made) == bytes_of(run.one_by_one(world))
        sizes = {each.shape for each in ran.experts}
        assert sizes == {(num_rows, NUM_EXPERTS if kind == "every expert" else 3)}
    same_bits_everywhere(lambda: run.together(world)[1])


def test_a_run_begins_with_sums_as_with_floats() -> None:
    run = Run(KINDS["qwen3"]())
    world = make_world(run.parts, 3, "float16", has_branch=False)
    drawn = np.random.default_rng(7).integers(-(2**50), 2**50, world.hidden.shape)
    sums = ops.Sums(drawn, 48)
    made = run.together(World(**{**vars(world), "branch": sums}))[1]
    finished = World(**{**vars(world), "branch": ops.finish_sums(*sums)})
    assert bytes_of(made) == bytes_of(run.together(finished)[1])
    assert bytes_of(made) != bytes_of(run.together(world)[1])


def test_experts_of_a_run_are_counted_as_those_of_calls() -> None:
    run = Run(KINDS["qwen3"]())
    world = make_world(run.parts, 3, "float16")
    ran, _ = run.together(world)
    assert ran is not None
    assert [t.num_hits for t in run.tables] == [len(np.unique(e)) for e in ran.experts]


def test_a_run_ends_before_a_layer_whose_experts_went() -> None:
    run = Run(KINDS["qwen3"]())
    world = make_world(run.parts, 3, "float16")
    right = run.one_by_one(world, num_layers=1)
    assert run.tables[1].withdraw(lambda: None), "nobody is inside"
    ran, made = run.together(world)
    assert ran is not None and ran.stopped is None
    assert (len(ran.experts), ran.sums.grid) == (1, run.grids[0])
    assert bytes_of(made) == bytes_of(right)
    assert run.tables[0].withdraw(lambda: None), "the run has left"
    assert run.together(world)[0] is None
    assert run.tables[2].num_hits == 0


@pytest.mark.parametrize("change", ["few", "many", "scheme", "dim"])
def test_a_run_leaves_a_layer_alone_whose_table_is_of_other_experts(change: str) -> None:
    run = Run(KINDS["qwen3"]())
    others: dict[str, Callable[[], ops.ExpertTable]] = {
        "few": lambda: make_table(run.parts, 1, [0, *range(2, 8)]),
        "many": lambda: make_table(run.parts, 1, range(9)),
        "scheme": lambda: make_table(make_parts((F32,) * 3, scheme=Scheme.F32), 1),
        "dim": lambda: make_table(KINDS["no whole groups"](), 1),
    }
    run.tables[1] = others[change]()
    ran, _ = run.together(make_world(run.parts, 2, "float16"))
    assert ran is not None and len(ran.experts) == 1


def test_rows_that_leave_the_numbers_are_named_and_the_layers_before_count() -> None:
    run = Run(KINDS["qwen3"](), (GRID, 100, GRID))
    world = make_world(run.parts, 3, "float16")
    ran, _ = run.together(world)
    assert ran is not None and isinstance(ran.stopped, NumericError)
    what = "an expert output that is not finite or beyond 2^44 quanta in row 0, 1, 2"
    assert (str(ran.stopped), ran.stopped.rows) == (what, (0, 1, 2))
    assert len(ran.experts) == 1
    assert all(table.withdraw(lambda: None) for table in run.tables), "the run has left"

    world.hidden[1, 7] = np.inf
    run = Run(run.parts)
    ran, _ = run.together(world)
    assert ran is not None and ran.stopped is not None
    assert str(ran.stopped) == "a value that is not finite in row 1"
    assert ran.experts == [] and ran.stopped.rows == (1,)


def test_what_does_not_belong_together_is_refused() -> None:
    run = Run(KINDS["qwen3"]())
    world = make_world(run.parts, 3, "float16")
    caches = [world.cache] * 3
    other = make_world(KINDS["no whole groups"](), 3, "float16")
    with pytest.raises(ValueError, match="a table, a number of experts"):
        run.of(world, caches[:2]).in_memory(run.lent())
    with pytest.raises(ValueError, match="other heads"):
        run.of(world, [other.cache] * 3).in_memory(run.lent())
    with pytest.raises(ValueError, match="columns of hidden"):
        ops.LayerRun(run.layers, other.hidden, None, world.places(), caches).in_memory(run.lent())
    assert all(table.withdraw(lambda: None) for table in run.tables), "nobody stayed inside"
