"""Run an op on every instruction set and several thread counts, and demand the same bytes."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shoal import ops

THREADS = (1, 2, 4)


def same_bits_everywhere(op: Callable[[], Sequence[NDArray[np.generic]]]) -> None:
    """Fail, naming the instruction set and threads, where op() gives other bytes."""
    isa, threads = ops.isa(), ops.num_threads()
    try:
        ops.set_isa("scalar")
        ops.set_threads(1)
        expected = [array.tobytes() for array in op()]
        for name in ops.available_isas():
            for count in THREADS:
                ops.set_isa(name)
                ops.set_threads(count)
                actual = [array.tobytes() for array in op()]
                assert actual == expected, f"other bits on {name} with {count} threads"
    finally:
        ops.set_isa(isa)
        ops.set_threads(threads)
