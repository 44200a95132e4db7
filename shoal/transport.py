"""How expert calls travel: by which implementation of gRPC's wire, and in which form replies."""

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


class Wire(StrEnum):
    """exact: replies are integers. bf16: rounded to bfloat16: fewer bytes, and other tokens."""

    EXACT = "exact"
    BF16 = "bf16"
