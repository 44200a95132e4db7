"""The admission core, one event after another, and on random walks."""

import random

import pytest

from expert_node.admission import Admission, Lane, Refusal, Ticket


def ticket(
    call_id: int,
    lane: Lane = Lane.INTERACTIVE,
    *,
    stream: int = 1,
    at: float = 0.0,
    deadline: float = 100.0,
) -> Ticket:
    return Ticket(stream, call_id, lane, received_s=at, deadline_s=deadline)


def started(admission: Admission, now_s: float = 0.0) -> int | None:
    start = admission.start_next(now_s).start
    return start.call_id if start else None


def test_one_call_runs_at_a_time_first_come_first_served() -> None:
    admission = Admission(max_waiting=8)
    for call_id in (1, 2):
        assert admission.admit(ticket(call_id)) is None
    assert started(admission) == 1
    assert started(admission) is None, "one is running"
    admission.finish((1, 1))
    assert started(admission) == 2


def test_an_interactive_call_overtakes_bulk_calls() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1, Lane.BULK))
    admission.admit(ticket(2, Lane.BULK))
    admission.admit(ticket(3, Lane.INTERACTIVE))
    assert started(admission) == 3


def test_the_same_call_id_on_two_streams_is_two_calls() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1, stream=1))
    admission.admit(ticket(1, stream=2))
    assert admission.cancel((2, 1)) == ticket(1, stream=2)
    assert admission.num_waiting == 1


def test_a_full_queue_refuses_until_a_call_has_started() -> None:
    admission = Admission(max_waiting=1)
    assert admission.admit(ticket(1)) is None
    assert admission.admit(ticket(2)) is Refusal.FULL
    assert started(admission) == 1
    assert admission.admit(ticket(3)) is None


def test_a_call_is_never_started_at_or_after_its_deadline() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1, deadline=5.0))
    admission.admit(ticket(2, deadline=9.0))
    chosen = admission.start_next(5.0)
    assert chosen.start == ticket(2, deadline=9.0)
    assert chosen.expired == (ticket(1, deadline=5.0),)


def test_expire_takes_waiting_calls_only() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1, deadline=5.0))
    assert started(admission, 4.0) == 1
    admission.admit(ticket(2, deadline=5.0))
    assert admission.expire(6.0) == (ticket(2, deadline=5.0),)
    assert admission.running is not None, "a running call is not interrupted"


def test_cancel_takes_out_a_waiting_call_and_leaves_a_running_one() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1))
    assert started(admission) == 1
    admission.admit(ticket(2))
    assert admission.cancel((1, 2)) == ticket(2)
    assert admission.cancel((1, 1)) is None
    assert admission.cancel((1, 99)) is None


def test_a_dropped_stream_leaves_the_others_calls() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1, stream=1))
    admission.admit(ticket(2, stream=2))
    admission.admit(ticket(3, Lane.BULK, stream=1))
    assert {t.call_id for t in admission.drop_stream(1)} == {1, 3}
    assert started(admission) == 2


def test_draining_refuses_the_new_and_finishes_the_old() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1))
    admission.drain()
    assert admission.admit(ticket(2)) is Refusal.DRAINING
    assert started(admission) == 1


def test_calls_held_long_are_reported_waiting_or_running() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1, at=0.0))
    assert started(admission) == 1
    admission.admit(ticket(2, at=1.0))
    admission.admit(ticket(3, at=2.0))
    assert {t.call_id for t in admission.held_since(1.0)} == {1, 2}


def loading(admission: Admission, now_s: float = 0.0) -> int | None:
    start = admission.start_loading(now_s).start
    return start.call_id if start else None


def test_calls_that_must_load_do_not_stand_before_the_others() -> None:
    admission = Admission(max_waiting=8, max_loading=2)
    for call_id in (1, 2, 3):
        admission.admit(ticket(call_id), must_load=True)
    admission.admit(ticket(4))
    assert started(admission) == 4
    assert [loading(admission) for _ in range(3)] == [1, 2, None]
    admission.finish((1, 2))
    assert loading(admission) == 3
    admission.finish((1, 4))
    assert (admission.num_loading, admission.num_held) == (2, 2)


def test_a_running_call_that_must_load_makes_way_and_keeps_its_place() -> None:
    admission = Admission(max_waiting=8, max_loading=1)
    admission.admit(ticket(1, at=1.0))
    admission.admit(ticket(2, at=2.0), must_load=True)
    admission.admit(ticket(3, at=3.0))
    assert started(admission) == 1
    admission.must_load()
    admission.check_integrity()
    assert started(admission) == 3
    assert loading(admission) == 1, "it came before the other"


def test_bulk_calls_take_half_of_the_places_to_load() -> None:
    admission = Admission(max_waiting=8, max_loading=2)
    for call_id in (1, 2):
        admission.admit(ticket(call_id, Lane.BULK), must_load=True)
    assert [loading(admission), loading(admission)] == [1, None]
    admission.admit(ticket(3), must_load=True)
    assert loading(admission) == 3


def test_a_loading_call_is_overdue_but_leaves_by_itself() -> None:
    admission = Admission(max_waiting=8)
    admission.admit(ticket(1, deadline=5.0), must_load=True)
    admission.admit(ticket(2, deadline=5.0), must_load=True)
    assert loading(admission) == 1
    assert admission.expire(6.0) == (ticket(2, deadline=5.0),)
    assert admission.overdue(6.0) == (ticket(1, deadline=5.0),)
    assert admission.cancel((1, 1)) is None and admission.num_held == 1
    admission.finish((1, 1))
    assert admission.num_held == 0


def test_finishing_a_call_that_does_not_run_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Admission(max_waiting=8).finish((1, 1))


@pytest.mark.parametrize("seed", range(20))
def test_every_admitted_call_leaves_exactly_once_on_a_random_walk(seed: int) -> None:
    rng = random.Random(seed)
    admission = Admission(max_waiting=5, max_loading=2)
    admitted: list[tuple[int, int]] = []
    left: list[tuple[int, int]] = []
    loads: list[tuple[int, int]] = []
    now_s = 0.0
    for call_id in range(300):
        now_s += rng.random()
        match rng.randrange(6):
            case 0 | 1 | 2:
                lane, stream = rng.choice(list(Lane)), rng.randrange(3)
                new = ticket(
                    call_id, lane, stream=stream, at=now_s, deadline=now_s + rng.random() * 9
                )
                if admission.admit(new, must_load=rng.random() < 0.3) is None:
                    admitted.append(new.key)
            case 3:
                left += [t.key for t in admission.start_next(now_s).expired]
                if admission.running is not None and rng.random() < 0.3:
                    admission.must_load()
                chosen = admission.start_loading(now_s)
                left += [t.key for t in chosen.expired]
                if chosen.start is not None:
                    loads.append(chosen.start.key)
            case 4:
                if admission.running is not None:
                    key = admission.running.key
                    admission.finish(key)
                    left.append(key)
                elif loads:
                    key = loads.pop(rng.randrange(len(loads)))
                    admission.finish(key)
                    left.append(key)
            case _:
                gone = admission.expire(now_s)
                if admitted and rng.random() < 0.5:
                    cancelled = admission.cancel(rng.choice(admitted))
                    gone += (cancelled,) if cancelled else ()
                if rng.random() < 0.1:
                    gone += admission.drop_stream(rng.randrange(3))
                left += [t.key for t in gone]
        admission.check_integrity()
    assert len(left) > 30, "the walk is degenerate"
    assert len(set(left)) == len(left)
    assert len(admitted) == len(left) + admission.num_held
