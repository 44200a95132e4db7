"""open_store: the one way to an `ExpertStore`, for nodes and for the coordinator's own process."""

from functools import partial

from shoal.errors import UsageError
from shoal.experts.cache import POLICIES
from shoal.experts.catalogue import Catalogue
from shoal.experts.checks import Checker
from shoal.experts.options import Backend
from shoal.experts.ownership import Ownership
from shoal.experts.readers.open_reader import open_reader
from shoal.experts.readers.queue_reader import Tuning
from shoal.experts.store import ExpertFiles, StoreOptions
from shoal.experts.streaming import StreamingStore
from shoal.limits import MIB

WARM_CHUNK_BYTES = 8 * MIB
# Of a warm-up in the background, beside calls' own reads. From a cold drive 2, 4 and 8 chunks had
# everything in memory equally soon; the first token was later the more there were.
BACKGROUND_DEPTH = 4


def open_store(
    files: ExpertFiles, ownership: Ownership, options: StoreOptions | None = None
) -> StreamingStore:
    """Return a store of what is owned; reads nothing yet. Close it.

    Raises:
        NotOwned: `files` lacks an owned expert.
        UsageError: the budget is below two experts; a data directory has no expert files; the
            backend asked for does not work here.
        OSError: a file cannot be opened.
    """
    options = options or StoreOptions()
    if options.policy not in POLICIES:
        raise UsageError(f"cache policy {options.policy!r}: there are {', '.join(POLICIES)}")
    backend, tuning = options.backend, Tuning()
    if backend is None and options.cache_bytes is None:
        # Everything is read once: what the page cache keeps makes the next start quick. Nobody
        # waits for a part of an expert, and large chunks leave the processors to the hashes.
        backend = Backend.BUFFERED
        tuning = Tuning(
            chunk_bytes=WARM_CHUNK_BYTES, prefetch_depth=BACKGROUND_DEPTH, keeps_page_cache=True
        )
    store = StreamingStore(
        files,
        ownership,
        partial(_catalogue, options=options),
        POLICIES[options.policy](1),
        lambda paths: open_reader(backend, None, paths, tuning=tuning),
        cache_bytes=options.cache_bytes,
        checker=Checker(options.verify),
    )
    store.pin(options.pins)
    return store


def _catalogue(files: ExpertFiles, ownership: Ownership, options: StoreOptions) -> Catalogue:
    return Catalogue(files, ownership, options.data_dirs)
