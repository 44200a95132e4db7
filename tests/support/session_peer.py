"""The other end of a session without a network: frames in, frames out, compute held at a point."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from expert_node.session import NodeFacts, Session
from expert_node.worker import Worker
from shoal import errors, limits, wire
from shoal.experts.call import ExpertCall
from shoal.experts.executor import Computed
from shoal.experts.ownership import OwnedRange
from shoal.ops.frames import CallView
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

    has_short_way = False  # of those that are made from now on

    def __init__(self) -> None:
        self.answered: list[int] = []  # the short way
        self.reached = threading.Event()
        self.release = threading.Event()
        self.computed: list[int] = []
        self.wants_hints = True
        self.spend: Callable[[], None] = lambda: None  # what computing costs
        self.hints: list[tuple[int, list[int], int]] = []

    def hint(self, layer: int, experts: Sequence[int], stream: int) -> None:
        self.hints.append((layer, list(experts), stream))

    def check(self, call: ExpertCall) -> None:
        if call.layer > 1:
            raise errors.NotOwned(f"expert {call.experts[0]} of layer {call.layer} is not owned")

    def pair_bytes(self, call: ExpertCall) -> int:
        return 1000 if 3 in call.experts else 1

    def answer_resident(self, call: CallView, max_weight_bytes: int, queue_us: int) -> bytes | None:
        numbers, _, _ = call.numbers()
        expert = int(np.frombuffer(numbers, np.int32)[call.num_rows + 1])
        if not self.has_short_way or call.layer > 1 or expert == 3:
            return None
        if expert == 2:
            raise ZeroDivisionError("a bug")
        assert max_weight_bytes == 100
        self.spend()
        self.computed.append(expert)
        self.answered.append(call.call_id)
        sums = np.full((call.num_rows, DIM), expert, np.int64)
        return wire.reply_frame(call.call_id, sums, 13, queue_us=queue_us)

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
        self.spend()
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
