"""Which implementation of gRPC's wire carries expert calls."""

import select
from enum import StrEnum


class Transport(StrEnum):
    """grpcio: the reference. fast: our own framing of the same wire. auto: fast where it runs.

    Either end may use either: the bytes on the wire are gRPC's.
    """

    GRPCIO = "grpcio"
    FAST = "fast"
    AUTO = "auto"

    @property
    def is_fast(self) -> bool:
        """What `auto` comes to on this machine: poll(2) is missing on Windows."""
        return self is Transport.FAST or (self is Transport.AUTO and hasattr(select, "poll"))
