"""Ctrl-C while a model answers: the first asks the answer to stop, the second ends the program."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from coordinator.cancellation import Cancellation


@contextmanager
def cancel_on_interrupt() -> Iterator[Cancellation]:
    """Turn SIGINT into a request to cancel, for as long as the block runs.

    The forward pass looks for it between layers, so no call to a node is torn in the middle.
    A second SIGINT raises KeyboardInterrupt at once. Main thread only.
    """
    cancellation = Cancellation()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if cancellation.is_requested:
            raise KeyboardInterrupt
        cancellation.request()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield cancellation
    finally:
        signal.signal(signal.SIGINT, previous)
