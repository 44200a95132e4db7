"""Which of several drafters is asked first: by what they brought, not by what they say."""

from typing import Any, cast

from coordinator.speculation.candidate import CURIOSITY, RATE_STEPS, TRIALS, Candidate
from coordinator.speculation.interface import Drafter
from coordinator.speculation.pass_time import PassTime


class Silent:
    """A drafter that keeps experts and is never asked here."""

    name, local_expert_bytes = "silent", 1


def candidate() -> Candidate:
    return Candidate(cast(Drafter, cast(Any, Silent())), PassTime(8, 2), 8, 0.15)


def tell(one: Candidate, other: Candidate, num_tokens: int, seconds: float, times: int) -> None:
    """Let `one` bring so much in each of so many steps."""
    for _ in range(times):
        one.time_step(num_tokens, seconds, is_own=True)
        other.time_step(num_tokens, seconds, is_own=False)


def test_who_brought_most_lately_is_asked_first() -> None:
    slow, quick = candidate(), candidate()
    tell(slow, quick, 4, 2.0, TRIALS)
    tell(quick, slow, 12, 3.0, TRIALS)
    assert quick.promise() > slow.promise()
    tell(quick, slow, 1, 3.0, RATE_STEPS)  # its luck has gone
    assert slow.promise() > quick.promise()


def test_who_was_hardly_tried_is_asked_before_all_others() -> None:
    known, unknown = candidate(), candidate()
    tell(known, unknown, 30, 1.0, RATE_STEPS)
    tell(unknown, known, 1, 9.0, TRIALS - 1)
    assert unknown.promise() > known.promise()
    tell(unknown, known, 1, 9.0, 1)
    assert unknown.promise() < known.promise()


def test_who_was_not_asked_for_long_is_tried_again_but_seldom() -> None:
    best, half = candidate(), candidate()
    tell(half, best, 2, 1.0, TRIALS)
    tell(best, half, 4, 1.0, TRIALS)
    num_steps = 0
    while half.promise() <= best.promise():
        tell(best, half, 4, 1.0, 1)
        num_steps += 1
    assert 50 < num_steps < 90
    assert CURIOSITY**num_steps < 2.1
