"""What a layer's experts add to the residual: by the artifact's own experts, or by stand-ins."""

from typing import Protocol

from coordinator.array_types import I32
from coordinator.expert_dispatch import AnswersAtOnce, ExpertDispatch
from coordinator.row_forms import RowForms
from coordinator.speculation.routing_watch import Routing
from shoal import ops
from shoal.artifact import Artifact
from shoal.model_spec import ModelSpec, RouterKind
from shoal.quant import Scheme
from shoal.router import RoutingPlan


class ExpertBranch(Protocol):
    """The experts of every layer, as a forward pass calls them."""

    def scheme(self, layer: int) -> Scheme:
        """Return the scheme in which `run` asks for the rows, at least."""
        ...

    def run(self, layer: int, forms: RowForms, plan: RoutingPlan) -> ops.Branch:
        """Return the branch [T, D] of a layer's normed rows, routed as the plan says.

        Raises: what `ExpertDispatch.start` and `PendingSums.wait` do.
        """
        ...

    def run_layers(self, first: int, run: ops.LayerRun) -> ops.RanLayers | None:
        """Run layers, from `first` on, with their experts at one stroke, as far as that goes.

        None sends the first of them to `run`. Raises: as `run`.
        """
        ...


class DispatchedExperts:
    """The experts of one artifact, wherever a dispatch finds them.

    artifact: whose schemes and grids the experts have: the target's own for an exact pass.
    """

    def __init__(self, artifact: Artifact, dispatch: ExpertDispatch) -> None:
        layers = [i for i, layer in enumerate(artifact.spec.layers) if layer.router is not None]
        self._forms = {index: (artifact.scheme(index), artifact.grid(index)) for index in layers}
        self._dispatch = dispatch
        self._at_once = dispatch if isinstance(dispatch, AnswersAtOnce) else None

    def scheme(self, layer: int) -> Scheme:
        """See `ExpertBranch.scheme`."""
        return self._forms[layer][0]

    def run(self, layer: int, forms: RowForms, plan: RoutingPlan) -> ops.Branch:
        """See `ExpertBranch.run`."""
        scheme, grid = self._forms[layer]
        rows = forms.get(scheme)
        if self._at_once is not None:
            return ops.Sums(self._at_once.sums(layer, rows, plan), grid)
        return ops.Sums(self._dispatch.start(layer, rows, plan).wait(), grid)

    def run_layers(self, first: int, run: ops.LayerRun) -> ops.RanLayers | None:
        """See `ExpertBranch.run_layers`."""
        return None if self._at_once is None else self._at_once.run_layers(first, run)


class WatchedExperts:
    """Another branch, and the memory of which experts the rows of the last pass visited.

    Layers that every expert computes are left out: they tell nothing.
    """

    def __init__(self, spec: ModelSpec, inner: ExpertBranch) -> None:
        self._inner = inner
        self._visited: dict[int, I32 | None] = {
            index: None
            for index, layer in enumerate(spec.layers)
            if layer.router is not None and layer.router.kind is not RouterKind.ALL
        }

    def scheme(self, layer: int) -> Scheme:
        """See `ExpertBranch.scheme`."""
        return self._inner.scheme(layer)

    def run(self, layer: int, forms: RowForms, plan: RoutingPlan) -> ops.Branch:
        """See `ExpertBranch.run`."""
        if layer in self._visited:
            self._visited[layer] = plan.experts
        return self._inner.run(layer, forms, plan)

    def run_layers(self, first: int, run: ops.LayerRun) -> ops.RanLayers | None:
        """See `ExpertBranch.run_layers`."""
        ran = self._inner.run_layers(first, run)
        for layer, experts in enumerate(ran.experts if ran is not None else (), first):
            if layer in self._visited:
                self._visited[layer] = experts
        return ran

    def last_rows(self, num_rows: int) -> tuple[Routing, ...]:
        """Return the routing of the last pass's last rows, whose logits were all wanted."""
        layers = [visited for visited in self._visited.values() if visited is not None]
        return tuple(
            tuple(frozenset(visited[row].tolist()) for visited in layers)
            for row in range(-num_rows, 0)
        )
