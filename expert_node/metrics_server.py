"""The HTTP side door of a node: /metrics for Prometheus, /health and /ready for probes.

Its threads never compute and never touch the event loop: a probe is answered while a call is.
"""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from typing import cast

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from expert_node.config import ListenAddress
from shoal import limits
from shoal.errors import NodeError
from shoal.log import get_logger

REQUEST_TIMEOUT_S = 5.0  # for a request to arrive and its answer to be taken
_log = get_logger("metrics")


class MetricsServer:
    """Listens from its making until `close`."""

    def __init__(
        self, listen: ListenAddress, registry: CollectorRegistry, is_ready: Callable[[], bool]
    ) -> None:
        """Bind and serve. Raises NodeError: the address cannot be listened on."""
        try:
            self._server = _Server(listen, registry, is_ready)
        except OSError as error:
            raise NodeError(
                f"cannot listen on {listen.grpc_target}: {error.strerror or error}; choose another "
                "address with --metrics-listen (port 0: any free)"
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="shoal-metrics", kwargs={"poll_interval": 0.05}
        )
        self._thread.start()
        self._listen = listen

    @property
    def url(self) -> str:
        """Where /metrics is, with the port that was bound."""
        endpoint = self._listen.endpoint(self._server.server_address[1])
        return endpoint.replace("grpc://", "http://") + "/metrics"

    def close(self) -> None:
        """Stop listening; requests under way get their answer."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True  # server_close waits for the threads; each ends by its timeout

    def __init__(
        self, listen: ListenAddress, registry: CollectorRegistry, is_ready: Callable[[], bool]
    ) -> None:
        self.registry, self.is_ready = registry, is_ready
        self._host = listen.host
        self._places = threading.Semaphore(limits.MAX_METRICS_REQUESTS)
        self.address_family = AF_INET6 if ":" in listen.host else AF_INET
        super().__init__((listen.host, listen.port), _Handler)

    def server_bind(self) -> None:
        """Bind, without asking the name service who we are, as http.server would."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self._host, self.server_address[1]

    def process_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        _log.debug("metrics request broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server_version = "shoal"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one request."""
        server = cast(_Server, self.server)
        match self.path.partition("?")[0]:
            case "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, encode(server.registry), kind)
            case "/health":
                self._answer(HTTPStatus.OK, b"ok\n")
            case "/ready":
                is_ready = server.is_ready()
                status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(status, b"ready\n" if is_ready else b"not ready\n")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"here are /metrics, /health and /ready\n")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a scrape every few seconds is no news."""

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
