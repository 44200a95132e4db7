"""The home link: a chaos proxy before each node, all in a process of their own.

    with Links(endpoints) as links:
        links.set(LinkSpeed(rtt_s=0.045))
        ... links.endpoints ...          # what the shard map names

`python -m bench.wan.links ENDPOINT...` is that process: endpoints as a JSON line to stdout, then a
weather a line from stdin, each answered by a line. It uses the proxy of the tests, from tests/.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from bench.measure import ROOT

POLL_S = 0.2  # weather changes between measurements only, and a poll costs CPU
SETTLE_POLLS = 2
BITS = 8


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Of the coordinator's side: rtt_s there and back, half each way; no jitter, no loss.

    up_mbit, down_mbit: 10^6 bits a second, which all connections to all nodes share, first come,
        first served; None: without a limit.
    """

    rtt_s: float
    up_mbit: float | None = None
    down_mbit: float | None = None


class Links:
    """The process of the proxies."""

    def __init__(self, targets: list[str]) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.wan.links", *targets],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.endpoints: list[str] = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def set(self, speed: LinkSpeed) -> None:
        """Change the weather; it holds when this returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(speed)) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxies ended with {self._process.wait()}")
        return json.loads(line)


def main() -> None:
    """Carry bytes until stdin ends."""
    from support.chaos_proxy import ChaosProxy, Direction, Link, Weather, steady

    def weather(speed: LinkSpeed, mbit: float | None) -> Weather:
        bytes_per_s = None if mbit is None else mbit * 1e6 / BITS
        return Weather(delay_s=speed.rtt_s / 2, bytes_per_s=bytes_per_s)

    home = {direction: Link() for direction in Direction}
    with ExitStack() as stack:
        proxies = [
            stack.enter_context(ChaosProxy(target, poll_s=POLL_S, links=home))
            for target in sys.argv[1:]
        ]
        print(json.dumps([proxy.endpoint for proxy in proxies]), flush=True)
        for line in sys.stdin:
            speed = LinkSpeed(**json.loads(line))
            for proxy in proxies:
                proxy.forecast = steady(
                    weather(speed, speed.up_mbit), weather(speed, speed.down_mbit)
                )
            time.sleep(SETTLE_POLLS * POLL_S)
            print(json.dumps(True), flush=True)


if __name__ == "__main__":
    main()
