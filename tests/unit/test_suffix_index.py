"""The suffix index finds what a search through the whole text finds, at a bounded price."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.speculation.suffix_index import MAX_LENGTH, Match, SuffixIndex

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=60)
PERIODIC = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(2, 30)).map(
    lambda pair: pair[0] * pair[1]
)


def followers(text: list[int], suffix: list[int]) -> Counter[int]:
    """What follows each place of `suffix` in the text, but not at its end."""
    size = len(suffix)
    starts = [i for i in range(len(text) - size) if text[i : i + size] == suffix]
    return Counter(text[i + size] for i in starts)


def last_place(text: list[int], string: list[int]) -> int:
    size = len(string)
    return max(i + size - 1 for i in range(len(text) - size + 1) if text[i : i + size] == string)


def oracle(text: list[int], max_length: int) -> tuple[int, dict[int, tuple[int, int]]]:
    for length in range(min(max_length, len(text) - 1), -1, -1):
        suffix = text[len(text) - length :]
        found = followers(text, suffix)
        if found:
            return length, {
                t: (n, last_place(text, [*suffix, t])) for t, n in found.items() if t >= 0
            }
    return 0, {}


def assert_agrees(match: Match, text: list[int], max_length: int = MAX_LENGTH) -> None:
    length, found = oracle(text, max_length)
    assert match.length == length
    if length:
        assert {c.token_id: (c.count, c.last) for c in match.continuations} == found
        assert match.total == sum(count for count, _ in found.values())
        ranks = [(c.count, c.last) for c in match.continuations]
        assert ranks == sorted(ranks, reverse=True)


def indexed(text: list[int], max_tokens: int = 1000) -> SuffixIndex:
    index = SuffixIndex(max_tokens)
    index.extend(text)
    index.check_integrity()
    return index


@given(text=TEXTS | PERIODIC)
def test_the_longest_match_and_its_counts_are_those_of_a_search(text: list[int]) -> None:
    index = SuffixIndex(1000)
    for end, token_id in enumerate(text, 1):
        index.extend([token_id])
        assert_agrees(index.longest_match(), text[:end])


@given(text=TEXTS | PERIODIC, max_length=st.integers(0, MAX_LENGTH))
def test_a_shorter_match_can_be_asked_for(text: list[int], max_length: int) -> None:
    assert_agrees(indexed(text).longest_match(max_length), text, max_length)


@given(text=TEXTS, more=st.lists(st.integers(0, 3), max_size=20))
def test_a_walk_counts_as_a_search_for_what_it_says_it_matches(
    text: list[int], more: list[int]
) -> None:
    walk = indexed(text).walk()
    seen = list(text)
    for token_id in more:
        walk.step(token_id)
        seen.append(token_id)
        match = walk.match()
        suffix = seen[len(seen) - match.length :]
        assert {c.token_id: c.count for c in match.continuations} == followers(text, suffix)
        best = walk.best()
        assert best == ((match.continuations[0], match.total) if match.continuations else None)


@given(text=TEXTS, other=TEXTS)
def test_following_another_text_finds_its_longest_suffix(text: list[int], other: list[int]) -> None:
    walk = indexed(text).follow(other)
    lengths = [
        n
        for n in range(min(len(other), MAX_LENGTH) + 1)
        if any(text[i : i + n] == other[len(other) - n :] for i in range(len(text) - n + 1))
    ]
    assert walk.length == max(lengths)


@given(texts=st.lists(TEXTS, min_size=2, max_size=5))
def test_no_match_crosses_from_one_text_to_the_next(texts: list[list[int]]) -> None:
    index, whole = SuffixIndex(1000), list[int]()
    for number, text in enumerate(texts, 1):
        if number > 1:
            index.split()
            whole.append(-number)
        index.extend(text)
        whole += text
    length = max(
        n
        for n in range(len(texts[-1]) + 1)
        if n == 0 or followers(whole, texts[-1][len(texts[-1]) - n :])
    )
    match = index.longest_match()
    assert match.length == min(length, MAX_LENGTH)
    assert all(continuation.token_id >= 0 for continuation in match.continuations)


@given(text=st.lists(st.integers(0, 4), min_size=30, max_size=120), max_tokens=st.integers(2, 40))
def test_a_full_index_forgets_the_oldest_and_stays_right(text: list[int], max_tokens: int) -> None:
    index = indexed(text, max_tokens)
    assert index.num_tokens <= max_tokens
    kept = text[len(text) - index.num_tokens :]
    assert index.num_tokens >= min(len(text), max_tokens // 2)
    assert_agrees(index.longest_match(), kept)


def test_splits_after_forgetting_are_still_none_of_the_old_ones() -> None:
    index = SuffixIndex(8)
    for _ in range(20):
        index.extend([1, 2])
        index.split()
        index.check_integrity()
    assert index.longest_match() == Match(0, index.longest_match().continuations)


@pytest.mark.parametrize(
    "text",
    [[7] * 4000, [1, 2, 3] * 1300, [i * i % 61 for i in range(4000)], list(range(4000))],
    ids=["one token", "a period", "random", "all different"],
)
def test_a_token_costs_a_bounded_number_of_steps(text: list[int]) -> None:
    """Counted, not timed. A search through the text would take thousands a token."""
    index = indexed(text, 10_000)
    assert index.num_operations <= 30 * len(text)
    assert index.num_states <= 2 * len(text)
