"""The worker over a store whose reads the test ends: who waits for a read, and who does not."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager

import numpy as np
import pytest

from expert_node.admission import Lane, Ticket
from expert_node.worker import Job, Worker
from shoal import errors, ops, wire
from shoal.artifact import Artifact
from shoal.experts.call import ExpertCall
from shoal.experts.executor import ExpertExecutor
from shoal.experts.streaming import StreamingStore
from shoal.v1 import expert_pb2 as pb
from support.held_reader import HeldReader
from support.stores import LAYER, held, take
from support.tiny_model import make_tiny_artifact
from support.whole_store import whole_executor


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact.open(make_tiny_artifact(tmp_path_factory.mktemp("model"), quant="q8_0"))


def call_for(artifact: Artifact, *experts: int, layer: int = LAYER) -> ExpertCall:
    x = np.random.default_rng(0).normal(size=(1, artifact.spec.model_dim)).astype(np.float32)
    return ExpertCall(
        layer,
        ops.quantise_rows(artifact.scheme(layer), x),
        np.array([0, len(experts)], np.int32),
        np.array(experts, np.int32),
        np.ones(len(experts), np.float32),
    )


class Caller:
    """Keeps the frames that it gets."""

    def __init__(self) -> None:
        self.frames: dict[int, pb.NodeFrame] = {}
        self.progress: set[int] = set()
        self._changed = asyncio.Event()

    def finished(self, call_id: int, frame: bytes) -> None:
        assert call_id not in self.frames, "answered twice"
        self.frames[call_id] = pb.NodeFrame.FromString(frame)
        self._changed.set()

    def progressed(self, call_ids: list[int]) -> None:
        self.progress.update(call_ids)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def answered(self, *call_ids: int) -> None:
        await self.until(lambda: self.frames.keys() >= set(call_ids))

    @property
    def replied(self) -> set[int]:
        return {i for i, frame in self.frames.items() if frame.WhichOneof("frame") == "reply"}

    def failure(self, call_id: int) -> int:
        return self.frames[call_id].failure.code


class Rig:
    """A worker, its store's held reads, and a clock that only the test moves."""

    def __init__(
        self, artifact: Artifact, store: StreamingStore, reader: HeldReader, max_loading: int
    ) -> None:
        self.artifact, self.store, self.reader = artifact, store, reader
        self.caller = Caller()
        self.now_s = 0.0
        self.worker = Worker(
            ExpertExecutor(artifact, store),
            asyncio.get_running_loop(),
            clock=lambda: self.now_s,
            max_loading=max_loading,
        )

    async def warm(self, *experts: int, layer: int = LAYER) -> None:
        """Bring experts into memory."""
        reading = asyncio.to_thread(take, self.store, layer, experts)
        task = asyncio.ensure_future(reading)
        await asyncio.to_thread(self.reader.await_held, len(experts))
        self.reader.let_go(len(experts))
        await task

    def submit(
        self, call_id: int, *experts: int, lane: Lane = Lane.INTERACTIVE, stream: int = 1
    ) -> None:
        ticket = Ticket(stream, call_id, lane, received_s=self.now_s, deadline_s=self.now_s + 60)
        self.worker.submit(Job(ticket, call_for(self.artifact, *experts), self.caller))

    async def await_held(self, count: int) -> None:
        await asyncio.to_thread(self.reader.await_held, count)


@asynccontextmanager
async def rig(
    artifact: Artifact, *, places: int | None = None, max_loading: int = 4
) -> AsyncIterator[Rig]:
    with ExitStack() as opened:
        store, reader = held(artifact, opened, places)
        made = Rig(artifact, store, reader, max_loading)
        try:
            yield made
        finally:
            reader.let_all_go()
            async with asyncio.timeout(30):
                await made.worker.wait_idle()
            made.worker.close()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await story()

    asyncio.run(bounded())


