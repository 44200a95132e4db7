"""What one engine is asked to do, and what it answers: JSON lines over a pipe.

Read by the peer's Python too: the standard library and nothing else.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_ROWS_WITH_LOGITS = 32  # of speculation and batches; a prompt needs those of its last row
FILL_ROWS = 512  # the context that is really computed; more of it is copies


@dataclass(frozen=True)
class Phase:
    """`steps` forward passes, each of `rows` rows, each behind the same context of that length.

    A decode is rows = 1, a prompt is context = 0, verifying a draft is a few rows. Contexts beyond
    FILL_ROWS hold copies of it: what attention costs does not depend on what it attends to.
    """

    name: str
    rows: int
    context: int
    threads: int
    steps: int

    @property
    def num_logits(self) -> int:
        return self.rows if self.rows <= MAX_ROWS_WITH_LOGITS else 1


def serve(run: Callable[[Phase, Callable[[], float]], None]) -> None:
    """Answer each phase of stdin with the seconds of its steps.

    Args: run: does one phase; it calls its second argument before its first step and after each.
    """
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        marks: list[float] = []

        def mark(marks: list[float] = marks) -> float:
            marks.append(time.perf_counter())
            return marks[-1]

        run(Phase(**json.loads(line)), mark)
        steps = [after - before for before, after in itertools.pairwise(marks)]
        print(json.dumps({"step_s": steps}), flush=True)
