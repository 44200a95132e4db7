"""How a node comes up and goes down: warm-up, readiness, signals, a bounded drain.

Drain, in order: health says NOT_SERVING, streams are told, new calls are refused, calls in flight
finish (or are answered DRAINING when time is up), streams end, the server stops. Exit status 0.
A second signal ends the process at once.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence

from shoal.errors import NodeDraining
from shoal.experts.store import ExpertStore, Key, WarmUpProgress
from shoal.log import get_logger
from shoal.sizes import format_size

WARM_UP_LOG_INTERVAL_S = 1.0
STOP_AGAIN_S = 0.1  # a warm-up that had not begun when it was told to stop
_log = get_logger("lifecycle")


class WarmUpStopped(Exception):
    """The node was told to leave while it warmed up."""


class Health:
    """grpc.health.v1 for the process ("") and the service."""

    def __init__(self) -> None:
        self.is_serving = False
        self.listeners: list[Callable[[bool], Awaitable[None]]] = []  # transports, from the start
        self.watchers: set[Callable[[], None]] = set()  # of the fast transport: told of changes

    async def set_serving(self, is_serving: bool) -> None:
        """Tell those who check or watch."""
        self.is_serving = is_serving
        for listener in self.listeners:
            await listener(is_serving)
        for watcher in list(self.watchers):
            watcher()


class StopSignal:
    """Set once, by a signal or a Drain call; carries the reason."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason = ""

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        """Ask the node to leave. The first reason stays."""
        if not self.is_set:
            self.reason = reason
            self._event.set()

    async def wait(self) -> None:
        await self._event.wait()

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let SIGTERM and SIGINT set it; the second one exits at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def install_reload(self, loop: asyncio.AbstractEventLoop, reload: Callable[[], object]) -> None:
        """Let SIGHUP call `reload`; if it came because the terminal is gone, leave instead."""
        had_terminal = os.isatty(0)

        def on_signal() -> None:
            if had_terminal and not os.isatty(0):
                self.set("the terminal is gone")
            else:
                reload()

        loop.add_signal_handler(signal.SIGHUP, on_signal)

    def install_on_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the end of standard input set it: whoever held its other end is gone."""

        def read() -> None:
            with contextlib.suppress(BlockingIOError):
                if os.read(0, 4096):
                    return
                loop.remove_reader(0)
                self.set("standard input closed")

        loop.add_reader(0, read)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.is_set:
            os._exit(128 + number)
        self.set(number.name)


async def warm_up(store: ExpertStore, stop: StopSignal, order: Sequence[Key] | None = None) -> None:
    """Read the owned experts that fit, logging how far it is.

    Args:
        order: which, the first first; None: layer by layer.

    Raises:
        WarmUpStopped: `stop` was set meanwhile.
        CorruptArtifact: an expert's bytes are wrong, and will be: the node does not start with such
            files. One that cannot be read may be read later: it is warned of, and left out.
    """
    last_s = time.monotonic()

    def report(progress: WarmUpProgress) -> None:
        nonlocal last_s
        if stop.is_set:
            raise WarmUpStopped
        is_last = progress.num_experts == progress.total_experts
        if is_last or time.monotonic() - last_s >= WARM_UP_LOG_INTERVAL_S:
            last_s = time.monotonic()
            _log.info(
                "warm-up",
                experts=f"{progress.num_experts}/{progress.total_experts}",
                size=f"{format_size(progress.num_bytes)} of {format_size(progress.total_bytes)}",
                per_s=format_size(int(progress.num_bytes / max(progress.elapsed_s, 1e-9))),
            )

    failure: Exception | None = None
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_abandon_when_told(store, stop))
        try:
            await asyncio.to_thread(store.warm_up, report, order)
        except Exception as error:  # noqa: BLE001  a TaskGroup would wrap it
            failure = error
        finally:
            watching.cancel()
    if failure is not None:
        raise failure
    for (layer, index), why in store.figures().unavailable:
        _log.warning("an expert could not be read", layer=layer, expert=index, why=why)


async def _abandon_when_told(store: ExpertStore, stop: StopSignal) -> None:
    # It may wait for a drive that does not answer; or it has not begun to wait.
    await stop.wait()
    while True:
        store.abandon_warm_up(WarmUpStopped())
        await asyncio.sleep(STOP_AGAIN_S)


def drained_too_late(drain_timeout_s: float) -> NodeDraining:
    """Return what the calls are told that a drain could not wait for."""
    return NodeDraining(f"the node left after waiting {drain_timeout_s:g} s for its calls")
