"""Meeting nodes again: how soon, on a clock that is turned by hand, and at which address."""

import asyncio
import selectors
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from coordinator import node_keeper
from coordinator.dispatch_events import Lane, NodeAbsent, NodeOpened
from coordinator.fast_lane import FastLane
from coordinator.handshake import NodeFacts
from coordinator.node_keeper import NodeKeeper, OpenedLanes, Terms
from coordinator.node_link import (
    CONNECT_TIMEOUT_S,
    KEEPALIVE,
    Greeting,
    Keepalive,
    channel_options,
    silent,
)
from coordinator.tls import Trust
from shoal import errors, numerics
from shoal.shard_map import Endpoint, EndpointKind

ENDPOINT = Endpoint(EndpointKind.GRPC, "moving-node.test:4321")
FACTS = NodeFacts(
    protocol_version=1,
    shoal_version="",
    identity="",
    model_name="",
    numerics=numerics.NUMERICS,
    instance_epoch="a",
    owned=(),
    quantisation="",
    isa="",
    num_threads=1,
    max_rows_per_call=1,
    is_ready=True,
    is_draining=False,
)


class HandTurnedLoop(asyncio.SelectorEventLoop):
    """Its clock stands while something can be done, and jumps to when something will be."""

    def __init__(self) -> None:
        self.now_s = 0.0
        selector = selectors.SelectSelector()
        look = selector.select

        def select(timeout: float | None = None) -> Any:
            self.now_s += timeout or 0.0
            return look(0)

        selector.select = select  # type: ignore[method-assign]
        super().__init__(selector)

    def time(self) -> float:
        """Return the time of the clock."""
        return self.now_s


class Machine:
    """Where a node is looked for: it serves, refuses or is silent, and is met or not."""

    def __init__(self, loop: HandTurnedLoop) -> None:
        self.loop = loop
        self.state = "serves"
        self.opened_s: list[float] = []
        self.asked_s: list[float] = []
        self.links: list[Link] = []
        self.is_met = asyncio.Event()
        self.end: asyncio.Future[errors.NodeError | None] = loop.create_future()

    def link(self, endpoint: Endpoint, keepalive: Keepalive, trust: Trust | None) -> "Link":
        """Stand for NodeLink."""
        self.links.append(Link(self, endpoint))
        return self.links[-1]

    async def open_lanes(self, node: int, link: Any, first_epoch: int) -> OpenedLanes:
        return OpenedLanes(1, 0.0, False)

    def opened(self, event: NodeOpened) -> None:
        self.opened_s.append(self.loop.now_s)
        self.is_met.set()

    async def serve(self, node: int, link: Any) -> errors.NodeError | None:
        self.end = self.loop.create_future()
        return await self.end

    def absent(self, event: NodeAbsent) -> None:
        """Nobody calls."""

    def fail(self, state: str) -> None:
        """Lose the node; it cannot be met from now on."""
        self.state = state
        self.is_met.clear()
        self.end.set_result(errors.NodeUnreachable("lost"))


class Link:
    """Stands for NodeLink: who asked a silent machine is not answered by what comes after it."""

    def __init__(self, machine: Machine, endpoint: Endpoint) -> None:
        self._machine = machine
        self.endpoint, self.node, self.is_closed = endpoint, str(endpoint), False

    async def describe(self) -> NodeFacts:
        self._machine.asked_s.append(self._machine.loop.now_s)
        if self._machine.state == "refuses":
            raise errors.NodeUnreachable("refused")
        if self._machine.state == "is silent":
            await asyncio.sleep(CONNECT_TIMEOUT_S)
            raise silent(self.node)
        return FACTS

    async def close(self) -> None:
        self.is_closed = True


@contextmanager
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[HandTurnedLoop, Machine]]:
    """A keeper that has met its node, on a loop that has not gone on since."""
    with closing(HandTurnedLoop()) as loop:
        machine = Machine(loop)
        monkeypatch.setattr(node_keeper, "NodeLink", machine.link)
        keeper = NodeKeeper(machine, KEEPALIVE, lambda _: None)
        running = loop.create_task(keeper.run())
        terms = Terms(lambda _name, _facts: None, lambda _there: "", 1.0)
        loop.run_until_complete(keeper.meet([ENDPOINT], terms))
        yield loop, machine
        keeper.close()
        loop.run_until_complete(running)


@pytest.mark.parametrize("states", [["refuses"], ["is silent"], ["refuses", "is silent"]])
def test_a_restarted_node_is_met_within_two_seconds_however_long_it_was_gone(
    states: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves again at every moment of every pause and of every attempt."""
    worst_s = 0.0
    with met(monkeypatch) as (loop, machine):
        for gone_ms in range(5, 6000, 123):
            machine.fail(states[0])
            for state in states:
                machine.state = state
                loop.run_until_complete(asyncio.sleep(gone_ms / 1e3 / len(states)))
            machine.state, served_s = "serves", loop.now_s
            loop.run_until_complete(machine.is_met.wait())
            worst_s = max(worst_s, machine.opened_s[-1] - served_s)
    assert 0.9 < worst_s < 1.9
    assert len(machine.asked_s) < 49 * 8, "one attempt a second, when it has been gone for long"


def test_each_meeting_has_a_link_of_its_own_by_the_node_s_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A channel that goes on would go on with the address that it has."""
    with met(monkeypatch) as (loop, machine):
        for num_links in range(2, 5):
            machine.fail("serves")
            loop.run_until_complete(asyncio.sleep(0.001))
            assert len(machine.links) == num_links
            assert [link.is_closed for link in machine.links] == [True] * (num_links - 1) + [False]
    assert {link.endpoint for link in machine.links} == {ENDPOINT}
    options = [channel_options(KEEPALIVE) for _ in range(2)]
    assert options[0] != options[1], "gRPC would share one connection, and one resolver"
    assert ("grpc.use_local_subchannel_pool", 1) in options[0]


@dataclass(frozen=True)
class HangUp(Greeting):
    """A greeting during which the node hangs up: where it is, the lane has found."""

    home: socket.socket

    def open_frame(self, lane: Lane, stream_epoch: int) -> bytes:
        """Accept the connection and end it."""
        self.home.accept()[0].close()
        return super().open_frame(lane, stream_epoch)


def test_a_lane_of_the_fast_transport_asks_the_resolver_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve: Callable[..., Any] = socket.getaddrinfo
    names: list[str] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        homes = [first, second]

        def lead_astray(host: str, port: int, *rest: Any, **named: Any) -> Any:
            names.append(host)
            home = homes[len(names) - 1].getsockname()
            return resolve(home[0], home[1], *rest, **named)

        monkeypatch.setattr(socket, "getaddrinfo", lead_astray)
        for home in homes:
            lane = FastLane(ENDPOINT, Lane.INTERACTIVE)
            home.settimeout(30)

            with pytest.raises(errors.NodeError):
                lane.open(HangUp("", "", bytes(16), home), 0)
    assert names == ["moving-node.test"] * 2
