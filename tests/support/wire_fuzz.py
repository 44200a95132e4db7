"""Hostile bytes against both ends of the fast transport: `python -m support.wire_fuzz SECONDS`.

Each seed spoils a recorded, valid conversation (`wire_mutations`). Whatever arrives:
- no exception but the declared ones leaves either end;
- what a connection keeps of its peer's bytes, and what it answers, is bounded;
- a connection ends, or goes on serving: a new call on it is answered;
- a node's next connection gets the right answer, and nothing of the old one is left.
"""

import asyncio
import contextlib
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator.dispatch_events import Lane
from coordinator.fast_lane import FastLane
from coordinator.node_link import Greeting
from expert_node.fast_connection import FastConnection
from expert_node.lifecycle import Health
from expert_node.reload import Outcome
from expert_node.service import ExpertService
from expert_node.session import NodeFacts
from expert_node.worker import Worker
from shoal import errors, limits, log, wire
from shoal.artifact import Artifact
from shoal.experts.local import LocalExperts
from shoal.experts.ownership import OwnedRange, Ownership
from shoal.http2 import frames, grpc_headers
from shoal.http2.connection import Connection
from shoal.http2.events import MessageReceived
from shoal.http2.frames import Code, Kind
from shoal.http2.header_blocks import HeaderWriter
from shoal.log_options import LogFormat, LogLevel
from shoal.shard_map import Endpoint, EndpointKind
from shoal.v1 import expert_pb2 as pb
from support.fables import NUM_EXPERTS, NUM_LAYERS, fables
from support.streaming import call_of
from support.wire_mutations import hostile, split

ROOT = Path(__file__).parents[2]
PROPERTY_TESTS = [
    f"tests/unit/test_{name}.py" for name in ("http2", "wire", "wire_frames", "session")
]
PATIENCE_S = 30.0  # of a busy machine, with what has been sent already
EXECUTE = "/shoal.v1.ExpertService/Execute"
# An answer to a Describe of 30 bytes has 400; an Opened, a Failure or a PING fewer.
MAX_ANSWER_BYTES_PER_BYTE, MAX_FIRST_ANSWER_BYTES = 64, limits.MIB
PROBE_STREAM = 2**31 - 3  # above whatever a spoiled conversation opened, but for the very last
GREETING = Greeting("ab" * 32, "cd" * 32, bytes(16))
FACTS = NodeFacts(
    model_name="fables",
    identity=GREETING.identity,
    numerics=GREETING.numerics,
    instance_epoch="ef" * 8,
    owned=(OwnedRange(0, NUM_LAYERS - 1, 0, NUM_EXPERTS - 1),),
    quantisation="q8_0",
    isa="any",
    num_threads=1,
    max_rows_per_call=limits.MAX_ROWS_PER_CALL,
)


