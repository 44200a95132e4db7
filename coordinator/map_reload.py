"""SIGHUP: the shard map's file is read again, without losing a request."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from shoal.errors import ShoalError

CLOSE_TIMEOUT_S = 5.0


class Reloadable(Protocol):
    """What a RemoteDispatch is here."""

    def reload(self) -> str: ...


@contextmanager
def reload_on_hangup(dispatch: Reloadable, tell: Callable[[str], None]) -> Iterator[None]:
    """Reload the map on SIGHUP for as long as the block runs. No effect outside the main thread.

    The reading and the meeting of new nodes are done by a thread of their own, one reload at a
    time, while the forward pass goes on. `tell` hears how each one went.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGHUP"):
        yield
        return
    asked = threading.Event()
    is_over = threading.Event()

    def work() -> None:
        while True:
            asked.wait()
            if is_over.is_set():
                return
            asked.clear()
            try:
                tell(f"the shard map is reloaded: {dispatch.reload()}")
            except ShoalError as error:
                tell(f"the shard map stays as it was: {error}")

    def on_hangup(number: int, frame: FrameType | None) -> None:
        asked.set()

    thread = threading.Thread(target=work, name="shoal-reload", daemon=True)
    thread.start()
    previous = signal.signal(signal.SIGHUP, on_hangup)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)
        is_over.set()
        asked.set()
        thread.join(CLOSE_TIMEOUT_S)
