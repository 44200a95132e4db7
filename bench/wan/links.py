"""The home link: a chaos proxy before each node, all in a process of their own.

    with Links(endpoints) as links:
        links.set(LinkSpeed(rtt_s=0.045))
        ... links.endpoints ...          # what the shard map names

`python -m bench.wan.links ENDPOINT...` is that process: endpoints as a JSON line to stdout, then a
weather a line from stdin, each answered by a line. It uses the proxy of the tests, from tests/.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from bench.line_process import LineProcess
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


class Links(LineProcess):
    """The process of the proxies."""

    def __init__(self, targets: list[str]) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-m", "bench.wan.links", *targets]
        super().__init__("the proxies", command, {**os.environ, "PYTHONPATH": path})
        self.endpoints: list[str] = self.answer()

    def set(self, speed: LinkSpeed) -> None:
        """Change the weather; it holds when this returns."""
        self.exchange(asdict(speed))


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
