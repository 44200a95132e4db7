"""What a node does for its peers, whatever the transport: sessions, Describe, Drain, Reload.

No decisions here: what a frame means is the session's business. Transports: fast_connection and
grpc_server.
"""

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Protocol

from expert_node.config import ListenAddress
from expert_node.reload import Outcome
from expert_node.session import NodeFacts, Session
from expert_node.worker import Worker
from shoal import __version__, limits
from shoal.experts.call import ExpertCall
from shoal.tls import ServerTls
from shoal.v1 import expert_pb2 as pb

SERVICE_NAME = "shoal.v1.ExpertService"


class Server(Protocol):
    """What listens for a node."""

    async def start(self, listen: ListenAddress, tls: ServerTls | None) -> int:
        """Listen; return the port. Raises RuntimeError, OSError: it cannot."""
        ...

    def use_tls(self, tls: ServerTls) -> None:
        """Show another certificate from the next connection on. Only where `start` had one."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no new connection, and end those there are within that time."""
        ...


class Host(Protocol):
    """The node that a service belongs to."""

    @property
    def is_ready(self) -> bool: ...

    def start_drain(self, reason: str) -> None:
        """Begin to leave."""
        ...

    def start_reload(self) -> "asyncio.Future[Outcome]":
        """Read the configuration again."""
        ...

    def on_stream(self, stream_id: int) -> None:
        """Learn of a new stream."""
        ...

    def on_stream_end(self, stream_id: int) -> None:
        """Learn that it is over."""
        ...

    def on_call(self, stream_id: int, num_rows: int, call: Callable[[], ExpertCall]) -> None:
        """Learn of a call that was taken in (see Session)."""
        ...


class ExpertService:
    """Serves the streams of one node. Lives on the event loop's thread."""

    def __init__(self, facts: NodeFacts, worker: Worker, host: Host) -> None:
        self.facts = facts  # of the streams that open from now on
        self._worker = worker
        self._host = host
        self._stream_ids = count(1)
        self._streams: dict[int, tuple[Session, Callable[[], None]]] = {}

    @property
    def stream_ids(self) -> frozenset[int]:
        """The streams that are open."""
        return frozenset(self._streams)

    def facts_reply(self) -> pb.DescribeReply:
        """Say who this node is."""
        facts = self.facts
        return pb.DescribeReply(
            protocol_version=limits.PROTOCOL_VERSION,
            shoal_version=__version__,
            identity=facts.identity,
            numerics=facts.numerics,
            instance_epoch=facts.instance_epoch,
            owned=[
                pb.OwnedRange(
                    first_layer=owned.first_layer,
                    last_layer=owned.last_layer,
                    first_expert=owned.first_expert,
                    last_expert=owned.last_expert,
                )
                for owned in facts.owned
            ],
            quantisation=facts.quantisation,
            isa=facts.isa,
            num_threads=facts.num_threads,
            max_rows_per_call=facts.max_rows_per_call,
            max_message_bytes=limits.MAX_MESSAGE_BYTES,
            credit_bytes=facts.credit_bytes,
            ready=self._host.is_ready,
            draining=self._worker.is_draining,
            model_name=facts.model_name,
        )

    def begin_drain(self, request: pb.DrainRequest) -> pb.DrainReply:
        """Begin to leave; say how many calls are held."""
        num_held = self._worker.num_held
        self._host.start_drain(request.reason or "asked by a peer")
        return pb.DrainReply(calls_in_flight=num_held)

    def begin_reload(self) -> "asyncio.Future[Outcome]":
        """Ask for a reload; the future never fails."""
        return self._host.start_reload()

    def start_session(
        self, emit: Callable[[bytes, int], None], end: Callable[[], None]
    ) -> tuple[int, Session]:
        """Return the session of a new stream, and its id.

        Args:
            emit: as Session takes it.
            end: ends the stream once it has sent what is queued: the node leaves.
        """
        stream_id = next(self._stream_ids)
        session = Session(stream_id, self.facts, self._worker, emit, observe=self._host.on_call)
        self._streams[stream_id] = (session, end)
        self._host.on_stream(stream_id)
        return stream_id, session

    def end_session(self, stream_id: int) -> None:
        """Forget a stream that is over; its calls are dropped."""
        session, _ = self._streams.pop(stream_id)
        session.close()
        self._host.on_stream_end(stream_id)

    def announce_drain(self, reason: str) -> None:
        """Tell every stream that the node is leaving."""
        for session, _ in self._streams.values():
            session.drain(reason)

    def end_streams(self) -> None:
        """Let every stream send what it has queued, and end."""
        for _, end in list(self._streams.values()):
            end()


def reload_reply(outcome: Outcome) -> pb.ReloadReply:
    """Return the answer to Reload."""
    return pb.ReloadReply(error=outcome.error, changed=outcome.changed, kept=outcome.kept)
