"""Certificate authorities of a test, and what they sign. Made by trustme, for that test alone."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from shoal.tls_files import ClientFiles

LONG_AGO = datetime.now(UTC) - timedelta(days=30)
YESTERDAY = datetime.now(UTC) - timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """PEM files of a certificate (its chain behind it) and of its key."""

    cert: Path
    key: Path

    @property
    def flags(self) -> tuple[str, ...]:
        """What a verb is told."""
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key))

    def replace(self, other: "Pair") -> None:
        """Put another pair into these files."""
        self.cert.write_bytes(other.cert.read_bytes())
        self.key.write_bytes(other.key.read_bytes())


class Authority:
    """Signs certificates. `cert`: its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._authority = trustme.CA(organization_name=name)
        self.cert = folder / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.cert))

    def issue(
        self, name: str, *hosts: str, since: datetime | None = None, until: datetime | None = None
    ) -> Pair:
        """Sign a certificate for these hosts (default: this machine's loopback)."""
        made = self._authority.issue_cert(
            *(hosts or ("localhost", "127.0.0.1")), not_before=since, not_after=until
        )
        folder = self._folder / self._name
        folder.mkdir(exist_ok=True)
        pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        pair.cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        pair.key.write_bytes(made.private_key_pem.bytes())
        return pair

    def trusted(self, pair: Pair | None = None, server_name: str | None = None) -> ClientFiles:
        """Return the files of a coordinator that trusts this authority and shows that pair."""
        cert, key = (None, None) if pair is None else (pair.cert, pair.key)
        return ClientFiles(self.cert, cert, key, server_name)
