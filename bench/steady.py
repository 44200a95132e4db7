"""What precedes a measurement: cores that have been at work for a while.

Read by the peer's Python too: the standard library and nothing else.
"""

import time
from collections.abc import Callable

# Cores that were idle are slow at first. Two virtual ones, both at work after a pause of a second:
# half as fast for 40 to 200 ms, most often, and then steady within 2 %.
STEADY_S = 0.25


def warm_up(work: Callable[[], object], at_least_s: float = STEADY_S) -> None:
    """Do some work again and again for that long, at least once."""
    until = time.perf_counter() + at_least_s
    work()
    while time.perf_counter() < until:
        work()
