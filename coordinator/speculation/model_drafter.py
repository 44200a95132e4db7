"""ModelDrafter: another, smaller model of the same tokenizer, with weights and KV of its own."""

from collections.abc import Callable, Generator

from coordinator.cancellation import Cancellation
from coordinator.expert_dispatch import LocalDispatch
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool, blocks_for
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.interface import DraftToken
from coordinator.speculation.model_passes import ModelPasses
from coordinator.transformer import exact_transformer
from shoal import limits
from shoal.artifact import Artifact
from shoal.experts.local import LocalExperts, owned_bytes
from shoal.experts.ownership import Ownership
from shoal.experts.store import WarmUpProgress


class ModelDrafter:
    """Guesses with a model whose sequence follows the target's by their common prefix."""

    def __init__(
        self, artifact: Artifact, max_context: int, report: Callable[[WarmUpProgress], None]
    ) -> None:
        """Read the model.

        Args:
            artifact: of the draft model, with all experts.
            max_context: tokens of the target's longest sequence; where the draft model was made
                for fewer, it has nothing to say about what lies beyond.
            report: told of every expert that was read.

        Raises: as `LocalExperts.warm_up` and `exact_transformer`.
        """
        longest = min(max_context + limits.MAX_LEAD, artifact.spec.max_context)
        num_blocks = blocks_for(longest)
        ownership = Ownership(artifact.owned_experts)
        self._experts = LocalExperts(artifact, ownership)
        try:
            self._experts.warm_up(report)
            transformer = exact_transformer(artifact, LocalDispatch(self._experts.executor))
            kv = KvArrays(artifact.spec, artifact.kv_dtype, num_blocks)
        except BaseException:
            self._experts.close()
            raise
        self._local_expert_bytes = owned_bytes(artifact, ownership)
        self._passes = ModelPasses(transformer, kv)
        self._sequence = Sequence(KvBlockPool(num_blocks))
        self._request: GenerationRequest | None = None

    @property
    def name(self) -> str:
        return "draft"

    @property
    def local_expert_bytes(self) -> int:
        return self._local_expert_bytes

    def begin(self, request: GenerationRequest) -> None:
        """See `Drafter.begin`. The KV of what the last request shares with it is kept."""
        self._request = request

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        """See `Drafter.draft`."""
        assert self._request is not None, "a draft before its request"
        own, token_ids = self._sequence, sequence.token_ids
        # The last token always runs: its logits are what the first guess is drawn from.
        num_kept = min(own.common_prefix(token_ids), own.num_cached, token_ids.size - 1)
        own.truncate(num_kept)
        own.extend(token_ids[num_kept:])
        yield from self._passes.guess(own, self._request, cancellation)

    def close(self) -> None:
        """See `Drafter.close`."""
        self._experts.close()
