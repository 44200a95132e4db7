"""Lookup drafts what followed before, in this request or in the past, and says how sure it is."""

from collections.abc import Sequence as SequenceOf
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.cancellation import Cancellation
from coordinator.kv_cache import KvBlockPool
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.lookup import CHANCES, LookupDrafter, Past, chance
from coordinator.speculation.suffix_index import MAX_LENGTH, Continuation
from shoal.ops import SamplingParams


class Remembered:
    """A past in memory."""

    def __init__(self, *texts: list[int]) -> None:
        self.texts = [tuple(text) for text in texts]
        self.is_closed = False

    def add(self, token_ids: SequenceOf[int]) -> None:
        self.texts.append(tuple(token_ids))

    def close(self) -> None:
        self.is_closed = True


def sequence(token_ids: list[int]) -> Sequence:
    made = Sequence(KvBlockPool(1))
    made.extend(token_ids)
    return made


def request(token_ids: list[int]) -> GenerationRequest:
    return GenerationRequest(tuple(token_ids), 100, SamplingParams())


def begun(prompt: list[int], past: Past | None = None) -> LookupDrafter:
    drafter = LookupDrafter(past)
    drafter.begin(request(prompt))
    return drafter


def guesses(drafter: LookupDrafter, text: Sequence, count: int = 8) -> list[int]:
    return [guess.token_id for guess in islice(drafter.draft(text, Cancellation()), count)]


def test_it_goes_on_as_the_prompt_did() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 9, 2, 3]
    assert guesses(begun(prompt), sequence(prompt), 4) == [4, 5, 6, 9]


def test_it_goes_round_where_the_text_goes_round() -> None:
    prompt = [9, 1, 2, 3, 1, 2, 3]
    assert guesses(begun(prompt), sequence(prompt)) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_text_that_repeats_nothing_has_no_guesses() -> None:
    prompt = list(range(50))
    assert guesses(begun(prompt), sequence(prompt)) == []


def test_of_several_continuations_the_commonest_and_then_the_latest_is_guessed() -> None:
    commonest = [1, 2, 7, 5, 1, 2, 8, 6, 1, 2, 7, 4, 1, 2]
    assert guesses(begun(commonest), sequence(commonest), 1) == [7]
    latest = [1, 2, 7, 5, 1, 2, 8, 6, 1, 2]
    assert guesses(begun(latest), sequence(latest), 1) == [8]


def test_it_reads_on_as_the_sequence_grows() -> None:
    prompt = [1, 2, 3, 4, 5]
    text, drafter = sequence(prompt), begun(prompt)
    assert guesses(drafter, text) == []
    text.extend([8, 1])
    assert guesses(drafter, text, 2) == [2, 3]
    text.extend([2, 3])
    assert guesses(drafter, text, 2) == [4, 5]


@given(
    text=st.lists(st.integers(0, 3), min_size=4, max_size=60),
    cut=st.integers(0, 59),
    more=st.lists(st.integers(0, 3), max_size=10),
)
def test_a_sequence_that_was_cut_and_went_on_otherwise_is_read_again(
    text: list[int], cut: int, more: list[int]
) -> None:
    changed = text[:cut] + more
    drafter = begun(text)
    guesses(drafter, sequence(text))
    if changed:
        again = guesses(drafter, sequence(changed))
        assert again == guesses(begun(changed), sequence(changed)) or text[:cut] == text


def test_the_past_is_looked_up_where_the_text_itself_says_nothing() -> None:
    past = Remembered([5, 6, 7, 8, 9], [5, 6, 1])
    prompt = [4, 6, 7]
    assert guesses(begun(prompt, past), sequence(prompt)) == [8, 9]


def test_no_guess_crosses_from_one_past_text_to_the_next() -> None:
    past = Remembered([1, 2, 3], [4, 5, 6])
    assert guesses(begun([2, 3], past), sequence([2, 3])) == []


def test_of_equals_the_text_itself_is_believed() -> None:
    prompt = [1, 2, 7, 3, 1, 2]
    assert guesses(begun(prompt, Remembered([1, 2, 8])), sequence(prompt), 1) == [7]


def test_a_longer_match_in_the_past_is_believed_more() -> None:
    prompt = [5, 2, 7, 3, 1, 5, 2]
    past = Remembered([3, 1, 5, 2, 8])
    assert guesses(begun(prompt, past), sequence(prompt), 1) == [8]


def test_a_finished_text_becomes_past_and_is_kept_at_the_end() -> None:
    past = Remembered()
    first, drafter = [1, 2, 3, 4], begun([1, 2, 3, 4], past)
    guesses(drafter, sequence(first))
    drafter.begin(request([9, 2]))
    assert past.texts == [(1, 2, 3, 4)]
    assert guesses(drafter, sequence([9, 2])) == [3, 4]
    drafter.close()
    assert past.texts == [(1, 2, 3, 4), (9, 2)]
    assert past.is_closed


def test_a_chat_that_goes_on_is_kept_once() -> None:
    past = Remembered()
    drafter = begun([1, 2], past)
    guesses(drafter, sequence([1, 2, 3, 4]))
    drafter.begin(request([1, 2, 3, 4, 5, 6]))
    guesses(drafter, sequence([1, 2, 3, 4, 5, 6, 7]))
    drafter.close()
    assert past.texts == [(1, 2, 3, 4, 5, 6, 7)]


def test_without_a_past_nothing_is_kept() -> None:
    drafter = begun([1, 2, 3])
    guesses(drafter, sequence([1, 2, 3]))
    drafter.begin(request([2]))
    assert guesses(drafter, sequence([2])) == []
    drafter.close()


def test_chances_ascend_with_the_match_and_with_agreement() -> None:
    for length, row in CHANCES.items():
        assert all(0 < value < 1 for value in row)
        once, always, mostly, rarely = row
        assert always >= once > rarely and mostly >= rarely, length
    for shorter, longer in zip(CHANCES.values(), list(CHANCES.values())[1:], strict=False):
        assert all(a <= b for a, b in zip(shorter, longer, strict=True))
    assert max(CHANCES) <= MAX_LENGTH


@pytest.mark.parametrize(
    ("count", "total", "column"), [(1, 1, 0), (3, 3, 1), (3, 4, 2), (1, 2, 3), (2, 5, 3)]
)
def test_what_stood_behind_a_match_decides_the_column(count: int, total: int, column: int) -> None:
    assert chance(6, Continuation(1, count, 0), total) == CHANCES[5][column]


def test_what_it_would_have_guessed_is_compared_though_nobody_verified_it() -> None:
    """The answer takes pairs of the prompt here and there, with other second tokens or the same."""
    prompt = [token for pair in range(100) for token in (1000 + pair, 2000 + pair)]
    chances = []
    for second in (5000, 2000):
        text, drafter = sequence(prompt), begun(prompt)
        for pair in range(40):
            taken = 7 * pair % 90
            text.extend([1000 + taken, second + taken])
            guesses(drafter, text, 1)
        text.extend([1090])
        [guess] = islice(drafter.draft(text, Cancellation()), 1)
        assert guess.token_id == 2090
        chances.append(guess.chance)
    wrong, right = chances
    assert wrong < 0.25 * CHANCES[1][0] < 1.5 * CHANCES[1][0] < right


def test_the_prompt_is_no_proof_of_how_the_answer_repeats() -> None:
    prompt = [1, 2, 3] * 100
    [guess] = islice(begun(prompt).draft(sequence(prompt), Cancellation()), 1)
    assert guess.chance == pytest.approx(chance(MAX_LENGTH, Continuation(1, 9, 0), 9), abs=0.02)
