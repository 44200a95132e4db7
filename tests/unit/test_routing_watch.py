"""How a draft's routing differs from the verified one, and what length that allows."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from coordinator.cancellation import Cancellation
from coordinator.expert_branch import WatchedExperts
from coordinator.request import GenerationRequest
from coordinator.row_forms import RowForms
from coordinator.speculation.routing_watch import Routing, RoutingWatch
from coordinator.speculation.shadow_drafter import ShadowDrafter
from coordinator.speculation.shadow_experts import ShadowExperts
from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.shadow_build import make_shadow
from shoal.ops import SamplingParams
from shoal.quant import Format, Scheme
from shoal.router import RoutingPlan
from support.speculation import Rig
from support.tiny_model import make_tiny_artifact


def routing(*layers: tuple[int, ...]) -> Routing:
    return tuple(map(frozenset, layers))


SAME = routing((1, 2, 3, 4), (5, 6, 7, 8))
QUARTER = routing((1, 2, 3, 9), (5, 6, 7, 9))  # one of four in each layer
NOTHING = routing((11, 12, 13, 14), (15, 16, 17, 18))


def test_equal_routing_lets_a_draft_be_as_long_as_it_may() -> None:
    watch = RoutingWatch(0.15, 32)
    watch.observe([SAME] * 5, [SAME] * 5)
    assert (watch.limit, watch.share) == (32, 0.0)


def test_the_order_of_a_rows_experts_does_not_count() -> None:
    watch = RoutingWatch(0.01, 8)
    watch.observe([routing((4, 3, 2, 1))], [routing((1, 2, 3, 4))])
    assert watch.share == 0.0


def test_the_share_is_of_the_rows_seen_lately() -> None:
    watch = RoutingWatch(0.5, 32)
    watch.observe([QUARTER] * 16, [SAME] * 16)
    assert watch.share == pytest.approx(0.25)
    watch.observe([SAME] * 8, [SAME] * 8)
    assert watch.share == pytest.approx(0.125)


def test_drafts_become_shorter_while_routing_diverges_and_longer_when_it_recovers() -> None:
    watch = RoutingWatch(0.15, 32)
    limits = []
    for drafted in [NOTHING] * 7 + [SAME] * 40:
        watch.observe([drafted] * 2, [SAME] * 2)
        limits.append(watch.limit)
    assert limits[:7] == [32, 16, 8, 4, 2, 1, 1]  # two rows are too few to condemn it
    assert min(limits) == 1, "one token goes on being measured"
    assert limits[-1] == 32
    recovery = limits[limits.index(1) :]
    assert recovery == sorted(recovery)


def test_a_model_in_which_no_layer_chooses_never_diverges() -> None:
    watch = RoutingWatch(0.01, 16)
    watch.observe([(), ()], [(), ()])
    assert (watch.limit, watch.share) == (16, 0.0)


class Zeros:
    """Experts that add nothing."""

    def scheme(self, layer: int) -> Scheme:
        return Scheme.F32

    def run(self, layer: int, forms: RowForms, plan: RoutingPlan) -> np.ndarray:
        return np.zeros((forms.num_rows, 4), np.float32)

    def run_layers(self, first: int, run: ops.LayerRun) -> None:
        """None at one stroke."""


def test_what_is_remembered_are_the_last_rows_of_every_layer_that_chooses(tmp_path: Path) -> None:
    spec = Artifact.open(make_tiny_artifact(tmp_path, "qwen3_moe", "f32")).spec
    watched = WatchedExperts(spec, Zeros())
    for layer in range(spec.num_layers):
        num_rows = 5 if layer < spec.num_layers - 1 else 2  # the last layer runs some rows only
        experts = np.arange(num_rows * 4, dtype=np.int32).reshape(num_rows, 4) + 100 * layer
        plan = RoutingPlan(experts, np.ones((num_rows, 4), np.float32))
        watched.run(layer, RowForms(np.zeros((num_rows, 4), np.float32)), plan)
    rows = watched.last_rows(2)
    assert len(rows) == 2 and all(len(row) == spec.num_layers for row in rows)
    assert rows[0][0] == {12, 13, 14, 15} and rows[1][0] == {16, 17, 18, 19}


def test_a_dense_model_sliced_into_experts_has_nothing_to_remember(tmp_path: Path) -> None:
    spec = Artifact.open(make_tiny_artifact(tmp_path, "llama", "f32")).spec
    assert WatchedExperts(spec, Zeros()).last_rows(3) == ((), (), ())


def test_a_shadow_that_routes_otherwise_drafts_less(tmp_path: Path) -> None:
    """At 4 bits a tiny random model routes 1 % and more of its rows' experts otherwise."""
    path = make_tiny_artifact(tmp_path, "qwen3_moe", "f32", seed=3)
    shadow_path = tmp_path / "q4.shoal"
    make_shadow(Artifact.open(path), Format.Q4_0, shadow_path, lambda _: None, force=False)
    asked = GenerationRequest(tuple(range(40, 60)), 60, SamplingParams(), ignore_eos=True)
    longest, shares = {}, {}
    with closing(ShadowExperts(Artifact.open(shadow_path), lambda _: None)) as shadow:
        for threshold in (1.0, 1e-6):
            with closing(
                Rig(
                    path,
                    lambda parts: [ShadowDrafter(shadow, parts.weights, parts.kv)],
                    divergence=threshold,
                    max_draft=16,
                )
            ) as rig:
                list(rig.engine.generate(asked, Cancellation()))
                [candidate] = rig.speculator._candidates
                longest[threshold], shares[threshold] = candidate.watch.limit, candidate.watch.share
    assert shares[1e-6] > 0, "it routes as the target does: a blunt test"
    assert longest[1.0] == 16 and longest[1e-6] == 1
