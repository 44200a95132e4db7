"""TextStream: generated ids in, certain text out: whole characters, no stop string in it."""

from collections.abc import Sequence

from coordinator.stop_strings import StopStrings
from coordinator.tokenizer import Tokenizer


class TextStream:
    """The text of one answer.

    context: the ids before it; some tokenizers spell the first token of a text without its space.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], context: Sequence[int] = ()
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(context)
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
