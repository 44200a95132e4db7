"""WholeStore: every owned expert read beforehand, one by one: the oracle of stores that stream."""

from collections.abc import Iterator, Sequence
from typing import Self

from shoal.artifact import Artifact
from shoal.experts.executor import ExpertExecutor
from shoal.experts.ownership import Ownership
from shoal.experts.store import Wave
from shoal.ops import ExpertTable


class WholeStore:
    """What an executor asks of an `ExpertStore`, with nothing that waits, evicts or is closed."""

    def __init__(self, artifact: Artifact, ownership: Ownership | None = None) -> None:
        self.ownership = ownership or Ownership(artifact.owned_experts)
        self.tables: dict[int, ExpertTable] = {}  # none: the way by acquisitions is the oracle
        self._weights = {
            (layer, index): artifact.read_expert(layer, index)[
                : artifact.expert_layout(layer).num_bytes
            ]
            for layer in self.ownership.layers
            for index in self.ownership.experts(layer)
        }

    def acquire(self, layer: int, experts: Sequence[int]) -> "WholeAcquisition":
        self.ownership.check(layer, experts)
        weights = [self._weights[layer, index] for index in experts]
        return WholeAcquisition(Wave(range(len(experts)), weights))

    def try_acquire(self, layer: int, experts: Sequence[int]) -> "WholeAcquisition":
        return self.acquire(layer, experts)

    def is_resident(self, layer: int, experts: Sequence[int]) -> bool:
        return all((layer, index) in self._weights for index in experts)

    def close(self) -> None:
        """There is nothing to give back."""


class WholeAcquisition:
    """One wave."""

    is_whole = True
    load_s = 0.0

    def __init__(self, wave: Wave) -> None:
        self._wave = wave

    def abandon(self, error: BaseException) -> None:
        """It never waits."""

    def __iter__(self) -> Iterator[Wave]:
        yield self._wave

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""


def whole_executor(artifact: Artifact, ownership: Ownership | None = None) -> ExpertExecutor:
    """Return an executor of experts that were all read beforehand."""
    return ExpertExecutor(artifact, WholeStore(artifact, ownership))
