"""Session and worker without a network: frames in, frames out, compute held at a named point."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_node.session import Ending, NodeFacts, Session, StreamEnded
from expert_node.worker import Worker
from shoal import errors, limits, wire
from shoal.experts.call import ExpertCall
from shoal.experts.executor import Computed
from shoal.experts.ownership import OwnedRange
from shoal.quant import Scheme
from shoal.rows import Rows
from shoal.v1 import expert_pb2 as pb

DIM = 8
FACTS = NodeFacts(
    model_name="tiny",
    identity="ab" * 32,
    numerics="cd" * 32,
    instance_epoch="ef" * 8,
    owned=(OwnedRange(0, 1, 0, 3),),
    quantisation="f32",
    isa="scalar",
    num_threads=1,
    max_rows_per_call=512,
    credit_bytes=4096,
)


class BlockedExecutor:
    """Answers with the call's first expert index; a call for expert 3 waits at `reached`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.release = threading.Event()
        self.computed: list[int] = []
        self.wants_hints = True
        self.hints: list[tuple[int, list[int], int]] = []

    def hint(self, layer: int, experts: Sequence[int], stream: int) -> None:
        self.hints.append((layer, list(experts), stream))

    def check(self, call: ExpertCall) -> None:
        if call.layer > 1:
            raise errors.NotOwned(f"expert {call.experts[0]} of layer {call.layer} is not owned")

    def pair_bytes(self, call: ExpertCall) -> int:
        return 1000 if 3 in call.experts else 1

    def is_resident(self, call: ExpertCall) -> bool:
        return True

    def grid(self, layer: int) -> int:
        return 13

    def open(self, call: ExpertCall, stream: int) -> "BlockedCall":
        return BlockedCall(self, call)

    try_open = open

    def compute(self, call: ExpertCall) -> Computed:
        if call.experts[0] == 3:
            self.reached.set()
            assert self.release.wait(30)
        if call.experts[0] == 2:
            raise ZeroDivisionError("a bug")
        self.computed.append(int(call.experts[0]))
        return Computed(np.full((call.rows.num_rows, DIM), call.experts[0], np.int64), 0.0)


@dataclass
class BlockedCall:
    executor: BlockedExecutor
    call: ExpertCall

    def compute(self) -> Computed:
        return self.executor.compute(self.call)

    def abandon(self, error: BaseException) -> None:
        """It does not wait for reads."""


@dataclass
class Peer:
    """The other end of a session: what it got, and a clock that only it moves."""

    executor: BlockedExecutor
    worker: Worker
    session: Session
    frames: list[pb.NodeFrame] = field(default_factory=list)
    now_s: float = 0.0
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def emit(self, data: bytes, credit_bytes: int) -> None:
        self.frames.append(pb.NodeFrame.FromString(data))
        self.session.sent(credit_bytes)
        self._arrived.set()

    def send(self, frame: pb.ClientFrame) -> None:
        self.session.receive(frame.SerializeToString())

    def call(self, call_id: int, expert: int = 0, **changes: int) -> None:
        self.send(call_frame(call_id, expert, **changes))

    def cancel(self, call_id: int) -> None:
        self.send(pb.ClientFrame(cancel=pb.Cancel(call_id=call_id)))

    async def block(self, call_id: int) -> None:
        """Let a call reach the middle of its compute and stay there."""
        self.call(call_id, expert=3)
        assert await asyncio.to_thread(self.executor.reached.wait, 30)

    async def settle(self) -> None:
        """Let go of what is blocked and wait until no call is held."""
        self.executor.release.set()
        async with asyncio.timeout(30):
            await self.worker.wait_idle()

    async def next_frame(self, kind: str) -> pb.NodeFrame:
        async with asyncio.timeout(30):
            while True:
                found = [frame for frame in self.frames if frame.WhichOneof("frame") == kind]
                if found:
                    return found[-1]
                self._arrived.clear()
                await self._arrived.wait()

    def replies(self) -> dict[int, int]:
        """Return call id -> the value that fills its sums."""
        values = {}
        for frame in self.frames:
            if frame.WhichOneof("frame") == "reply":
                num_rows = frame.reply.num_rows
                into = np.zeros((num_rows, DIM), np.int64)
                wire.add_reply(frame.reply, np.arange(num_rows, dtype=np.int32), 13, into)
                values[frame.reply.call_id] = int(into[0, 0])
        return values

    def failures(self) -> dict[int, int]:
        """Return call id -> failure code."""
        found = [f.failure for f in self.frames if f.WhichOneof("frame") == "failure"]
        assert len({failure.call_id for failure in found}) == len(found), "a call failed twice"
        return {failure.call_id: failure.code for failure in found}


def call_frame(
    call_id: int, expert: int = 0, *, layer: int = 0, deadline_ms: int = 60_000, num_rows: int = 1
) -> pb.ClientFrame:
    rows = Rows(
        Scheme.F32, DIM, np.ones((num_rows, DIM), np.float32), np.empty((num_rows, 0), np.float32)
    )
    call = ExpertCall(
        layer,
        rows,
        np.arange(num_rows + 1, dtype=np.int32),
        np.full(num_rows, expert, np.int32),
        np.ones(num_rows, np.float32),
    )
    return wire.encode_call(call_id, deadline_ms, call)


def open_frame(**changes: object) -> pb.ClientFrame:
    fields: dict[str, object] = {
        "protocol_version": limits.PROTOCOL_VERSION,
        "identity": FACTS.identity,
        "numerics": FACTS.numerics,
        "lane": pb.LANE_INTERACTIVE,
        "coordinator_nonce": bytes(16),
        "stream_epoch": 1,
    }
    return pb.ClientFrame(open=fields | changes)


@asynccontextmanager
async def connected(*, is_open: bool = True, max_waiting: int = 4) -> AsyncIterator[Peer]:
    executor = BlockedExecutor()
    peer: Peer
    worker = Worker(
        executor,
        asyncio.get_running_loop(),
        clock=lambda: peer.now_s,
        max_waiting=max_waiting,
        inline_pair_bytes=100,
    )
    session = Session(1, FACTS, worker, lambda *a: peer.emit(*a), clock=lambda: peer.now_s)
    peer = Peer(executor, worker, session)
    try:
        if is_open:
            peer.send(open_frame())
        yield peer
    finally:
        executor.release.set()
        worker.close()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await story()

    asyncio.run(bounded())


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


def test_a_small_call_is_answered_where_it_arrived() -> None:
    async def story() -> None:
        async with connected() as peer:
            peer.call(1, expert=1)
            assert peer.replies() == {1: 1}, "no turn of the loop in between"

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
