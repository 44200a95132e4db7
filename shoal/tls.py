"""TLS of both ends: certificates and keys from PEM files, checked when they are read.

What is wrong with a file, or with a handshake, is said in words that name the file, the reason and
the fix. `ssl` and gRPC get the same bytes, so both transports trust the same.
"""

import math
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoal import limits
from shoal.errors import UsageError
from shoal.tls_files import ClientFiles, ServerFiles

ALPN = "h2"  # gRPC takes no connection that does not name it
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_KEY = b"PRIVATE KEY-----"
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL: `ssl` has no name for it
_IN_MEMORY_STEPS = 8  # of a handshake between two ends in memory: TLS 1.2 takes five


@dataclass(frozen=True, slots=True)
class ServerTls:
    """A node's certificate, key and client authority, read. context: ready to serve.

    names: of the certificate. expires_s: Unix time.
    """

    files: ServerFiles
    cert: bytes = field(repr=False)
    key: bytes = field(repr=False)
    client_ca: bytes | None = field(repr=False)
    context: ssl.SSLContext
    names: tuple[str, ...]
    expires_s: float

    @classmethod
    def read(cls, files: ServerFiles) -> "ServerTls":
        """Read the files.

        Raises:
            UsageError: a file cannot be read, is no PEM, or they do not belong together.
        """
        cert, key = _read_pair(files.cert, files.key)
        client_ca = None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols([ALPN])
        context.num_tickets = 0  # each connection shows its certificate: none outlives a reload
        context.options |= ssl.OP_NO_TICKET
        _load_pair(context, files.cert, files.key)
        names, expires_s = _leaf_facts(files.cert, files.key, is_server=True)
        if files.client_ca is not None:
            client_ca = _read(files.client_ca, "--tls-client-ca")
            _load_ca(context, client_ca, f"--tls-client-ca {files.client_ca}")
            context.verify_mode = ssl.CERT_REQUIRED
        return cls(files, cert, key, client_ca, context, names, expires_s)

    def shows_the_same(self, other: "ServerTls | None") -> bool:
        """Whether a client could not tell it from the other."""
        return other is not None and (self.cert, self.key, self.client_ca) == (
            other.cert,
            other.key,
            other.client_ca,
        )

    @property
    def is_expired(self) -> bool:
        return self.expires_s <= datetime.now(UTC).timestamp()

    def __str__(self) -> str:
        until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.expires_s))
        return f"certificate for {', '.join(self.names) or 'no name'}, until {until}"


@dataclass(frozen=True, slots=True)
class ClientTls:
    """A coordinator's authorities, certificate and key, read.

    expires_s: of the certificate; infinity without one.
    """

    files: ClientFiles
    roots: bytes = field(repr=False)
    cert: bytes | None = field(repr=False)
    key: bytes | None = field(repr=False)
    expires_s: float

    @classmethod
    def read(cls, files: ClientFiles) -> "ClientTls":
        """Read the files. Raises UsageError, as ServerTls.read does."""
        cert, key, expires_s = None, None, math.inf
        if files.cert is not None and files.key is not None:
            cert, key = _read_pair(files.cert, files.key)
            expires_s = _leaf_facts(files.cert, files.key, is_server=False)[1]
        roots = _system_roots() if files.ca is None else _read(files.ca, "--tls-ca")
        read = cls(files, roots, cert, key, expires_s)
        read.context()
        return read

    @property
    def is_expired(self) -> bool:
        return self.expires_s <= datetime.now(UTC).timestamp()

    def context(self) -> ssl.SSLContext:
        """Return what a client connects with that trusts what this one trusts."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols([ALPN])
        _load_ca(context, self.roots, f"--tls-ca {self.files.ca or 'of the system'}")
        if self.files.cert is not None and self.files.key is not None:
            _load_pair(context, self.files.cert, self.files.key)
        return context


def words_of(error: ssl.SSLError) -> str:
    """Return what a library's error says, without its numbers and places."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message).rstrip(".")
    return (error.reason or error.strerror or str(error)).lower().replace("_", " ")


