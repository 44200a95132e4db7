"""TextStream: generated ids in, certain text out: whole characters, no stop string in it."""

from coordinator.stop_strings import StopStrings
from coordinator.tokenizer import Tokenizer


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopStrings(stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._stop.is_stopped

    def push(self, token_id: int) -> str:
        """Return the text that this token makes certain; it may belong to earlier tokens."""
        return self._stop.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return what was held back for a character or a stop string that never came."""
        if self._stop.is_stopped:
            return ""
        return self._stop.push(self._detokenizer.finish()) + self._stop.finish()
