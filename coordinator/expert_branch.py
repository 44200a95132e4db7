"""What a layer's experts add to the residual: by the artifact's own experts, or by stand-ins."""

from typing import Protocol

from coordinator.array_types import F32
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.row_forms import RowForms
from shoal import ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan


class ExpertBranch(Protocol):
    """The experts of every layer, as a forward pass calls them."""

    def run(self, layer: int, forms: RowForms, plan: RoutingPlan) -> F32:
        """Return the branch [T, D] float32 of a layer's normed rows, routed as the plan says.

        Raises: what `ExpertDispatch.start` and `PendingSums.wait` do.
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

    def run(self, layer: int, forms: RowForms, plan: RoutingPlan) -> F32:
        """See `ExpertBranch.run`."""
        scheme, grid = self._forms[layer]
        pending = self._dispatch.start(layer, forms.get(scheme), plan)
        return ops.finish_sums(pending.wait(), grid)
