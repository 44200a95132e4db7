"""Asks nodes for their metrics over HTTP, all at once, and remembers the look before."""

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from client.top.figures import Look, NodeFigures, figures_of, parse_look
from shoal.errors import UsageError
from shoal.limits import MIB

TIMEOUT_S = 2.0
MAX_BYTES = 4 * MIB  # a node's page has some 30 KiB
MAX_AT_ONCE = 16


@dataclass(slots=True)
class Watched:
    """A node that is looked at. figures: None while it does not answer; then `problem` says why."""

    url: str
    figures: NodeFigures | None = None
    problem: str = "not asked yet"
    _before: Look | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """host:port."""
        return urlsplit(self.url).netloc

    def look(self) -> None:
        """Ask once. Never raises: what goes wrong is its `problem`."""
        try:
            now = parse_look(_fetch(self.url), time.monotonic())
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            self.figures, self._before = None, None
            self.problem = str(getattr(reason, "strerror", None) or reason)
            return
        self.figures = figures_of(self._before, now)
        self.problem = ""
        self._before = now


def watch(addresses: Sequence[str]) -> list[Watched]:
    """Return what to look at: each `host:port` or URL of a node's metrics.

    Raises UsageError naming the address.
    """
    return [Watched(_url(address)) for address in addresses]


def look_at_all(nodes: Sequence[Watched]) -> None:
    """Ask every node, many at once; return when all have answered or TIMEOUT_S has passed."""
    with ThreadPoolExecutor(min(MAX_AT_ONCE, len(nodes)), "shoal-top") as threads:
        list(threads.map(Watched.look, nodes))


def _url(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    refusal = UsageError(
        f"{address!r}: write host:port of a node's --metrics-listen, or its http:// address"
    )
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not (parts.hostname and parts.port):
            raise refusal
    except ValueError:  # the port
        raise refusal from None
    return url if parts.path not in ("", "/") else f"{url.rstrip('/')}/metrics"


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        data: bytes = answer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"its page has more than {MAX_BYTES // MIB} MiB: no node's metrics")
    return data.decode("utf-8", "replace")
