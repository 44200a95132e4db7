"""What stands in for the experts while they are asked: a shadow, a coarser copy in this process."""

from typing import Protocol

from coordinator.array_types import I64
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.row_forms import RowForms
from shoal.artifact import Artifact
from shoal.router import RoutingPlan


class Surrogate(Protocol):
    """G: near what the experts would say, and here at once.

    The same row and routing give the same sums in every pass, whatever rows are beside it: where
    nothing changed, G - G is nothing.
    """

    def grid(self, layer: int) -> int:
        """Return g of its sums in that layer: they count steps of 2^-g."""
        ...

    def sums(self, layer: int, forms: RowForms, plan: RoutingPlan) -> I64:
        """Return [T, D]. Raises NumericError, or ArtifactError for an expert that is unreadable."""
        ...


class Shadow:
    """The experts of a coarser artifact of the same model.

    artifact: the shadow: its layers' experts have its own schemes and grids. dispatch: where they
    are computed, in this process.
    """

    def __init__(self, artifact: Artifact, dispatch: ExpertDispatch) -> None:
        layers = [i for i, layer in enumerate(artifact.spec.layers) if layer.router is not None]
        self._schemes = {layer: artifact.scheme(layer) for layer in layers}
        self._grids = {layer: artifact.grid(layer) for layer in layers}
        self._dispatch = dispatch

    def grid(self, layer: int) -> int:
        """See Surrogate."""
        return self._grids[layer]

    def sums(self, layer: int, forms: RowForms, plan: RoutingPlan) -> I64:
        """See Surrogate."""
        return self._dispatch.start(layer, forms.get(self._schemes[layer]), plan).wait()


def expert_bits(artifact: Artifact) -> float:
    """Return how many bits a weight of its experts takes, on average."""
    num_bytes = num_weights = 0
    for index, layer in enumerate(artifact.spec.layers):
        if layer.router is not None:
            layout = artifact.expert_layout(index)
            num_bytes += layout.num_bytes * layer.router.num_experts
            num_weights += 3 * layout.dim * layout.ffn_dim * layer.router.num_experts
    return 8 * num_bytes / num_weights