def test_a_call_that_waits_for_a_read_blocks_no_other(artifact: Artifact) -> None:
    """1. a cold call arrives; 2. a resident one is answered at once; 3. the read ends; 4. so does
    the cold call, with the sums of an executor that had everything."""

    async def story() -> None:
        async with rig(artifact) as r:
            await r.warm(1, 2)
            r.submit(1, 1, 7)
            r.submit(2, 1, 2)
            assert r.caller.replied == {2}, "no turn of the loop in between"
            await r.await_held(1)
            r.reader.let_go()
            await r.caller.answered(1)
            cold, warm = (r.caller.frames[i].reply for i in (1, 2))
            assert cold.load_us > 0 and warm.load_us == 0
            for reply, experts in ((cold, (1, 7)), (warm, (1, 2))):
                sums = whole_executor(artifact).compute(call_for(artifact, *experts))
                into = np.zeros_like(sums)
                wire.add_reply(reply, np.array([0], np.int32), artifact.grid(LAYER), into)
                assert (into == sums).all()

    run(story)


def test_a_caller_hears_of_progress_while_a_read_is_awaited(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact) as r:
            r.submit(1, 7)
            r.now_s = 1.0
            await r.caller.until(lambda: r.caller.progress == {1})
            assert not r.caller.frames

    run(story)


def test_a_call_is_cancelled_while_it_waits_for_a_read(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact) as r:
            r.submit(1, 7)
            r.worker.cancel((1, 1))
            await r.caller.answered(1)
            assert r.caller.failure(1) == pb.Failure.CANCELLED
            assert r.reader.num_held == 1, "the read is still under way"
            assert r.worker.num_held == 0

    run(story)


def test_a_deadline_passes_while_a_read_is_awaited(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact) as r:
            r.submit(1, 7)
            r.now_s = 61.0
            await r.caller.answered(1)
            assert r.caller.failure(1) == pb.Failure.DEADLINE

    run(story)


def test_a_stream_that_breaks_takes_its_waiting_calls_along(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact) as r:
            r.submit(1, 7)
            r.submit(2, 8, stream=2)
            r.worker.drop_stream(1)
            await r.await_held(2)
            r.reader.let_all_go()
            await r.caller.answered(2)
            await r.worker.wait_idle()
            assert r.caller.replied == {2}

    run(story)


def test_more_cold_calls_than_threads_wait_and_resident_ones_pass_them(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact, max_loading=2) as r:
            await r.warm(1)
            for call_id in range(1, 6):
                r.submit(call_id, 10 + call_id)
            await r.await_held(2)
            assert r.worker.num_loading == 2 and r.reader.num_held == 2
            r.submit(6, 1)
            assert r.caller.replied == {6}
            r.reader.let_all_go()
            await r.caller.answered(1, 2, 3, 4, 5)
            assert r.caller.replied == {1, 2, 3, 4, 5, 6}

    run(story)


def test_bulk_calls_leave_threads_to_interactive_ones(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact, max_loading=2) as r:
            r.submit(1, 10, lane=Lane.BULK)
            r.submit(2, 11, lane=Lane.BULK)
            r.submit(3, 12)
            await r.await_held(2)
            assert r.worker.num_loading == 2
            r.reader.let_go(2)
            await r.caller.answered(1, 3)
            r.reader.let_all_go()
            await r.caller.answered(2)

    run(story)


def test_a_read_error_fails_its_calls_and_the_next_one_tries_again(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact) as r:
            await r.warm(1)
            r.submit(1, 1, 7)
            await r.await_held(1)
            r.reader.fail(errno.EIO)
            await r.caller.answered(1)
            assert r.caller.failure(1) == pb.Failure.UNAVAILABLE
            r.submit(2, 1)
            assert 2 in r.caller.replied
            r.submit(3, 7)
            await r.await_held(1)
            r.reader.let_go()
            await r.caller.answered(3)
            assert 3 in r.caller.replied

    run(story)


def test_a_drain_that_is_over_answers_who_waits_for_reads(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact) as r:
            r.submit(1, 7)
            r.worker.drain()
            r.worker.abandon(errors.NodeDraining("the time is up"))
            assert r.caller.failure(1) == pb.Failure.DRAINING
            await r.worker.wait_idle()

    run(story)


def test_a_call_larger_than_the_cache_is_answered_in_waves(artifact: Artifact) -> None:
    async def story() -> None:
        async with rig(artifact, places=2) as r:
            r.reader.let_all_go()
            r.submit(1, *range(16))
            r.submit(2, *range(8, 16))
            await r.caller.answered(1, 2)
            assert r.caller.replied == {1, 2}

    run(story)
