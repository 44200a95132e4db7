"""The transport `grpcio` of a node: the service and health on grpc.aio."""

from typing import Protocol

import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from expert_node.config import ListenAddress
from expert_node.lifecycle import Health
from expert_node.service import SERVER_OPTIONS, ExpertService


class Server(Protocol):
    """What listens for a node."""

    async def start(self, listen: ListenAddress) -> int:
        """Listen; return the port. Raises RuntimeError, OSError: it cannot."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no new connection, and end those there are within that time."""
        ...


class GrpcServer:
    """See Server."""

    def __init__(self, service: ExpertService, health: Health) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, self._server)

    async def start(self, listen: ListenAddress) -> int:
        """Listen; return the port."""
        port: int = self._server.add_insecure_port(listen.grpc_target)
        await self._server.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """End within that time."""
        await self._server.stop(grace_s)