def telling(tell: Callable[[str], None]) -> type[ssl.SSLObject]:
    """Return an `SSLContext.sslobject_class` that tells why a node's handshake failed.

    asyncio keeps that quiet, and an operator would look for it in the node's log.
    """

    class Telling(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                tell(_handshake_words(error))
                raise

    return Telling


def _handshake_words(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    if reason in {"HTTP_REQUEST", "WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL"}:
        return "the peer speaks no TLS: a coordinator writes grpcs:// in --moe-shards"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the peer showed no certificate: a coordinator needs --tls-cert and --tls-key"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is refused: {words_of(error)}"
    if "ALERT" in reason:
        return f"the peer refuses this node's certificate, or gave up: {words_of(error)}"
    return words_of(error)


def _read(path: Path, flag: str, *, mark: bytes = _CERTIFICATE, what: str = "certificate") -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limits.MAX_PEM_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be read: {error.strerror}") from None
    if len(data) > limits.MAX_PEM_BYTES:
        raise UsageError(f"{flag} {path}: more than {limits.MAX_PEM_BYTES} bytes: no PEM file")
    if mark not in data:
        raise UsageError(
            f"{flag} {path}: holds no {what} in PEM form ({_shown(mark)}): convert it with openssl"
        )
    return data


def _shown(mark: bytes) -> str:
    return mark.decode() if mark.startswith(b"-") else f"-----BEGIN {mark.decode()}"


def _read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    cert_pem = _read(cert, "--tls-cert")
    key_pem = _read(key, "--tls-key", mark=_KEY, what="private key")
    if b"ENCRYPTED" in key_pem:
        raise UsageError(
            f"--tls-key {key}: has a passphrase, and nobody is there to type it: write it without "
            "one (openssl pkey -in FILE -out NEW), readable by this user alone"
        )
    return cert_pem, key_pem


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    try:
        context.load_cert_chain(cert, key, password="")
    except OSError as error:  # ssl.SSLError is one
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(
                f"--tls-key {key} is not the key of --tls-cert {cert}: name two files that were "
                "made together (the node's own certificate stands first in its file)"
            ) from None
        why = words_of(error) if isinstance(error, ssl.SSLError) else error.strerror
        raise UsageError(
            f"--tls-cert {cert} and --tls-key {key} cannot be used: {why}: a file is damaged, or "
            "its kind of key is too weak or too new for this OpenSSL"
        ) from None


def _load_ca(context: ssl.SSLContext, pem: bytes, name: str) -> None:
    try:
        context.load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise UsageError(f"{name}: no usable certificate: {words_of(error)}") from None


def _system_roots() -> bytes:
    # What OpenSSL trusts by default, as bytes: gRPC brings authorities of its own, which would
    # leave out those that an administrator has added.
    paths = ssl.get_default_verify_paths()
    found = [Path(paths.cafile)] if paths.cafile else []
    if not found and paths.capath:
        found = sorted(Path(paths.capath).glob("*.[0-9]")) or sorted(Path(paths.capath).iterdir())
    pem = bytearray()
    for path in found:
        with suppress(OSError):
            data = path.read_bytes()
            pem += data + b"\n" if _CERTIFICATE in data else b""
    if not pem:
        ders = ssl.create_default_context().get_ca_certs(binary_form=True)  # Windows' own store
        pem += "".join(map(ssl.DER_cert_to_PEM_cert, ders)).encode()
    if not pem:
        raise UsageError(
            "this system trusts no authority that shoal can find: name the one that signed the "
            "nodes' certificates with --tls-ca"
        )
    return bytes(pem)


def _leaf_facts(cert: Path, key: Path, *, is_server: bool) -> tuple[tuple[str, ...], float]:
    """Return the names and the end (Unix time) of a pair's certificate.

    Shakes hands with ourselves in memory, as `ssl` reads certificates only from a peer; so one that
    may not be used by that end is refused here. One that has expired is not.
    """
    shown, judge = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_server else ssl.PROTOCOL_TLS_SERVER),
    )
    for context in (shown, judge):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        _load_pair(context, cert, key)
    judge.verify_mode = ssl.CERT_REQUIRED
    judge.verify_flags = ssl.VerifyFlags(ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME)
    wires = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        judge.wrap_bio(wires[0], wires[1], server_side=not is_server),
        shown.wrap_bio(wires[1], wires[0], server_side=is_server),
    )
    try:
        judge.load_verify_locations(cert)
        for _ in range(_IN_MEMORY_STEPS):
            for end in ends:
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        facts = ends[0].getpeercert() or {}
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = words_of(error) if isinstance(error, ssl.SSLError) else str(error)
        who = "coordinator would take it from a node" if is_server else "node would take it"
        raise UsageError(f"--tls-cert {cert}: no {who}: {why}") from None
    pairs: Any = facts.get("subjectAltName", ())  # typeshed has one type for all fields
    names = tuple(str(name) for _kind, name in pairs)
    return names, float(ssl.cert_time_to_seconds(str(facts["notAfter"])))