class Wire(asyncio.Transport):
    """What a FastConnection writes to. It closes when told to, as a socket would."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_over = self._is_paused = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_over = True

    def abort(self) -> None:
        self.is_over = True

    def is_closing(self) -> bool:
        return self.is_over

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False

    def is_reading(self) -> bool:
        return not self._is_paused

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.is_over = True  # a peer would close now


class Host:
    """The node that the service belongs to: it hears, and does nothing."""

    is_ready = True

    def start_drain(self, reason: str) -> None:
        assert reason

    def start_reload(self) -> "asyncio.Future[Outcome]":
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(done.set_result, Outcome())
        return done

    def on_stream(self, stream_id: int) -> None: ...
    def on_stream_end(self, stream_id: int) -> None: ...
    def on_call(self, stream_id: int, num_rows: int, call: Any) -> None: ...


class NodeWorld:
    """A node's service with real experts, and any number of connections to it."""

    def __init__(self, artifact: Artifact) -> None:
        """Use `open`, which records a conversation, and what a call is answered with."""
        self._artifact = artifact
        loop = asyncio.get_running_loop()
        self._experts = LocalExperts(artifact, Ownership(artifact.owned_experts))
        self._experts.warm_up(lambda _: None)  # so that calls go the native way, as a node's do
        self.worker = Worker(self._experts.executor, loop)
        self.health = Health()
        self.service = ExpertService(FACTS, self.worker, Host())
        self._open: set[FastConnection] = set()
        call = call_of(artifact, 1, [0, 5, 9, 31])
        self._call = wire.call_frame(77, 60_000, call)
        self.conversation: list[bytes] = []
        self.answers: list[bytes] = []
        self._expected = b""

    @classmethod
    async def open(cls, artifact: Artifact) -> "NodeWorld":
        world = cls(artifact)
        world.conversation, world.answers = await world._record()
        world._expected = await world._answer_to_call()
        return world

    def close(self) -> None:
        self.worker.close()
        self._experts.close()

    def connect(self) -> tuple[FastConnection, Wire]:
        connection = FastConnection(self.service, self.health, self._open.add, self._open.discard)
        transport = Wire()
        connection.connection_made(transport)
        return connection, transport

    async def _record(self) -> tuple[list[bytes], list[bytes]]:
        """Return the frames of a client and of the node that say everything once."""
        connection, transport = self.connect()
        client, sent, heard = Connection(is_client=True), bytearray(), bytearray()

        async def turn() -> None:
            while (data := client.take_output()) or transport.written or self.worker.num_held:
                sent.extend(data)
                if data:
                    connection.data_received(data)
                await asyncio.sleep(0)
                answer = bytes(transport.written)
                transport.written.clear()
                heard.extend(answer)
                client.receive(answer, 0.0)

        execute = client.open(grpc_headers.request(EXECUTE, "node"))
        client.send_message(execute, GREETING.open_frame(Lane.INTERACTIVE, 0))
        await turn()
        for number in range(3):
            call = call_of(self._artifact, number, [number, 7, 20], number)
            client.send_message(execute, wire.call_frame(number, 60_000, call))
            await turn()
        client.send_message(execute, wire.encode_hint(1, [2, 3]).SerializeToString())
        cancel = pb.ClientFrame(cancel=pb.Cancel(call_id=2))
        client.send_message(execute, cancel.SerializeToString())
        client.ping()
        for method in ("shoal.v1.ExpertService/Describe", "grpc.health.v1.Health/Watch"):
            unary = client.open(grpc_headers.request(f"/{method}", "node"))
            client.send_message(unary, b"")
            client.end(unary)
            await turn()
        client.reset(unary, Code.CANCEL)
        client.end(execute)
        client.go_away()
        await turn()
        connection.connection_lost(None)
        return split(bytes(sent)), split(bytes(heard))

    async def _answer_to_call(self) -> bytes:
        """Return what a fresh connection answers a call with, its times left out."""
        connection, transport = self.connect()
        client = Connection(is_client=True)
        execute = client.open(grpc_headers.request(EXECUTE, "node"))
        client.send_message(execute, GREETING.open_frame(Lane.INTERACTIVE, 0))
        client.send_message(execute, self._call)
        connection.data_received(client.take_output())
        replies: list[pb.Reply] = []
        give_up_s = time.monotonic() + PATIENCE_S
        while not replies:
            assert time.monotonic() < give_up_s and not transport.is_over, "no answer to a call"
            for event in client.receive(bytes(transport.written), 0.0):
                if isinstance(event, MessageReceived):
                    frame = pb.NodeFrame.FromString(event.payload)
                    assert not frame.HasField("failure"), frame
                    replies += [frame.reply] if frame.HasField("reply") else []
            transport.written.clear()
            await asyncio.sleep(0)  # a call may wait for others' turn
        connection.connection_lost(None)
        assert [reply.call_id for reply in replies] == [77]
        return replies[0].sums + replies[0].widths

    async def survive(self, seed: int) -> None:
        """Receive a conversation spoiled by this seed. Raises AssertionError, or a bug's own."""
        random_ = random.Random(seed)
        connection, transport = self.connect()
        num_bytes = 0
        for chunk in hostile(random_, self.conversation):
            if transport.is_over:
                break
            num_bytes += len(chunk)
            connection.data_received(chunk)
            self._check_bounds(connection, transport, num_bytes)
            if random_.random() < 0.02:
                connection.pause_writing()
                await asyncio.sleep(0)
                connection.resume_writing()
        if not transport.is_over:
            self._check_serves(connection, transport)
        connection.connection_lost(None)
        await asyncio.sleep(0)
        assert not self.service.stream_ids and not self._open, "a dead connection is not forgotten"
        assert not self.health.watchers, "a dead connection is told of health"
        assert await self._answer_to_call() == self._expected

    def _check_bounds(self, connection: FastConnection, transport: Wire, num_bytes: int) -> None:
        http2 = connection._connection
        http2.check_integrity()
        # One that is over keeps what it was reading, and what it had made of it, until it is gone.
        assert transport.is_over or held_bytes(http2) <= num_bytes, "it keeps more than came"
        most = MAX_FIRST_ANSWER_BYTES + MAX_ANSWER_BYTES_PER_BYTE * num_bytes
        assert len(transport.written) <= most, "the answers grow beyond measure"

    def _check_serves(self, connection: FastConnection, transport: Wire) -> None:
        """A connection that is still open between two frames answers a new call."""
        http2 = connection._connection
        if not is_between_frames(http2) or http2._last_remote_id >= PROBE_STREAM:
            return
        transport.written.clear()
        request = grpc_headers.request("/shoal.v1.ExpertService/Nothing", "node")
        asked = HeaderWriter().frame(PROBE_STREAM, request)
        connection.data_received(asked)
        heard = [frames.unpack_header(part, 0) for part in split(bytes(transport.written))]
        kinds = {kind for _, kind, _, stream_id in heard if stream_id == PROBE_STREAM}
        is_answered = kinds & {Kind.HEADERS, Kind.RST_STREAM}  # refused: too many are open
        assert is_answered or transport.is_over, "it is open, and deaf"


