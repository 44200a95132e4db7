"""Next to no CPU for one process: by a cgroup's quota where one can be made, else by signals.

A hundredth: on a busy machine a tenth is what everybody has, and a fast CPU does much in a
fortieth.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from client.node_process import NodeProcess

QUOTA_US, PERIOD_US = 1000, 100_000  # v1 takes no smaller quota
ON_S, OFF_S = 0.001, 0.099
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@contextmanager
def throttled(node: NodeProcess) -> Iterator[str]:
    """Slow a node down for the `with` block; yields how: "cgroup" or "signals"."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_quota(node.pid))
            how = "cgroup"
        except OSError:
            stack.enter_context(_duty(node))
            how = "signals"
        yield how


@contextmanager
def _quota(pid: int) -> Iterator[None]:
    is_v1 = (V1 / "cpu.cfs_quota_us").exists()
    group = (V1 if is_v1 else V2) / f"shoal-test-{os.getpid()}"
    group.mkdir()
    try:
        if is_v1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US))
        else:
            (group / "cpu.max").write_text(f"{QUOTA_US} {PERIOD_US}")
        (group / "cgroup.procs").write_text(str(pid))
        try:
            yield
        finally:  # a group that is empty can be removed
            (group.parent / "cgroup.procs").write_text(str(pid))
    finally:
        group.rmdir()


@contextmanager
def _duty(node: NodeProcess) -> Iterator[None]:
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            node.send(signal.SIGSTOP)
            is_over.wait(OFF_S)
            node.send(signal.SIGCONT)
            is_over.wait(ON_S)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
