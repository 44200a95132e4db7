"""ShadowExperts: a coarser copy of a model's experts, all in this process; who drafts shares it."""

from collections.abc import Callable

from coordinator.expert_dispatch import LocalDispatch
from shoal.artifact import Artifact
from shoal.experts.local import LocalExperts, owned_bytes
from shoal.experts.ownership import Ownership
from shoal.experts.store import WarmUpProgress


class ShadowExperts:
    """The experts of a shadow in memory. Close it after everybody who uses it."""

    def __init__(self, shadow: Artifact, report: Callable[[WarmUpProgress], None]) -> None:
        """Read them all.

        Args:
            shadow: has the target's shape, and all experts.
            report: told of every expert that was read.

        Raises: as `LocalExperts.warm_up`.
        """
        ownership = Ownership(shadow.owned_experts)
        self._local = LocalExperts(shadow, ownership)
        try:
            self._local.warm_up(report)
        except BaseException:
            self._local.close()
            raise
        self.artifact = shadow
        self.dispatch = LocalDispatch(self._local.executor)
        self.num_bytes = owned_bytes(shadow, ownership)

    def close(self) -> None:
        """Let go of the experts."""
        self._local.close()
