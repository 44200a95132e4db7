"""Whether the bytes that were read are an expert: hashes, and what read errors mean."""

import errno
import threading

from blake3 import blake3

from shoal.errors import CorruptArtifact, ExpertUnavailable, ShoalError
from shoal.experts.cache.policy import Key
from shoal.experts.catalogue import Listing
from shoal.experts.options import Verify
from shoal.experts.readers.reader import U8, Origin

FIX = "fetch or convert the model again"
NOTHING: Origin = frozenset()
MAX_KNOWN_CHUNKS = (
    1024  # of one expert, over its copies and their states; then the last one's alone
)


class Checker:
    """Compares hashes as often as asked. Thread-safe; an expert is checked by one thread."""

    def __init__(self, verify: Verify) -> None:
        self.verify = verify
        self.num_verified = 0
        self.num_corrupt = 0
        self._lock = threading.Lock()
        self._checked: dict[Key, Origin] = {}  # what was part of a read that was right

    def is_due(self, key: Key, origin: Origin | None) -> bool:
        """Whether what was just read, from there, is to be checked."""
        if self.verify is not Verify.FIRST:
            return self.verify is Verify.ALWAYS
        return origin is None or not origin <= self._checked.get(key, NOTHING)

    def check(
        self,
        key: Key,
        listing: Listing,
        memory: U8,
        origin: Origin | None,
        *,
        is_alone: bool = True,
    ) -> None:
        """Raise CorruptArtifact if these bytes are not the expert's.

        Args:
            origin: what they were read from (see `Done`).
            is_alone: no others are checked at the same time: it may take all processors.
        """
        digest = blake3(memory.data, max_threads=blake3.AUTO if is_alone else 1).hexdigest()
        is_right = digest == listing.blake3
        with self._lock:
            self.num_verified += 1
            self.num_corrupt += not is_right
            if not is_right:
                self._checked.pop(key, None)
            elif origin is not None:
                known = origin | self._checked.get(key, NOTHING)
                self._checked[key] = known if len(known) <= MAX_KNOWN_CHUNKS else origin
        if not is_right:
            raise CorruptArtifact(
                f"{_paths(listing)}: {_name(key)}: its bytes are not those that were written"
                f" ({listing.num_bytes} bytes at {listing.sources[0].offset}); {FIX}"
            )


def read_failure(key: Key, listing: Listing, error: OSError) -> ShoalError:
    """Return what a call learns of a read that failed for good."""
    where = error.filename or _paths(listing)
    match error.errno:
        case errno.ENODATA:
            return CorruptArtifact(f"{where}: truncated inside {_name(key)}; {FIX}")
        case errno.ENOENT:
            return CorruptArtifact(f"{where} is missing ({_name(key)}); {FIX}")
        case _:
            return ExpertUnavailable(
                f"{_name(key)} cannot be read from {where}: {error.strerror or error}; "
                "it is tried again at the next call: check the drive"
            )


def _name(key: Key) -> str:
    return f"expert {key[1]} of layer {key[0]}"


def _paths(listing: Listing) -> str:
    return ", ".join(str(source.path) for source in listing.sources)
