"""ExpertStore: where an expert's weights come from. Acquire, maybe wait, use, release.

`ResidentStore` keeps everything in RAM; a store that streams from disk through a cache fits behind
the same interface: acquiring may wait for a read or for room, and a lease keeps what it names from
being evicted.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from shoal.experts.ownership import Ownership


class Lease(Protocol):
    """Experts held in memory until the `with` block ends.

    weights: one uint8 array an expert, in the order asked for: kernel layout, 64-byte aligned,
        exactly the layout's num_bytes. Valid only inside the block.
    load_s: seconds that acquiring spent waiting for reads; 0.0 when all were in memory.
    """

    @property
    def weights(self) -> list[NDArray[np.uint8]]: ...
    @property
    def load_s(self) -> float: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class ExpertStore(Protocol):
    """Gives out experts. Thread-safe."""

    @property
    def ownership(self) -> Ownership: ...

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        """Return a lease on distinct experts of a layer; may wait for reads.

        Raises:
            NotOwned: naming the expert and what is owned. Never zeros in its place.
            CorruptArtifact: its bytes are not what the manifest says; OSError: they cannot be read.
        """
        ...

    def is_resident(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether acquiring these now would neither wait nor fail."""
        ...

    def close(self) -> None:
        """Give memory and files back. No lease may be held."""
        ...
