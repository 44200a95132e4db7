"""Composition root of `shoal node`: an event loop, a node on it, and what runs beside."""

import asyncio
import sys
from collections.abc import Callable

from expert_node.config import NodeConfig
from expert_node.node import STREAM_GRACE_S, Node, Ready
from shoal import limits
from shoal.allocator import keep_freed_memory
from shoal.errors import ShoalError

__all__ = ["Ready", "run"]


def run(
    config: NodeConfig,
    announce: Callable[[Ready], None],
    reread: Callable[[], NodeConfig] | None = None,
) -> None:
    """Serve until told to leave. Raises ShoalError where the node cannot start.

    Args:
        reread: what SIGHUP and Reload ask for the configuration; None: it stays as it is.
    """
    keep_freed_memory()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, announce, reread or (lambda: config)))


async def _serve(
    config: NodeConfig, announce: Callable[[Ready], None], reread: Callable[[], NodeConfig]
) -> None:
    node = await Node.start(config, reread, handle_signals=True)
    failure: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            try:
                if await node.make_ready():
                    announce(node.ready)
                    group.create_task(node.reloader.run())  # ends with `close`, not in the middle
                    tasks = [group.create_task(each) for each in node.background()]
                    await node.stop_signal.wait()
                    for task in tasks:
                        task.cancel()
            except (ShoalError, OSError, MemoryError) as error:
                failure = error  # a TaskGroup would wrap it
            node.reloader.close()
    finally:
        await node.stop()
    if failure is not None:
        raise failure


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


LONGEST_STOP_S = limits.DRAIN_TIMEOUT_S + STREAM_GRACE_S + limits.LAST_READS_S
assert LONGEST_STOP_S < 30, "Kubernetes kills 30 s after SIGTERM"
