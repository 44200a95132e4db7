"""Keeps every node met: Describe, check, wait until it is ready, open; and again after a loss.

On the gRPC loop's thread, each node in a task of its own. Each meeting is over fresh connections,
so that names are resolved anew and nothing of a broken one is left.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from coordinator.dispatch_events import NodeAbsent, NodeOpened
from coordinator.handshake import NodeFacts
from coordinator.node_link import Keepalive, NodeLink
from coordinator.tls import Trust
from shoal import errors
from shoal.shard_map import Endpoint

READY_POLL_S = 0.2
# A node is back within 2 s of being ready: an attempt begins MAX_PAUSE_S after the one before, or
# soon after that has given up a silent node, which takes CONNECT_TIMEOUT_S.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class OpenedLanes:
    """What opening a node's lanes brought. rtt_s: about one round trip.

    wants_hints: it reads experts ahead.
    """

    credit_bytes: int
    rtt_s: float
    wants_hints: bool


class LaneOpener(Protocol):
    """A transport, as the keeper sees it. All of it on the gRPC loop."""

    async def open_lanes(self, node: int, link: NodeLink, first_epoch: int) -> OpenedLanes:
        """Open both lanes. Raises NodeError."""
        ...

    def opened(self, event: NodeOpened) -> None:
        """Hear that a node is what it must be: it may be called from now on."""
        ...

    async def serve(self, node: int, link: NodeLink) -> errors.NodeError | None:
        """Carry frames until the node is lost, and say why; None: it was released."""
        ...

    def absent(self, event: NodeAbsent) -> None:
        """Hear that a node cannot be met for now."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """On which a node is taken. Replaced as a whole when the shard map is.

    check: raises what is wrong with a node. uncovered: names what none of some nodes can compute.
    ready_timeout_s: how long a node may go on warming up.
    """

    check: Callable[[str, NodeFacts], None]
    uncovered: Callable[[set[str]], str]
    ready_timeout_s: float


class NodeKeeper:
    """Meets nodes. A node is its index in `endpoints`, which grows and never shrinks.

    Args:
        keepalive: of gRPC's connections.
        notify: told in a sentence what is waited for, lost and back.
        trust: what nodes with TLS are met with.
    """

    def __init__(
        self,
        opener: LaneOpener,
        keepalive: Keepalive,
        notify: Callable[[str], None],
        trust: Trust | None = None,
    ) -> None:
        self.endpoints: list[Endpoint] = []
        self.names: list[str] = []
        self.facts: dict[int, NodeFacts] = {}  # of open nodes
        self.wants_hints: set[int] = set()  # as they said when they were opened
        self._opener = opener
        self._keepalive = keepalive
        self._notify = notify
        self._trust = trust
        self._terms: Terms | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._first: dict[int, errors.ShoalError | None] = {}  # how a first meeting went
        self._asked_s: dict[int, float] = {}  # when each was last asked who it is, by the loop
        self._warming: set[int] = set()
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._ready = asyncio.Event()

    async def run(self, *chores: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Be there until `close`; the chores run beside."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                tasks = [group.create_task(chore()) for chore in chores]
                self._ready.set()
                await self._closing.wait()
                for task in [*tasks, *self._tasks.values()]:
                    task.cancel()
        finally:
            self._ready.set()
            self._news.set()

    def close(self) -> None:
        """End `run`. Safe to call again."""
        self._closing.set()

    async def meet(self, endpoints: Sequence[Endpoint], terms: Terms) -> list[int]:
        """Meet the nodes at these endpoints that are new; return all their numbers.

        Raises:
            NodeError: a range would have no node: of the first one at fault; its message has a
                line for every such node. The terms are then what they were before.
        """
        await self._ready.wait()
        before, self._terms = self._terms, terms
        try:
            return await self._meet(endpoints, terms)
        except BaseException:
            if before is not None:
                self._terms = before
            raise

    async def _meet(self, endpoints: Sequence[Endpoint], terms: Terms) -> list[int]:
        for node, facts in self.facts.items():
            if self.endpoints[node] in endpoints:
                terms.check(self.names[node], facts)
        nodes = [self._number(endpoint) for endpoint in endpoints]
        await self._settled(nodes, terms)
        self._require_all(nodes, terms)
        return nodes

    def _number(self, endpoint: Endpoint) -> int:
        for node in self._tasks:
            if self.endpoints[node] == endpoint:
                return node
        assert self._group is not None
        node = len(self.endpoints)
        self.endpoints.append(endpoint)
        self.names.append(str(endpoint))
        self._tasks[node] = self._group.create_task(self._keep(node))
        return node

    def retire(self, nodes: Sequence[int]) -> None:
        """Stop meeting nodes that are lost; those that are open stay so until released."""
        for node in nodes:
            task = self._tasks.pop(node, None)
            if task is not None and node not in self.facts:
                task.cancel()

    async def _settled(self, nodes: Sequence[int], terms: Terms) -> None:
        """Return once it is known of each node whether it is there, or enough of them are."""
        while not self._closing.is_set():
            unknown = [n for n in nodes if n not in self.facts and n not in self._first]
            if all(node in self._warming for node in unknown):
                there = {self.names[node] for node in nodes if node in self.facts}
                if not unknown or not terms.uncovered(there):
                    return
            self._news.clear()
            await self._news.wait()

    def _require_all(self, nodes: Sequence[int], terms: Terms) -> None:
        there = {self.names[node] for node in nodes if node in self.facts}
        failures = [
            error
            for node in nodes
            if node not in self.facts and (error := self._first.get(node)) is not None
        ]
        if terms.uncovered(there):
            if not failures:
                raise errors.NodeUnreachable("the connections to the nodes are closed")
            if len(failures) == 1:
                raise failures[0]
            raise type(failures[0])("\n".join(map(str, failures))) from failures[0]
        for error in failures:
            self._notify(f"{error}; going on without it: other nodes have its experts")

    async def _keep(self, node: int) -> None:
        epoch, process, pause_s, told = 0, "", FIRST_PAUSE_S, ""
        while node in self._tasks:
            link = NodeLink(self.endpoints[node], self._keepalive, self._trust)
            try:
                facts = await self._describe(node, link)
                lanes = await self._opener.open_lanes(node, link, epoch)
                self.wants_hints.discard(node)
                if lanes.wants_hints:
                    self.wants_hints.add(node)
                opened_s = time.monotonic()
                is_same, process = facts.instance_epoch == process, facts.instance_epoch
                self._opener.opened(
                    NodeOpened(node, lanes.credit_bytes, lanes.rtt_s, is_same, opened_s)
                )
                if epoch or self._first.get(node) is not None:
                    self._notify(f"node {link.node} is back")
                epoch, pause_s = epoch + 2, FIRST_PAUSE_S
                why = await self._serve(node, link, facts)
                if why is None:
                    return
                self._notify(f"{why}; looking for it again")
            except errors.NodeError as error:
                is_first = node not in self._first
                self._tell_absent(node, error)
                is_wrong = isinstance(error, errors.NodeMismatch | errors.NodeUntrusted)
                if is_wrong and str(error) != told and not is_first:
                    told = str(error)
                    self._notify(told)
                passed_s = asyncio.get_running_loop().time() - self._asked_s[node]
                await asyncio.sleep(max(FIRST_PAUSE_S, pause_s - passed_s))
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
            finally:
                self._warming.discard(node)
                await link.close()

    async def _describe(self, node: int, link: NodeLink) -> NodeFacts:
        facts = await self._ask(node, link)
        terms = self._terms
        assert terms is not None
        terms.check(link.node, facts)
        if facts.is_ready:
            return facts
        self._warming.add(node)
        self._news.set()
        self._notify(f"node {link.node} is warming up: waiting up to {terms.ready_timeout_s:g} s")
        give_up_s = time.monotonic() + terms.ready_timeout_s
        while not facts.is_ready:
            if time.monotonic() > give_up_s:
                raise errors.NodeBusy(
                    f"node {link.node} is still warming up after {terms.ready_timeout_s:g} s: try "
                    "again later, or start it without --warmup"
                )
            await asyncio.sleep(READY_POLL_S)
            facts = await self._ask(node, link)
        return facts

    async def _ask(self, node: int, link: NodeLink) -> NodeFacts:
        self._asked_s[node] = asyncio.get_running_loop().time()
        return await link.describe()

    async def _serve(self, node: int, link: NodeLink, facts: NodeFacts) -> errors.NodeError | None:
        self.facts[node] = facts
        self._first.setdefault(node, None)
        self._news.set()
        try:
            return await self._opener.serve(node, link)
        finally:
            del self.facts[node]

    def _tell_absent(self, node: int, error: errors.NodeError) -> None:
        self._first.setdefault(node, error)
        self._opener.absent(NodeAbsent(node, error, time.monotonic()))
        self._news.set()
