"""Finding stop strings in text that arrives in pieces (core)."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on, holding back an end that may be the beginning of a stop string.

    The first stop string to be complete ends the text; of several that complete with the same
    piece, the one that begins first. Neither it nor anything after it is passed on.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string would stop every text"
        self._stop = tuple(stop)
        self._held = ""
        self._is_stopped = False

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def push(self, text: str) -> str:
        """Return what is now certain to be no part of a stop string."""
        if self._is_stopped:
            return ""
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self._is_stopped, self._held = True, ""
            return text[: min(starts)]
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back: the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stop), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
