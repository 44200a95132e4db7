"""LookupDrafter: what followed the last time that the text ended like this.

Needs no model: answers repeat their prompts, code repeats itself. Two suffix indexes are asked, one
over this request's prompt and output, one over the user's past texts where those were asked for;
the better guess speaks, the request's own of equals. What a guess is worth follows from the length
of the match and how often it was followed by just this token; a guess makes the match one longer
for the next. As guesses are cheap, every token that comes is compared with what would have been
guessed, verified or not: so it is known what lookup is worth in this text before it is used.
"""

from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from coordinator.cancellation import Cancellation
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.acceptance import Acceptance
from coordinator.speculation.interface import DraftToken
from coordinator.speculation.suffix_index import MAX_LENGTH, Continuation, SuffixIndex, Walk
from shoal import limits

# Chance that a match's likeliest continuation is the token to come, by length of the match and by
# what stood behind it: [once, several times and always the same, mostly, at most half of the time].
# Source: `python -m bench.lookup_chances smollm2`: 2,881 tokens that SmolLM2 wrote to the prompts
# of bench/wan/texts (summaries, code, questions, stories), greedily and at temperature 0.8, and
# 4,142 that it wrote to twelve other prompts of these kinds. Right of seen, all together:
#     1: 109/531 44/101 31/109 137/1178    5-7: 237/301 17/20 1/1 3/10
#     2: 170/452 46/69 16/37 25/150        8-15: 306/347 12/14 3/4 0/1
#     3: 142/242 20/25 2/12 9/35           16-23: 194/198 3/3 - -
#     4: 112/162 15/16 1/1 4/9             24: 806/820 198/198 3/3 3/3
# Where few were seen, the neighbours say.
CHANCES: dict[int, tuple[float, float, float, float]] = {
    1: (0.21, 0.44, 0.28, 0.12),
    2: (0.38, 0.66, 0.40, 0.17),
    3: (0.59, 0.80, 0.45, 0.26),
    4: (0.69, 0.84, 0.50, 0.35),
    5: (0.79, 0.86, 0.55, 0.40),
    8: (0.88, 0.90, 0.65, 0.45),
    16: (0.975, 0.98, 0.80, 0.55),
    24: (0.983, 0.995, 0.85, 0.60),
}
_ROWS = [CHANCES[max(known for known in CHANCES if known <= n)] for n in range(1, MAX_LENGTH + 1)]


class Past(Protocol):
    """Texts of earlier requests, as `history.History` keeps them."""

    @property
    def texts(self) -> SequenceOf[SequenceOf[int]]:
        """All of them, the oldest first."""
        ...

    def add(self, token_ids: SequenceOf[int]) -> None:
        """Keep another one."""
        ...

    def close(self) -> None:
        """Write what is not written."""
        ...


class LookupDrafter:
    """Drafts from the text itself."""

    def __init__(self, past: Past | None = None) -> None:
        """Args: past: of the same tokenizer; taken over. Every request's text is added to it."""
        self._past = past
        self._luck = Acceptance()
        self._num_prompt = 0
        self._past_index = SuffixIndex(limits.MAX_LOOKUP_TOKENS)
        for token_ids in past.texts if past is not None else ():
            self._past_index.extend(token_ids)
            self._past_index.split()
        self._clear()

    def _clear(self) -> None:
        self._text: list[int] = []  # all that was read of the sequence
        self._index = SuffixIndex(limits.MAX_LOOKUP_TOKENS)
        self._past_walk = self._past_index.follow(())

    @property
    def name(self) -> str:
        return "lookup"

    @property
    def local_expert_bytes(self) -> int:
        return 0

    def begin(self, request: GenerationRequest) -> None:
        """See `Drafter.begin`. The text of the request before becomes past."""
        # A chat's next prompt begins with all that was said: kept once, with its end.
        if tuple(self._text[: len(request.prompt_ids)]) != request.prompt_ids[: len(self._text)]:
            self._keep()
        self._clear()
        self._num_prompt = len(request.prompt_ids)

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        """See `Drafter.draft`. Microseconds a guess, after the first has read what is new."""
        self._read(sequence)
        own, past = self._index.walk(), self._past_walk.copy()
        while (guess := _better(own, past)) is not None:
            yield DraftToken(guess.token_id, self._luck.chance(guess.chance))
            own.step(guess.token_id)
            past.step(guess.token_id)

    def close(self) -> None:
        """See `Drafter.close`."""
        self._keep()
        self._clear()
        if self._past is not None:
            self._past.close()

    def _keep(self) -> None:
        if self._past is None or not self._text:
            return
        self._past.add(self._text)
        self._past_index.extend(self._text)
        self._past_index.split()

    def _read(self, sequence: Sequence) -> None:
        """Index what the sequence has got since the last time."""
        token_ids, num_read = sequence.token_ids, len(self._text)
        tail = max(0, num_read - MAX_LENGTH)
        if token_ids[tail:num_read].tolist() != self._text[tail:]:
            self._clear()  # another text, or one that was cut
            num_read = 0
        new = token_ids[num_read:].tolist()
        num_prompt = min(len(new), max(0, self._num_prompt - num_read))
        self._add(new[:num_prompt])
        for token_id in new[num_prompt:]:
            guess = _better(self._index.walk(), self._past_walk.copy())
            if guess is not None:
                self._luck.observe([guess.chance], int(guess.token_id == token_id))
            self._add([token_id])

    def _add(self, token_ids: list[int]) -> None:
        self._text += token_ids
        self._index.extend(token_ids)
        for token_id in token_ids:
            self._past_walk.step(token_id)


def _better(own: Walk, past: Walk) -> DraftToken | None:
    """Return the likelier of two walks' guesses, with its chance by the table."""
    guess, other = _guess(own), _guess(past)
    if guess is None or (other is not None and other.chance > guess.chance):
        return other
    return guess


def _guess(walk: Walk) -> DraftToken | None:
    """Return the likeliest token after the walk's match; shortens it where nothing followed."""
    while walk.length:
        found = walk.best()
        if found is not None:
            best, total = found
            return DraftToken(best.token_id, chance(walk.length, best, total))
        walk.shorten()
    return None


def chance(length: int, best: Continuation, total: int) -> float:
    """Return how likely a match's best continuation comes.

    Args:
        length: of the match, >= 1. total: how often anything followed it.
    """
    return _ROWS[length - 1][column_of(best, total)]


def column_of(best: Continuation, total: int) -> int:
    """Return which column of CHANCES speaks of it; as `chance`."""
    if total == 1:
        return 0
    if best.count == total:
        return 1
    return 2 if 2 * best.count > total else 3
