"""The transport `fast` of a node: gRPC's wire on sockets of the node's event loop, or on its TLS.

Speaks to unmodified gRPC clients: Describe, Drain and grpc.health.v1 as well as Execute, on one
port. A frame is read, its call computed and its reply written within one callback of the loop.
"""

import asyncio
import contextlib
import socket
import ssl

from expert_node.config import ListenAddress
from expert_node.fast_connection import HANDSHAKE_TIMEOUT_S, FastConnection
from expert_node.lent_sockets import LentSockets
from expert_node.lifecycle import Health
from expert_node.service import ExpertService
from shoal import limits
from shoal.log import get_logger
from shoal.tls import ServerTls, telling

BACKLOG = 128
TLS_GOODBYE_S = 1.0  # for a peer to answer the end of TLS; its TCP connection ends then
_log = get_logger("fast_server")


class FastServer:
    """Accepts connections and knows those that are open (see grpc_server.Server)."""

    def __init__(
        self, service: ExpertService, health: Health, lent: LentSockets | None = None
    ) -> None:
        """Args: lent: who answers plain calls beside the loop; None: nobody."""
        self._service = service
        self._health = health
        self._lent = lent
        self._connections: set[FastConnection] = set()
        self._all_gone = asyncio.Event()
        self._all_gone.set()
        self._server: asyncio.Server | None = None
        self._tls: ServerTls | None = None

    async def start(self, listen: ListenAddress, tls: ServerTls | None) -> int:
        """Listen; return the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        if listen.socket_path is not None:
            listen.socket_path.unlink(missing_ok=True)  # a dead node's: its caller has looked
            self._server = await loop.create_unix_server(
                self._accept, str(listen.socket_path), backlog=BACKLOG
            )
            return 0
        bound = _bound(listen)
        if tls is None:
            self._server = await loop.create_server(self._accept, sock=bound, backlog=BACKLOG)
        else:
            self._tls = tls
            self._server = await loop.create_server(
                self._accept,
                sock=bound,
                backlog=BACKLOG,
                ssl=self._accepting_context(tls),
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=TLS_GOODBYE_S,
            )
        port: int = bound.getsockname()[1]
        return port

    def use_tls(self, tls: ServerTls) -> None:
        """Show another certificate from the next connection on."""
        self._tls = tls

    def _accepting_context(self, tls: ServerTls) -> ssl.SSLContext:
        """Return what the listener keeps: each handshake goes on with the latest context."""

        def choose(connection: ssl.SSLObject, _name: str | None, _context: object) -> None:
            if self._tls is not None:
                connection.context = self._tls.context

        context = tls.context
        context.sni_callback = choose  # called for clients that name no server, too
        context.sslobject_class = telling(lambda why: _log.warning("TLS handshake failed", why=why))
        return context

    async def stop(self, grace_s: float) -> None:
        """End all connections: politely, and after that time at once."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._all_gone.wait()
        for connection in list(self._connections):
            connection.abort()
        await self._all_gone.wait()
        if self._tls is None:  # else it would wait for peers that are silent within a handshake
            await self._server.wait_closed()

    def _accept(self) -> FastConnection:
        return FastConnection(self._service, self._health, self._joined, self._left, self._lent)

    def _joined(self, connection: FastConnection) -> None:
        self._connections.add(connection)
        self._all_gone.clear()
        if len(self._connections) > limits.MAX_CONNECTIONS:
            _log.warning("too many connections", limit=limits.MAX_CONNECTIONS)
            connection.abort()

    def _left(self, connection: FastConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()


def _bound(listen: ListenAddress) -> socket.socket:
    found = socket.getaddrinfo(
        listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, address = found[0]
    return socket.create_server(
        address,
        family=family,
        backlog=BACKLOG,
        reuse_port=False,  # two nodes on one port would share its connections without an error
        dualstack_ipv6=listen.host == "::" and socket.has_dualstack_ipv6(),
    )
