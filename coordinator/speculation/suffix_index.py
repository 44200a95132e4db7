"""Suffix index: where the end of a text occurred before, and what followed there (core).

A suffix automaton, built token by token. A state stands for strings that end at the same places:

    link: the state of the longest suffix that ends at more places       len: its longest string
    next: token -> state       count, last: at how many places, and the last of them

After a token the longest suffix that occurred before is the link of the newest state, so a match is
never searched for. Counts are kept for strings up to MAX_COUNTED tokens: the suffixes of that
length are walked from a cursor which, as the automaton itself, moves O(1) a token on average.

Several texts may be added; `split` stands between them, and no match crosses it. When the index is
full, the older half of what it holds is forgotten.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_LENGTH = 24  # tokens of a match that are looked at: a longer one is as good as certain
MAX_COUNTED = MAX_LENGTH + 1  # a match and what follows it
_ROOT = 0


@dataclass(frozen=True, slots=True)
class Continuation:
    """A token that followed, and how often. last: the place where it did last; later is larger."""

    token_id: int
    count: int
    last: int


@dataclass(frozen=True, slots=True)
class Match:
    """The longest suffix that occurred before, and what followed: most often first, then latest.

    length: tokens of the suffix, at most MAX_LENGTH.
    """

    length: int
    continuations: tuple[Continuation, ...]

    @property
    def total(self) -> int:
        return sum(continuation.count for continuation in self.continuations)


class SuffixIndex:
    """An automaton over all that was added.

    Args:
        max_tokens: of the text that it holds; it takes some 700 bytes for each at most.
    """

    def __init__(self, max_tokens: int) -> None:
        assert max_tokens >= 2, max_tokens
        self._max_tokens = max_tokens
        self._num_splits = 0
        self.num_operations = 0  # steps along links and edges so far; tests bound it
        self._clear()

    def _clear(self) -> None:
        self._ids: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._len: list[int] = [0]
        self._count: list[int] = [0]
        self._last: list[int] = [-1]
        self._newest = _ROOT
        self._cursor = _ROOT  # the state of the last MAX_COUNTED tokens

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def num_states(self) -> int:
        return len(self._next)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens (not negative) to the text."""
        for token_id in token_ids:
            self._append(token_id)

    def split(self) -> None:
        """End the text; what is added from now on is another one."""
        if self._ids:
            self._num_splits += 1
            self._append(-self._num_splits)  # a token that occurs once: nothing matches across

    def longest_match(self, max_length: int = MAX_LENGTH) -> Match:
        """Return the longest suffix of the text that occurred before, up to `max_length` tokens."""
        return self.walk(max_length).match()

    def walk(self, max_length: int = MAX_LENGTH) -> "Walk":
        """Begin at that suffix, to go on as if tokens had followed. Valid until the next change."""
        assert 0 <= max_length <= MAX_LENGTH, max_length
        state = max(_ROOT, self._link[self._newest])
        while state != _ROOT and self._len[self._link[state]] >= max_length:
            state = self._link[state]
        return Walk(self, state, min(max_length, self._len[state]))

    def follow(self, token_ids: Iterable[int]) -> "Walk":
        """Begin at the longest suffix of another text that occurs here."""
        walk = Walk(self, _ROOT, 0)
        for token_id in token_ids:
            walk.step(token_id)
        return walk

    def _append(self, token_id: int) -> None:
        if len(self._ids) == self._max_tokens:
            kept = self._ids[(self._max_tokens + 1) // 2 :]
            self._clear()
            for kept_id in kept:
                self._append(kept_id)
        state = self._add_state({}, self._len[self._newest] + 1)
        behind = self._newest
        while behind != -1 and token_id not in self._next[behind]:
            self._next[behind][token_id] = state
            behind = self._link[behind]
            self.num_operations += 1
        self._link[state] = _ROOT if behind == -1 else self._shared(behind, token_id)
        self._newest = state
        self._ids.append(token_id)
        self._count_suffixes(token_id)

    def _shared(self, behind: int, token_id: int) -> int:
        """Return the state of `behind` and the token, split off if it also has longer strings."""
        found = self._next[behind][token_id]
        if self._len[found] == self._len[behind] + 1:
            return found
        clone = self._add_state(dict(self._next[found]), self._len[behind] + 1)
        self._count[clone], self._last[clone] = self._count[found], self._last[found]
        self._link[clone], self._link[found] = self._link[found], clone
        while behind != -1 and self._next[behind].get(token_id) == found:
            self._next[behind][token_id] = clone
            behind = self._link[behind]
            self.num_operations += 1
        return clone

    def _add_state(self, edges: dict[int, int], length: int) -> int:
        self._next.append(edges)
        self._link.append(_ROOT)
        self._len.append(length)
        self._count.append(0)
        self._last.append(-1)
        return len(self._next) - 1

    def _count_suffixes(self, token_id: int) -> None:
        """Note one more place for every suffix of up to MAX_COUNTED tokens."""
        state = self._next[self._cursor][token_id]
        while self._len[self._link[state]] >= MAX_COUNTED:
            state = self._link[state]
            self.num_operations += 1
        self._cursor = state
        place = len(self._ids) - 1
        while state != _ROOT:
            self._count[state] += 1
            self._last[state] = place
            state = self._link[state]
            self.num_operations += 1

    def check_integrity(self) -> None:
        """Assert what the head of this file says. For tests."""
        assert len(self._ids) <= self._max_tokens
        assert len(self._next) <= max(2, 2 * len(self._ids))
        assert sum(map(len, self._next)) <= max(1, 3 * len(self._ids))
        for state in range(1, len(self._next)):
            assert self._len[self._link[state]] < self._len[state]


class Walk:
    """A place in an index that moves as if tokens followed. Changes nothing in the index."""

    __slots__ = ("_index", "_state", "length")

    def __init__(self, index: SuffixIndex, state: int, length: int) -> None:
        self._index = index
        self._state = state
        self.length = length  # tokens of the suffix that occurred before

    def match(self) -> Match:
        """Return what followed the suffix that is matched here."""
        found = sorted(self._continuations(), key=_rank, reverse=True)
        return Match(self.length, tuple(found))

    def best(self) -> tuple[Continuation, int] | None:
        """Return what followed most often (of equals, last), and how often anything did."""
        total, best = 0, None
        for continuation in self._continuations():
            total += continuation.count
            if best is None or _rank(continuation) > _rank(best):
                best = continuation
        return None if best is None else (best, total)

    def copy(self) -> "Walk":
        return Walk(self._index, self._state, self.length)

    def _continuations(self) -> Iterator[Continuation]:
        index = self._index
        for token_id, state in index._next[self._state].items():
            if token_id >= 0:  # else the text ended there
                yield Continuation(token_id, index._count[state], index._last[state])

    def step(self, token_id: int) -> None:
        """Go on with a token; the suffix shrinks until it occurred with the token behind it."""
        index = self._index
        while token_id not in index._next[self._state]:
            if self._state == _ROOT:
                self.length = 0
                return
            self._state = index._link[self._state]
            self.length = index._len[self._state]
        self._state = index._next[self._state][token_id]
        self.length += 1
        self.limit(MAX_LENGTH)

    def limit(self, max_length: int) -> None:
        """Look at no more than that many tokens of the suffix."""
        index = self._index
        while self._state != _ROOT and index._len[index._link[self._state]] >= max_length:
            self._state = index._link[self._state]
        self.length = min(self.length, max_length)

    def shorten(self) -> bool:
        """Go to the longest suffix that occurred at more places; False where none is left."""
        if self._state == _ROOT:
            return False
        self._state = self._index._link[self._state]
        self.length = self._index._len[self._state]
        return True


def _rank(continuation: Continuation) -> tuple[int, int]:
    return continuation.count, continuation.last
