"""What every client can tell of the nodes that it keeps, however their frames travel."""

import threading

from coordinator.calls_in_flight import CallsInFlight
from coordinator.handshake import NodeFacts
from coordinator.node_health import NodeHealth
from coordinator.node_keeper import NodeKeeper


class KnownNodes:
    """The part of an ExpertClient that no transport changes."""

    def __init__(self, keeper: NodeKeeper, in_flight: CallsInFlight) -> None:
        self._keeper = keeper
        self._in_flight = in_flight
        self._next_id = 1
        self._ids_lock = threading.Lock()

    def facts(self, node: int) -> NodeFacts | None:
        """Return what a node says of itself; None: it is lost."""
        return self._keeper.facts.get(node)

    def health(self, node: int) -> NodeHealth | None:
        """Return what is known of a node's speed; None: it was never there."""
        return self._in_flight.health(node)

    def name(self, node: int) -> str:
        """Return a node's endpoint."""
        return self._keeper.names[node]

    def wants_hints(self, node: int) -> bool:
        """Return whether a node reads experts ahead."""
        return node in self._keeper.wants_hints

    def next_call_id(self, count: int = 1) -> int:
        """Return the first of as many ids in a row that no other call of this client has."""
        with self._ids_lock:
            first = self._next_id
            self._next_id += count
        return first
