"""Experts computed in this process: store, prefetcher and executor, opened and closed together."""

from collections.abc import Callable

from shoal.artifact import Artifact
from shoal.experts.background import BackgroundWarmUp
from shoal.experts.executor import ExpertExecutor
from shoal.experts.open_store import open_store
from shoal.experts.options import Mode
from shoal.experts.ownership import Ownership
from shoal.experts.prefetch.interface import Prefetcher, PrefetchStore
from shoal.experts.prefetch.open_prefetcher import open_prefetcher
from shoal.experts.store import StoreOptions, WarmUpProgress
from shoal.limits import MIB

# Read in less than 50 ms of a warm page cache: a small model that is damaged is refused at the
# start, and nothing runs beside its calls.
MAX_BYTES_AT_ONCE = 64 * MIB


class LocalExperts:
    """See the module. Close it."""

    def __init__(
        self,
        artifact: Artifact,
        ownership: Ownership,
        options: StoreOptions | None = None,
        prefetch: Mode = Mode.AUTO,
    ) -> None:
        """Open the store; reads nothing yet. Raises as `open_store` and `open_prefetcher` do."""
        options = options or StoreOptions()
        cache_bytes = options.cache_bytes
        self._fits = cache_bytes is None or cache_bytes >= owned_bytes(artifact, ownership)
        self.store = open_store(artifact, ownership, options)
        try:
            prefetcher = prefetcher_for(prefetch, artifact, ownership, cache_bytes, self.store)
        except BaseException:
            self.store.close()
            raise
        self.executor = ExpertExecutor(artifact, self.store, prefetcher=prefetcher)

    def warm_up(self, report: Callable[[WarmUpProgress], None]) -> None:
        """Read everything if it fits; a part of it would only be evicted by what is called.

        Raises as `ExpertStore.warm_up`.
        """
        if self._fits:
            self.store.warm_up(report)

    def warm_up_beside(self, report: Callable[[WarmUpProgress], None]) -> BackgroundWarmUp | None:
        """Begin to do what `warm_up` does, on another thread, behind what calls want meanwhile.

        What takes no time worth mentioning is read at once, and what does not fit is not: None.
        Raises as `warm_up`, and so does what is returned.
        """
        if not self._fits or self.store.num_bytes <= MAX_BYTES_AT_ONCE:
            self.warm_up(report)
            return None
        return BackgroundWarmUp(lambda: self.store.warm_up(report, is_background=True))

    @property
    def how_read(self) -> str:
        """A sentence on how what is not in memory is read; "" where all of it fits."""
        reader = self.store.figures().reader
        if self._fits or reader is None:
            return ""
        reasons = f" ({reader.reasons})" if reader.reasons else ""
        return f"experts that are not in memory are read by {reader.backend}{reasons}"

    def close(self) -> None:
        """Let go of everything. No call may be under way."""
        self.executor.close()


def prefetcher_for(
    mode: Mode,
    artifact: Artifact,
    ownership: Ownership,
    cache_bytes: int | None,
    store: PrefetchStore,
) -> Prefetcher | None:
    """Return a prefetcher, or None where it has nothing to do: everything owned fits in memory.

    Raises as `open_prefetcher`.
    """
    if cache_bytes is None or cache_bytes >= owned_bytes(artifact, ownership):
        return None
    return open_prefetcher(mode, artifact, ownership, store)


def owned_bytes(artifact: Artifact, ownership: Ownership) -> int:
    """Return what all owned experts take."""
    return sum(
        len(ownership.experts(layer)) * artifact.expert_layer(layer).expert_bytes
        for layer in ownership.layers
    )
