"""Cancellation: somebody asks that a request stops, the forward pass looks between layers."""


class Cancelled(Exception):
    """Unwinds a forward pass that nobody waits for. Not an error: the engine catches it."""


class Cancellation:
    """A flag that is set once, from a signal handler or another thread."""

    def __init__(self) -> None:
        self._requested = False

    @property
    def is_requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        self._requested = True

    def check(self) -> None:
        """Raise Cancelled if somebody asked for it."""
        if self._requested:
            raise Cancelled
