"""TLS towards nodes: who carries it, with which files, and why a node cannot be met by it.

grpcio carries it: where a map names a `grpcs://` node, all of its nodes are called through grpcio.
gRPC says of a failed handshake little that helps, so a probe shakes hands once more and tells.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Collection
from typing import TypeVar

import grpc

from shoal.errors import NodeUntrusted, UsageError
from shoal.shard_map import Endpoint, EndpointKind
from shoal.tls import ALPN, ClientTls, words_of
from shoal.tls_files import ClientFiles
from shoal.transport import Transport

PROBE_TIMEOUT_S = 1.0  # for all of it: the node has just answered something, or refused
RECORD_BYTES = 16384
_T = TypeVar("_T")
_EXPIRED, _NOT_YET = 10, 9  # X509_V_ERR_*: what OpenSSL's verification says
_NAME_CODES = frozenset({62, 64})  # host name, IP address
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})


def settle_transport(
    transport: Transport,
    files: ClientFiles,
    kinds: Collection[EndpointKind],
    notify: Callable[[str], None],
) -> "Trust | None":
    """Return what `grpcs://` nodes are met with; None: the map names none.

    Raises:
        UsageError: --transport fast, which carries no TLS; files that are wrong, or for nothing.
    """
    if EndpointKind.GRPCS not in kinds:
        if files != ClientFiles():
            raise UsageError(
                "--tls-ca, --tls-cert, --tls-key and --tls-server-name are for nodes that "
                "--moe-shards names as grpcs://host:port, and it names none"
            )
        return None
    if transport is Transport.FAST:
        raise UsageError(
            "--transport fast carries no TLS, and --moe-shards names grpcs:// nodes: leave "
            "--transport out (grpcio then carries all of the map), or use grpc:// over a tunnel"
        )
    trust = Trust(files, notify)
    notify("TLS: the connections to this map's nodes are carried by grpcio")
    return trust


class Trust:
    """A coordinator's certificates, read anew for a meeting when a file has changed."""

    def __init__(self, files: ClientFiles, notify: Callable[[str], None]) -> None:
        """Read the files. Raises UsageError: they cannot be used."""
        self._files = files
        self._notify = notify
        self._stamp = self._stamps()
        self._read = ClientTls.read(files)

    @property
    def server_name(self) -> str | None:
        return self._files.server_name

    def current(self) -> ClientTls:
        """Return what the files hold; if that is wrong, what they held before, and tell."""
        stamp = self._stamps()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._read = ClientTls.read(self._files)
            except UsageError as error:
                self._notify(f"{error}; going on with what was there before")
        return self._read

    def credentials(self) -> grpc.ChannelCredentials:
        """Return what gRPC's channels to nodes are made with."""
        tls = self.current()
        return grpc.ssl_channel_credentials(tls.roots, tls.key, tls.cert)

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        stamps: list[tuple[int, int, int] | None] = []
        for path in (self._files.ca, self._files.cert, self._files.key):
            try:
                found = None if path is None else path.stat()
            except OSError:
                found = None
            stamps.append(found and (found.st_ino, found.st_size, found.st_mtime_ns))
        return stamps


async def why_untrusted(endpoint: Endpoint, trust: Trust | None) -> NodeUntrusted | None:
    """Return why a node that is there cannot be met, if that is about TLS; None: it is not."""
    if endpoint.kind is EndpointKind.UNIX:
        return None
    try:
        return await asyncio.to_thread(_probe, endpoint, trust)
    except OSError:  # nobody is there, or silent: gRPC has said so
        return None


def _probe(endpoint: Endpoint, trust: Trust | None) -> NodeUntrusted | None:
    host, _, port = endpoint.address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    give_up_s = time.monotonic() + PROBE_TIMEOUT_S
    with socket.create_connection((host, int(port)), PROBE_TIMEOUT_S) as connection:
        connection.settimeout(max(0.05, give_up_s - time.monotonic()))
        if endpoint.kind is EndpointKind.GRPC:
            return _probe_plain(endpoint, connection)
        assert trust is not None, "a map with grpcs:// nodes has trust"
        return _probe_tls(endpoint, connection, trust, trust.server_name or host)


