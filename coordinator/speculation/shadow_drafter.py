"""ShadowDrafter: the target itself with coarser experts, all of them in this process.

It shares the target's dense weights and reads the target's exact KV of everything that is verified,
so it needs no prefill of its own; what it writes for its guesses lies in blocks of its own.
"""

from collections.abc import Callable, Iterator

from coordinator.cancellation import Cancellation
from coordinator.expert_branch import DispatchedExperts, WatchedExperts
from coordinator.expert_dispatch import LocalDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.interface import DraftToken
from coordinator.speculation.model_passes import ModelPasses
from coordinator.transformer import Transformer
from coordinator.weights import ModelWeights
from shoal import limits
from shoal.artifact import Artifact
from shoal.experts.local import LocalExperts, owned_bytes
from shoal.experts.ownership import Ownership
from shoal.experts.store import WarmUpProgress


class ShadowDrafter:
    """Guesses with a shadow of the target."""

    def __init__(
        self,
        shadow: Artifact,
        weights: ModelWeights,
        kv: KvArrays,
        report: Callable[[WarmUpProgress], None],
    ) -> None:
        """Read all experts of the shadow.

        Args:
            shadow: has the target's shape, and all experts.
            weights, kv: the target's own.
            report: told of every expert that was read.

        Raises: as `LocalExperts.warm_up`.
        """
        ownership = Ownership(shadow.owned_experts)
        self._experts = LocalExperts(shadow, ownership)
        try:
            self._experts.warm_up(report)
        except BaseException:
            self._experts.close()
            raise
        self._local_expert_bytes = owned_bytes(shadow, ownership)
        branch = DispatchedExperts(shadow, LocalDispatch(self._experts.executor))
        watched = WatchedExperts(shadow.spec, branch)
        self._kv = kv
        self._passes = ModelPasses(Transformer(shadow.spec, weights, watched), kv, watched)
        self._request: GenerationRequest | None = None

    @property
    def name(self) -> str:
        return "shadow"

    @property
    def local_expert_bytes(self) -> int:
        return self._local_expert_bytes

    def begin(self, request: GenerationRequest) -> None:
        """See `Drafter.begin`."""
        self._request = request

    def draft(self, sequence: Sequence, cancellation: Cancellation) -> Iterator[DraftToken]:
        """See `Drafter.draft`."""
        assert self._request is not None, "a draft before its request"
        fork = fork_with_kv(sequence, self._kv, sequence.num_tokens + limits.MAX_DRAFT)
        if fork is None:
            return
        try:
            yield from self._passes.guess(fork, self._request, cancellation)
        finally:
            fork.truncate(0)

    def close(self) -> None:
        """See `Drafter.close`."""
        self._experts.close()


def fork_with_kv(sequence: Sequence, kv: KvArrays, num_tokens: int) -> Sequence | None:
    """Return a fork that has all KV of the sequence and room for `num_tokens` tokens.

    None when the pool is dry. Let go of it with `truncate(0)`.
    """
    fork = sequence.try_fork(num_tokens)
    if fork is None:
        return None
    num_in_last_block = sequence.num_cached - fork.num_cached
    if num_in_last_block:
        last = fork.num_cached // limits.KV_BLOCK_TOKENS
        kv.copy_block(sequence.blocks[last], fork.blocks[last])
        fork.advance(num_in_last_block)
    return fork
