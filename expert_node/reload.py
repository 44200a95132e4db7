"""Reload: reads the configuration again and puts it in force, one at a time, whole or not at all.

Whoever asks (SIGHUP, the Reload call) is answered by a reload that began after the question. While
one runs, any number of questions make one more: a storm of signals costs two reloads.

What is wrong with a new configuration leaves the old one in force. What cannot change while a node
runs (where it listens, its threads) is named and stays as it was.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from expert_node.config import ListenAddress, NodeConfig
from shoal.errors import ShoalError
from shoal.log import get_logger
from shoal.sizes import format_size
from shoal.tls_files import ServerFiles

# Field of NodeConfig -> its setting, and whether it can change while the node runs.
_LIVE = {
    "model": "model",
    "experts": "experts",
    "layers": "layers",
    "cache_bytes": "cache",
    "verify": "verify",
    "prefetch": "prefetch",
    "record_heat": "record-heat",
    "pin_experts": "pin-experts",
    "thermal_limit_c": "nvme-thermal-limit",
    "max_read_bandwidth": "max-read-bandwidth",
    "max_queued_calls": "max-queued-calls",
    "drain_timeout_s": "drain-timeout",
    "log_format": "log-format",
    "log_level": "log-level",
}
_AT_START = {
    "listen": "listen",
    "data_dirs": "data-dir",
    "io": "io",
    "warmup": "warmup",
    "warmup_from": "warmup-from",
    "metrics_listen": "metrics-listen",
    "threads": "threads",
    "tls": "tls-cert, tls-key, tls-client-ca",
    "insecure": "insecure",
    "transport": "transport",
    "leave_with_stdin": "leave-with-stdin",
    "sysfs": "sysfs",
}
_SIZES = frozenset({"cache_bytes", "max_read_bandwidth"})
_log = get_logger("reload")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reload came to.

    error: why nothing has changed; "" if it went well. changed: settings now in force, as
    "cache: 8.00 GiB -> 4.00 GiB". kept: the same of settings that only a new start changes.
    """

    error: str = ""
    changed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReloadFigures:
    """Reloads since the start. succeeded_at_s: Unix time of the last good one; 0.0: none yet."""

    num_succeeded: int = 0
    num_failed: int = 0
    was_last_ok: bool = True
    succeeded_at_s: float = 0.0


class Reloader:
    """Takes questions on the event loop; `run` answers them."""

    def __init__(
        self,
        config: NodeConfig,
        reread: Callable[[], NodeConfig],
        apply: Callable[[NodeConfig, NodeConfig], Awaitable[list[str]]],
    ) -> None:
        """Begin with the configuration in force.

        Args:
            reread: reads and checks the configuration; called on another thread. Raises ShoalError
                or OSError.
            apply: goes from the first to the second, which differ in live settings alone, or not
                at all (a file of the artifact may have). Returns what changed beside settings.
                Raises as `reread` does, and then nothing has changed.
        """
        self.config = config
        self.figures = ReloadFigures()
        self._reread, self._apply = reread, apply
        self._wanted = asyncio.Event()
        self._waiting: list[asyncio.Future[Outcome]] = []
        self._is_closed = False

    def request(self) -> "asyncio.Future[Outcome]":
        """Ask for a reload; the future never fails."""
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._wanted.set()
        if self._is_closed:
            self._refuse()
        return answer

    async def run(self) -> None:
        """Serve questions until `close`; one that is under way is finished."""
        while not self._is_closed:
            await self._wanted.wait()
            self._wanted.clear()
            if self._is_closed:
                break
            waiting, self._waiting = self._waiting, []
            outcome = await self._reload()
            for answer in waiting:
                if not answer.done():  # its asker may be gone
                    answer.set_result(outcome)

    def close(self) -> None:
        """Let `run` return, and refuse whoever still asks."""
        self._is_closed = True
        self._wanted.set()
        self._refuse()

    def _refuse(self) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_result(Outcome(error="the node is leaving"))
        self._waiting = []

    async def _reload(self) -> Outcome:
        figures = self.figures
        try:
            wanted = await asyncio.to_thread(self._reread)
            new, changed, kept = _compare(self.config, wanted)
            changed += await self._apply(self.config, new)
        except Exception as error:  # noqa: BLE001  the top of a reload: none may end the node
            if not isinstance(error, ShoalError | OSError | MemoryError):
                _log.exception("bug")
            why = str(error) or type(error).__name__
            self.figures = replace(figures, num_failed=figures.num_failed + 1, was_last_ok=False)
            _log.error("reload refused: the old configuration stays in force", why=why)
            return Outcome(error=why)
        self.config = new
        self.figures = ReloadFigures(
            figures.num_succeeded + 1, figures.num_failed, True, datetime.now(UTC).timestamp()
        )
        _log.info("reloaded", changed=changed or "nothing")
        if kept:
            _log.warning("settings that need a new start are as they were", kept=kept)
        return Outcome(changed=tuple(changed), kept=tuple(kept))


def _compare(old: NodeConfig, wanted: NodeConfig) -> tuple[NodeConfig, list[str], list[str]]:
    # The configuration that can be in force now, and what differs: live settings, others.
    # Other certificates can be shown at any time. Whether to, and whether to ask for one, cannot.
    live = [*_LIVE, "tls"] if _is_same_tls(old.tls, wanted.tls) else [*_LIVE]
    at_start = [name for name in _AT_START if name not in live]
    changed = [_difference(old, wanted, name) for name in live if _differs(old, wanted, name)]
    kept = [_difference(old, wanted, name) for name in at_start if _differs(old, wanted, name)]
    new = replace(wanted, **{name: getattr(old, name) for name in at_start})
    return new, changed, kept


def _is_same_tls(old: ServerFiles | None, new: ServerFiles | None) -> bool:
    return old is not None and new is not None and old.is_mutual == new.is_mutual


def _differs(old: NodeConfig, new: NodeConfig, name: str) -> bool:
    return bool(getattr(old, name) != getattr(new, name))


def _difference(old: NodeConfig, new: NodeConfig, name: str) -> str:
    setting = (_LIVE | _AT_START)[name]
    return f"{setting}: {_shown(name, getattr(old, name))} -> {_shown(name, getattr(new, name))}"


def _shown(name: str, value: Any) -> str:
    match value:
        case None:
            return "default"
        case ListenAddress():
            return value.endpoint(value.port)
        case tuple():
            return "+".join(map(str, value)) or "none"
        case StrEnum() | Path() | ServerFiles():
            return str(value)
        case int() if name in _SIZES:
            return format_size(value)
        case _:
            return str(value)


assert {field.name for field in fields(NodeConfig)} == _LIVE.keys() | _AT_START.keys()