class _Session:
    """TLS over a socket that stays its owner's: `wrap_socket` loses it where a peer resets it."""

    def __init__(
        self, context: ssl.SSLContext, connection: socket.socket, name: str | None
    ) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._secure = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._connection = connection

    def shake_hands(self) -> str | None:
        """Return the protocol agreed on. Raises OSError, of which SSLError is one."""
        self._until_done(self._secure.do_handshake)
        self._connection.sendall(self._outgoing.read())
        return self._secure.selected_alpn_protocol()

    def speaks(self) -> bool:
        """Whether the peer says anything before it hangs up. Raises as `shake_hands`."""
        try:
            return bool(self._until_done(lambda: self._secure.read(1)))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return False

    def _until_done(self, step: Callable[[], _T]) -> _T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._connection.sendall(self._outgoing.read())
                data = self._connection.recv(RECORD_BYTES)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()


def _probe_plain(endpoint: Endpoint, connection: socket.socket) -> NodeUntrusted | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([ALPN])
    try:
        _Session(context, connection, None).shake_hands()
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):  # an alert is TLS, too
            return None
    return NodeUntrusted(
        f"node {endpoint} speaks TLS: write grpcs://{endpoint.address} in --moe-shards (and "
        "--tls-ca with the authority that signed its certificate)"
    )


def _probe_tls(
    endpoint: Endpoint, connection: socket.socket, trust: Trust, name: str
) -> NodeUntrusted | None:
    tls = trust.current()
    try:
        session = _Session(tls.context(), connection, name)
        if session.shake_hands() != ALPN:
            why = "speaks TLS, but not HTTP/2: is a shoal node there?"
            return NodeUntrusted(f"node {endpoint} {why}")
        # A node speaks first. Of TLS 1.3 our part is over before it has judged what we showed.
        if session.speaks():
            return None
    except ssl.SSLCertVerificationError as error:
        return NodeUntrusted(f"node {endpoint}: {_refused(error, name)}")
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in _NO_TLS:
            return NodeUntrusted(
                f"node {endpoint} speaks no TLS: start it with --tls-cert and --tls-key, or write "
                f"grpc://{endpoint.address} in --moe-shards"
            )
        if "ALERT" not in reason:
            return NodeUntrusted(
                f"node {endpoint} agrees on no TLS with this coordinator: {words_of(error)}"
            )
    except ConnectionResetError:
        pass
    return NodeUntrusted(f"node {endpoint} {_hung_up(tls)}")


def _hung_up(tls: ClientTls) -> str:
    # Neither uvloop nor gRPC sends the alert that would say why.
    if tls.cert is None:
        return (
            "hangs up after the TLS handshake: it asks for a client certificate: give --tls-cert "
            "and --tls-key"
        )
    if tls.is_expired:
        return f"refuses --tls-cert {tls.files.cert}, which has expired: renew it"
    return (
        f"hangs up after the TLS handshake: it refuses --tls-cert {tls.files.cert}: if its "
        "--tls-client-ca is not the authority that signed it, name another pair; its log says why"
    )


def _refused(error: ssl.SSLCertVerificationError, name: str) -> str:
    why = words_of(error)
    if error.verify_code == _EXPIRED:
        return f"its certificate has expired ({why}): renew its --tls-cert, and reload it (SIGHUP)"
    if error.verify_code == _NOT_YET:
        return f"its certificate is not valid yet ({why}): compare the clocks of both machines"
    if error.verify_code in _NAME_CODES:
        return (
            f"its certificate is not for {name} ({why}): write a name that it is for in "
            "--moe-shards, or say it with --tls-server-name"
        )
    return (
        f"its certificate is not trusted ({why}): name the authority that signed it with --tls-ca"
    )
