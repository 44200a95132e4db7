"""ShadowDrafter: the target itself with coarser experts, all of them in this process.

It shares the target's dense weights and reads the target's exact KV of everything that is verified,
so it needs no prefill of its own; what it writes for its guesses lies in blocks of its own.
"""

from collections.abc import Generator

from coordinator.cancellation import Cancellation
from coordinator.expert_branch import DispatchedExperts, WatchedExperts
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.hinting import with_hints
from coordinator.speculation.interface import DraftToken
from coordinator.speculation.model_passes import ModelPasses
from coordinator.speculation.shadow_experts import ShadowExperts
from coordinator.transformer import Transformer
from coordinator.weights import ModelWeights
from shoal import limits


class ShadowDrafter:
    """Guesses with a shadow of the target."""

    def __init__(
        self,
        shadow: ShadowExperts,
        weights: ModelWeights,
        kv: KvArrays,
        target: ExpertDispatch | None = None,
    ) -> None:
        """Open a drafter.

        Args:
            shadow: may have other users; it stays open.
            weights, kv: the target's own.
            target: where its experts are, which hears of the draft's routing; None: nobody does.
        """
        artifact = shadow.artifact
        dispatch = shadow.dispatch if target is None else with_hints(shadow.dispatch, target)
        watched = WatchedExperts(artifact.spec, DispatchedExperts(artifact, dispatch))
        self._local_expert_bytes = shadow.num_bytes
        self._kv = kv
        self._passes = ModelPasses(Transformer(artifact.spec, weights, watched), kv, watched)
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

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        """See `Drafter.draft`."""
        assert self._request is not None, "a draft before its request"
        fork = fork_with_kv(sequence, self._kv, sequence.num_tokens + limits.MAX_LEAD)
        if fork is None:
            return
        try:
            yield from self._passes.guess(fork, self._request, cancellation)
        finally:
            fork.truncate(0)

    def close(self) -> None:
        """See `Drafter.close`."""


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
