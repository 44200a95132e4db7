"""What an engine of bench/peer/experts.py is asked, and what it answers: JSON lines over a pipe.

Read by the peer's Python too: the standard library and nothing else.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

DIM, FFN_DIM, EXPERTS_PER_TOKEN = 2048, 768, 8  # Qwen3-30B-A3B
EXPERTS_FILE = "experts.npy"  # uint8 [distinct experts, gate | up | down row-major], as in GGUF
ROWS_FILE = "rows.npy"  # float32 [rows, DIM]


@dataclass(frozen=True)
class Turn:
    """Calls of one layer each: the first `rows` rows of the file through eight experts.

    visits: the experts of each call. num_warm: as many of the first warm up before the clock
    starts: threads and cores slept while others had their turn. wants_result: answer what the last
    call made of the last row.
    """

    rows: int
    threads: int
    visits: list[list[int]]
    num_warm: int
    wants_result: bool = False


@dataclass(frozen=True)
class Answer:
    """seconds: of the calls after the warm ones. result: the mean of eight experts, [DIM]."""

    seconds: float
    result: list[float] | None


def serve(run: Callable[[Turn], Answer] | None) -> None:
    """Answer each turn of stdin; None: say that this engine cannot do the work, and end."""
    print(json.dumps({"ready": run is not None}), flush=True)
    if run is None:
        return
    for line in sys.stdin:
        print(json.dumps(asdict(run(Turn(**json.loads(line))))), flush=True)
