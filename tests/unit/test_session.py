"""Session and worker without a network: frames in, frames out, compute held at a named point.

Every story is told twice: with an executor that answers small calls in one step, and with one that
has them opened and computed like all others. Nobody outside can tell which it was.
"""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_node.session import Ending, Session, StreamEnded
from shoal import errors, limits, wire
from shoal.experts.call import ExpertCall
from shoal.v1 import expert_pb2 as pb
from support.session_peer import (
    FACTS,
    BlockedExecutor,
    call_frame,
    connected,
    open_frame,
    run,
)


@pytest.fixture(autouse=True, scope="module", params=["short way", "long way"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which way small calls go."""
    BlockedExecutor.has_short_way = request.param == "short way"
    yield request.param
    BlockedExecutor.has_short_way = False


def test_open_is_answered_with_the_limits() -> None:
    async def story() -> None:
        async with connected() as peer:
            assert [f.opened.credit_bytes for f in peer.frames] == [FACTS.credit_bytes]
            assert peer.frames[0].opened.max_rows_per_call == 512

    run(story)


@pytest.mark.parametrize(
    ("changes", "ending", "complaint"),
    [
        ({"protocol_version": 99}, Ending.FAILED_PRECONDITION, "protocol version: you have 99"),
        ({"identity": "12" * 32}, Ending.FAILED_PRECONDITION, "identity: you have 1212.*tiny"),
        ({"numerics": ""}, Ending.FAILED_PRECONDITION, "numerics: you have none"),
        ({"lane": 0}, Ending.INVALID_ARGUMENT, "lane 0"),
        ({"coordinator_nonce": b"short"}, Ending.INVALID_ARGUMENT, "5 bytes"),
    ],
)
def test_an_open_that_does_not_fit_is_refused(
    changes: dict[str, object], ending: Ending, complaint: str
) -> None:
    async def story() -> None:
        async with connected(is_open=False) as peer:
            with pytest.raises(StreamEnded, match=complaint) as caught:
                peer.send(open_frame(**changes))
            assert caught.value.ending is ending

    run(story)


def test_hints_reach_the_executor_and_one_without_sense_ends_the_stream() -> None:
    async def story() -> None:
        async with connected() as peer:
            assert (await peer.next_frame("opened")).opened.wants_hints
            peer.send(wire.encode_hint(1, [3, 0]))
            assert peer.executor.hints == [(1, [3, 0], 1)]
            peer.call(7)
            with pytest.raises(StreamEnded, match="a hint that makes no sense: layer = 5000"):
                peer.send(pb.ClientFrame(hint=pb.Hint(layer=5000, experts=b"\0\0")))
            assert len(peer.executor.hints) == 1

    run(story)


def test_a_call_before_open_is_refused() -> None:
    async def story() -> None:
        async with connected(is_open=False) as peer:
            with pytest.raises(StreamEnded, match="must be Open"):
                peer.call(1)

    run(story)


def test_a_small_call_is_answered_where_it_arrived(way: str) -> None:
    async def story() -> None:
        async with connected() as peer:
            peer.call(1, expert=1)
            assert peer.replies() == {1: 1}, "no turn of the loop in between"
            assert peer.executor.answered == ([1] if way == "short way" else [])

    run(story)


def test_a_small_call_waits_its_turn_where_others_are_held_and_leads_on_where_none_is(
    way: str,
) -> None:
    """1. a large call computes, small ones come; 2. they follow; 3. then the way is free."""

    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            for call_id in (2, 3):
                peer.call(call_id, expert=call_id - 2)
            assert peer.executor.answered == [] and peer.worker.num_held == 3
            await peer.settle()
            assert peer.executor.computed == [3, 0, 1]
            await asyncio.sleep(0)  # the loop has turned
            peer.call(4)
            assert peer.executor.answered == ([4] if way == "short way" else [])

    run(story)


def test_calls_are_logged_whichever_way_they_would_go() -> None:
    async def story() -> None:
        async with connected() as peer:
            peer.worker.configure(max_waiting=4, log_calls=True)
            peer.call(1, expert=1)
            assert peer.replies() == {1: 1} and peer.executor.answered == [], "the way that logs"

    run(story)


def test_a_call_that_took_long_lets_the_loop_turn_before_the_next() -> None:
    async def story() -> None:
        async with connected() as peer:

            def spend() -> None:
                peer.now_s += 2 * limits.INLINE_TURN_S

            peer.executor.spend = spend
            for call_id in (1, 2, 3):
                peer.call(call_id, expert=1)
            assert peer.replies().keys() == {1}
            await peer.settle()
            assert peer.replies().keys() == {1, 2, 3}

    run(story)


def test_a_call_is_observed_once_and_its_credit_comes_back_when_its_reply_is_out(way: str) -> None:
    async def story() -> None:
        async with connected(is_open=False) as peer:
            seen: list[tuple[int, int, ExpertCall]] = []
            unsent: list[int] = []
            session = Session(
                9,
                FACTS,
                peer.worker,
                lambda _frame, credit: unsent.append(credit),
                observe=lambda stream, rows, call: seen.append((stream, rows, call())),
            )
            session.receive(open_frame().SerializeToString())
            frame = call_frame(1, 1, num_rows=2).SerializeToString()
            for _ in range(1 + FACTS.credit_bytes // len(frame)):
                session.receive(frame)  # the same id: the one before is answered
            assert {credit for credit in unsent[1:]} == {len(frame)}
            assert len(seen) == len(unsent) - 1 == len(peer.executor.computed)
            assert [each[:2] for each in seen] == [(9, 2)] * len(seen)
            assert seen[0][2].experts.tolist() == [1, 1]
            session.receive(frame)
            assert unsent[-1] == 0, "refused: nothing is in flight, but nothing has gone out"
            session.sent(len(frame))
            session.receive(frame)
            assert unsent[-1] == len(frame)

    run(story)


def test_a_large_call_leaves_the_stream_free_and_is_answered_later() -> None:
    """1. a large call computes; 2. a small one waits behind it; 3. both are answered."""

    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2, expert=1)
            assert peer.replies() == {}, "one compute at a time"
            await peer.settle()
            assert peer.replies() == {1: 3, 2: 1}
            assert peer.executor.computed == [3, 1]

    run(story)


def test_calls_that_fail_their_checks_fail_alone() -> None:
    async def story() -> None:
        async with connected() as peer:
            peer.call(1, layer=5)
            bad = call_frame(2)
            bad.call.values = b"xyz"
            peer.send(bad)
            peer.call(3, expert=1)
            assert peer.failures() == {1: pb.Failure.NOT_OWNED, 2: pb.Failure.MALFORMED}
            assert peer.replies() == {3: 1}

    run(story)


def test_a_bug_is_an_internal_failure_with_an_id_into_the_log() -> None:
    async def story() -> None:
        async with connected() as peer:
            peer.call(1, expert=2)
            assert peer.failures() == {1: pb.Failure.INTERNAL}
            assert "a bug" not in peer.frames[-1].failure.message
            peer.call(2, expert=1)
            assert peer.replies() == {2: 1}, "the node goes on"

    run(story)


def test_a_full_queue_is_overloaded_and_what_it_holds_is_answered() -> None:
    async def story() -> None:
        async with connected(max_waiting=1) as peer:
            await peer.block(1)
            peer.call(2)
            peer.call(3)
            assert peer.failures() == {3: pb.Failure.OVERLOADED}
            await peer.settle()
            assert peer.replies().keys() == {1, 2}

    run(story)


def test_bytes_in_flight_are_bounded_by_the_credit_and_come_back() -> None:
    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2, num_rows=120)  # more than the rest of the credit: the last one to fit
            peer.call(3)
            assert peer.failures() == {3: pb.Failure.OVERLOADED}
            assert "credit" in peer.frames[-1].failure.message
            await peer.settle()
            peer.call(4)
            assert 4 in peer.replies()

    run(story)


def test_a_message_too_large_for_the_interactive_lane_is_malformed() -> None:
    async def story() -> None:
        async with connected() as peer:
            frame = call_frame(1)
            frame.call.values = bytes(limits.INTERACTIVE_MESSAGE_BYTES)
            peer.send(frame)
            assert peer.failures() == {1: pb.Failure.MALFORMED}
            assert "bulk lane" in peer.frames[-1].failure.message

    run(story)


def test_cancel_of_a_waiting_call_answers_it_at_once() -> None:
    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2)
            peer.cancel(2)
            peer.cancel(2)
            peer.cancel(77)
            assert peer.failures() == {2: pb.Failure.CANCELLED}
            await peer.settle()
            assert peer.executor.computed == [3]

    run(story)


def test_cancel_of_a_running_call_answers_it_when_it_is_done() -> None:
    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.cancel(1)
            await peer.settle()
            assert peer.failures() == {1: pb.Failure.CANCELLED}
            assert peer.replies() == {}

    run(story)


def test_a_call_whose_deadline_passes_while_it_waits_is_never_computed() -> None:
    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2, deadline_ms=500)
            peer.now_s = 0.5
            frame = await peer.next_frame("failure")
            assert (frame.failure.call_id, frame.failure.code) == (2, pb.Failure.DEADLINE)
            await peer.settle()
            assert peer.executor.computed == [3]

    run(story)


def test_calls_that_are_held_show_progress() -> None:
    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2)
            peer.now_s = 1.0
            frame = await peer.next_frame("progress")
            assert sorted(frame.progress.call_ids) == [1, 2]
            await peer.settle()

    run(story)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff",
        b"",
        open_frame().SerializeToString(),
        call_frame(1).SerializeToString(),
    ],
)
def test_a_broken_protocol_fails_every_call_of_the_stream_and_ends_it(data: bytes) -> None:
    """1. call 1 computes, call 2 waits; 2. garbage, or call id 1 again; 3. both have failed."""

    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2)
            with pytest.raises(StreamEnded) as caught:
                peer.session.receive(data)
            assert caught.value.ending is Ending.INVALID_ARGUMENT
            assert peer.failures() == {1: pb.Failure.MALFORMED, 2: pb.Failure.MALFORMED}
            await peer.settle()
            assert peer.replies() == {}

    run(story)


def test_a_closed_session_drops_its_calls_and_hears_nothing() -> None:
    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2)
            before = len(peer.frames)
            peer.session.close()
            await peer.settle()
            assert peer.executor.computed == [3]
            assert len(peer.frames) == before

    run(story)


def test_a_drain_refuses_the_new_and_finishes_what_is_held() -> None:
    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2, expert=1)
            peer.worker.drain()
            peer.session.drain("SIGTERM")
            peer.call(3)
            assert peer.failures() == {3: pb.Failure.DRAINING}
            assert (await peer.next_frame("draining")).draining.reason == "SIGTERM"
            await peer.settle()
            assert peer.replies() == {1: 3, 2: 1}
            with pytest.raises(StreamEnded, match="draining"):
                other = Session(2, FACTS, peer.worker, peer.emit)
                other.receive(open_frame().SerializeToString())

    run(story)


def test_a_drain_that_runs_out_of_time_answers_every_call_once() -> None:
    async def story() -> None:
        async with connected() as peer:
            await peer.block(1)
            peer.call(2)
            peer.worker.drain()
            peer.worker.abandon(errors.NodeDraining("too late"))
            assert peer.failures() == {1: pb.Failure.DRAINING, 2: pb.Failure.DRAINING}
            await peer.settle()
            assert peer.replies() == {}

    run(story)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=120), max_size=6), st.integers(0, 400), st.integers(0, 7))
def test_no_bytes_do_more_than_fail_their_call_or_end_their_stream(
    noise: list[bytes], place: int, bit: int
) -> None:
    async def story() -> None:
        async with connected() as peer:
            damaged = bytearray(call_frame(5, expert=1).SerializeToString())
            damaged[place % len(damaged)] ^= 1 << bit
            try:
                for data in (*noise, bytes(damaged)):
                    peer.session.receive(data)
            except StreamEnded:
                return
            await peer.settle()

    run(story)
