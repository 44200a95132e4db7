"""Which files hold certificates and keys, as flags name them; `shoal.tls` reads them."""

from dataclasses import dataclass
from pathlib import Path

from shoal.errors import UsageError


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """What a node shows of itself. client_ca: who must have signed its clients' certificates."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def is_mutual(self) -> bool:
        return self.client_ca is not None

    def __str__(self) -> str:
        clients = "" if self.client_ca is None else f", clients of {self.client_ca}"
        return f"{self.cert}, {self.key}{clients}"


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """Whom a coordinator trusts, and what it shows of itself.

    ca: None: the authorities that the system trusts. cert, key: None: nodes that ask refuse it.
    server_name: what nodes' certificates must be for; None: the host of the endpoint.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, other = ("cert", "key") if self.key is None else ("key", "cert")
            raise UsageError(f"--tls-{given} needs --tls-{other}: a certificate and its key")
