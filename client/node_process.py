"""An expert node as a child process: start it, wait for its ready line, watch it, stop it."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from shoal.errors import NodeError

STOP_TIMEOUT_S = 8.0  # a node drains in less; then it is killed
LOG_TAIL_LINES = 8
POLL_S = 0.1
OWNED = ("--json-ready", "--leave-with-stdin")


class NodeProcess:
    """One `shoal node`. Its log goes to a file; its ready line is read here."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. `environment` is added to this process's own."""
        self.name = name
        self.log_path = log_path
        self.ready: dict[str, Any] = {}  # what it said once it served: expert_node.app.Ready
        self._line = b""
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "expert_node", *arguments, *OWNED],
                stdin=subprocess.PIPE,  # closes when this process ends, however it ends
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop it in order
            )

    @property
    def endpoint(self) -> str:
        """Where it listens, as --moe-shards writes it; "" until it serves."""
        return str(self.ready.get("endpoint", ""))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def wait_ready(self, timeout_s: float, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Return True once it serves; `ready` is set then. False: told to stop before that.

        Raises NodeError: it ended, or `timeout_s` have passed.
        """
        assert self._process.stdout is not None
        give_up_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not self._line.endswith(b"\n"):
                if is_stopping():
                    return False
                if time.monotonic() > give_up_s:
                    raise NodeError(
                        f"{self.name} is not ready after {timeout_s:g} s{self._log_tail()}"
                    )
                if selector.select(POLL_S):
                    self._read(self._process.stdout)
        self.ready = json.loads(self._line)
        return True

    def describe_exit(self) -> str:
        """Say how it ended, with the end of its log."""
        status = self.exit_status
        assert status is not None
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited ({status})"
        return f"{self.name} {how}{self._log_tail()}"

    def send(self, signal_number: int) -> None:
        """Send it a signal, unless it has ended."""
        self._process.send_signal(signal_number)

    def wait(self) -> None:
        """Return once it has ended."""
        self._process.wait()

    def stop(self) -> None:
        """Drain it, kill it if that takes too long, and reap it. Safe to call again."""
        if self.exit_status is None:
            self.send(signal.SIGTERM)
            self.send(signal.SIGCONT)  # a stopped process does not see SIGTERM
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, stdout: IO[bytes]) -> None:
        data = os.read(stdout.fileno(), 65536)
        if not data:
            self._process.wait()
            raise NodeError(self.describe_exit())
        self._line += data

    def _log_tail(self) -> str:
        lines = self.log_path.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:]
        return f"; the end of {self.log_path}:\n  " + "\n  ".join(lines) if lines else ""


def stop_all(nodes: Sequence[NodeProcess]) -> None:
    """Stop several nodes at once: they drain side by side."""
    for node in nodes:
        if node.exit_status is None:
            node.send(signal.SIGTERM)
    for node in nodes:
        node.stop()
