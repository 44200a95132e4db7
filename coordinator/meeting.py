"""Meets the nodes before the first token: Describe, check, wait until each is ready, open it.

On the gRPC loop's thread, all nodes at once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from coordinator.handshake import NodeFacts
from coordinator.node_link import NodeLink
from shoal import errors

READY_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Meeting:
    """How to meet a node.

    check: raises what is wrong with a node. notify: told what is waited for, in a sentence.
    ready_timeout_s: how long a node may go on warming up. open_lanes: opens a node's streams.
    """

    check: Callable[[int, NodeFacts], None]
    notify: Callable[[str], None]
    ready_timeout_s: float
    open_lanes: Callable[[int], Awaitable[None]]

    async def meet_all(self, links: Sequence[NodeLink]) -> list[NodeFacts]:
        """Return what every node said of itself.

        Raises:
            NodeError: of the first node at fault; its message has a line for every such node.
        """
        meetings = [self._meet(node, link) for node, link in enumerate(links)]
        outcomes = await asyncio.gather(*meetings, return_exceptions=True)
        facts = [outcome for outcome in outcomes if isinstance(outcome, NodeFacts)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not failures:
            return facts
        for failure in failures:
            if not isinstance(failure, errors.ShoalError):
                raise failure
        if len(failures) == 1:
            raise failures[0]
        raise type(failures[0])("\n".join(map(str, failures))) from failures[0]

    async def _meet(self, node: int, link: NodeLink) -> NodeFacts:
        facts = await link.describe()
        self.check(node, facts)
        give_up_s = time.monotonic() + self.ready_timeout_s
        if not facts.is_ready:
            self.notify(f"node {link.node} is warming up: waiting up to {self.ready_timeout_s:g} s")
        while not facts.is_ready:
            if time.monotonic() > give_up_s:
                raise errors.NodeBusy(
                    f"node {link.node} is still warming up after {self.ready_timeout_s:g} s: try "
                    "again later, or start it without --warmup"
                )
            await asyncio.sleep(READY_POLL_S)
            facts = await link.describe()
        await self.open_lanes(node)
        return facts