def held_bytes(http2: Connection) -> int:
    """How much of what its peer sent a connection keeps."""
    partial = sum(len(stream.partial) for stream in http2._streams.values())
    return len(http2._buffer) + len(http2._blocks._block) + partial


def is_between_frames(http2: Connection) -> bool:
    """Whether a new frame would be read as one, and may be HEADERS."""
    is_whole = not (http2._buffer or http2._preface or http2._blocks.stream_id)
    return is_whole and http2._has_settings


class LaneWorld:
    """A coordinator's lane, and a node that says what it likes."""

    def __init__(self, answers: list[bytes], folder: Path) -> None:
        """Listen. answers: what a node says in a valid conversation."""
        self._answers = answers
        path = folder / "node.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._endpoint = Endpoint(EndpointKind.UNIX, str(path))
        self._buffer = memoryview(bytearray(256 * 1024))

    def survive(self, seed: int) -> int:
        """Be met by such a node; return how many frames came through. Raises a bug's own."""
        chunks = hostile(random.Random(seed), self._answers)
        teller = threading.Thread(target=self._tell, args=(chunks,), name="fuzz-node")
        teller.start()
        lane, num_frames = FastLane(self._endpoint, Lane.INTERACTIVE), 0
        try:
            lane.open(GREETING, 0)
            while True:  # until the end of the stream or of the connection, which raises
                assert select.select([lane], [], [], PATIENCE_S)[0], "it waits for nothing"
                num_frames += sum(1 for _ in lane.receive(self._buffer))
                lane.flush()
        except errors.NodeError as error:
            assert str(error)
            return num_frames
        finally:
            lane.close()
            teller.join()

    def _tell(self, chunks: list[bytes]) -> None:
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)  # its start: a reset would take what we say with it
            for chunk in chunks:
                connection.sendall(chunk)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def lane_world(answers: list[bytes]) -> Iterator[LaneWorld]:
    with (
        tempfile.TemporaryDirectory(prefix="shoal-") as folder,
        contextlib.closing(LaneWorld(answers, Path(folder))) as world,
    ):
        yield world


async def fuzz(seeds: Iterator[int], give_up_s: float) -> int:
    """Try seeds until there are none or the time is up; return how many. Raises what one found."""
    world, num_tried = await NodeWorld.open(Artifact.open(fables())), 0
    with lane_world(world.answers) as lanes:
        for seed in seeds:
            if time.monotonic() > give_up_s:
                break
            try:
                await world.survive(seed)
                if seed % 4 == 0:  # a socket and a thread each: slower
                    lanes.survive(seed)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            num_tried += 1
    world.close()
    return num_tried


def seeds_from(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def repeat_property_tests(give_up_s: float) -> int:
    """Run the property tests with fresh examples until the time is up; return how often.

    Raises CalledProcessError: one failed, and has told why.
    """
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    num_runs = 0
    while time.monotonic() < give_up_s:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        subprocess.run([*command, *PROPERTY_TESTS], check=True, env=environment, cwd=ROOT)
        num_runs += 1
    return num_runs


def main() -> None:
    """Fuzz for so many seconds with fresh seeds, or one seed: `SECONDS [SEED]`."""
    log.configure(LogFormat.CONSOLE, LogLevel.ERROR)
    seconds, begun_s = float(sys.argv[1]), time.monotonic()
    is_one = len(sys.argv) > 2
    first = int(sys.argv[2]) if is_one else random.SystemRandom().randrange(2**40)
    seeds = iter([first]) if is_one else seeds_from(first)
    num_tried = asyncio.run(fuzz(seeds, begun_s + seconds / 2))
    sys.stdout.write(f"{num_tried} spoiled conversations from seed {first}: nothing found\n")
    if not is_one:
        num_runs = repeat_property_tests(begun_s + seconds)
        sys.stdout.write(f"{num_runs} runs of the property tests: nothing found\n")


if __name__ == "__main__":
    main()
