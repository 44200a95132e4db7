"""What gRPC reads in the environment when it is imported: to be said before that.

Its log: what matters it also raises, and we report.

Its poller: by itself gRPC 1.85 lets threads of its own read sockets, one that polls and one that
reads, and a message crosses both before the thread that waits for it wakes. The older poller reads
in the thread that waits. Measured, a round trip to two processes at once on loopback, 4 KB each:
0.8 ms with the first, 0.5 ms with the second.
"""

import importlib.util
import os
from pathlib import Path

WHO_WAITS_READS = "-event_engine_client,-event_engine_listener"
_KNOWN_TO = "grpcio-1.85.*.dist-info"  # another version may complain that it knows no such switch


def prepare_grpc(verbosity: str) -> None:
    """Choose gRPC's poller and the least severity that it logs; a user's settings stay."""
    os.environ.setdefault("GRPC_VERBOSITY", verbosity)
    if _is_known():
        os.environ.setdefault("GRPC_EXPERIMENTS", WHO_WAITS_READS)


def _is_known() -> bool:
    # Looked for by its folder: to import importlib.metadata takes longer than a small process does.
    found = importlib.util.find_spec("grpc")
    if found is None or found.origin is None:
        return False
    return any(Path(found.origin).parents[1].glob(_KNOWN_TO))
