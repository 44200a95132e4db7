"""BackgroundWarmUp: a warm-up on a thread of its own, and what became of it."""

import threading
from collections.abc import Callable

from shoal.errors import ShoalError


class BackgroundWarmUp:
    """Begins at once. It ends early when its store is closed; `join` it then."""

    def __init__(self, warm_up: Callable[[], None]) -> None:
        self._warm_up = warm_up
        self._error: BaseException | None = None
        # A daemon: a store that nobody closed is closed at exit, and does not wait for it.
        self._thread = threading.Thread(target=self._run, name="shoal-warm-up", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the warm-up ended with, if it was an error; each caller gets one of its own.

        Raises: as `ExpertStore.warm_up`.
        """
        error = self._error
        if isinstance(error, ShoalError):
            raise type(error)(*error.args) from error
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait for its end, whatever that is."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:  # noqa: BLE001  the top of a thread: `check` raises it
            self._error = error
