"""open_store: the one way to an `ExpertStore`, for nodes and for the coordinator's own process."""

from shoal.errors import UsageError
from shoal.experts.ownership import Ownership
from shoal.experts.resident import ResidentStore
from shoal.experts.store import ExpertFiles, ExpertStore, StoreOptions


def open_store(
    files: ExpertFiles, ownership: Ownership, options: StoreOptions | None = None
) -> ExpertStore:
    """Return a store of what is owned; reads nothing yet. Close it.

    Raises:
        NotOwned: `files` lacks an owned expert.
        UsageError: the budget is below two experts; a data directory lacks a file; the backend
            asked for does not work here.
    """
    options = options or StoreOptions()
    if options.cache_bytes is not None:
        raise UsageError("--cache: not in this build")
    return ResidentStore(files, ownership)
