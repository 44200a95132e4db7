"""Expert nodes on a Ray cluster: where Ray runs them, and how to find and stop them. Needs [ray].

Ray places, restarts and replaces; tokens never pass through it. A node is a detached, named actor
that keeps one ordinary `shoal node` process as its child, so the node has its own signals, memory
and gRPC server, and coordinators talk to it directly. When the process ends, the actor ends itself,
and Ray starts both anew, on another machine if need be; when the actor is killed, the process sees
its standard input close and leaves.
"""

import logging
import os
import shlex
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.node_process import STOP_TIMEOUT_S, NodeProcess
from client.shards import moe_shards
from shoal.errors import NodeError, UsageError

NAMESPACE = "shoal"  # of the actors: they outlive the program that started them
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0  # of an actor that is alive; its methods return at once
RESTART_PAUSE_S = 1.0  # a node that cannot start is not tried in a tight loop
STRICT_SPREAD = "STRICT_SPREAD"  # Ray's: every node has a machine of its own
PLACE_TIMEOUT_S = 10.0  # a bundle that has not been placed by then has no machine
Ray = Any  # ray ships no complete types


@dataclass(frozen=True, slots=True)
class Fleet:
    """What to start. name: of the fleet in its Ray cluster; cpus: that Ray reserves for a node."""

    name: str
    model: str
    ranges: tuple[str, ...]
    base_port: int
    cpus: float
    strategy: str
    node_arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node as its actor tells it. endpoint: "" where nobody answered; then `problem` says why."""

    index: int
    experts: str
    endpoint: str = ""
    machine: str = ""
    pid: int = 0
    problem: str = ""


class NodeActor:
    """Runs on the machine that Ray chose; keeps one node process."""

    def __init__(
        self, index: int, experts: str, model: str, port: int, arguments: Sequence[str]
    ) -> None:
        """Start the node. Ray calls it again, with the same arguments, when it restarts us."""
        import ray

        self._index = index
        self._experts = experts
        self._machine = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        log_path = Path(tempfile.mkdtemp(prefix="shoal-ray-")) / "node.log"
        self._node = NodeProcess(
            f"node {index} (experts {experts}) on {self._machine}",
            [model, "--experts", experts, "--listen", f"{self._machine}:{port}", *arguments],
            log_path,
        )
        self._is_stopping = threading.Event()
        self._is_settled = threading.Event()  # it serves, or will not
        self._failure: NodeError | None = None
        threading.Thread(target=self._keep, daemon=True).start()

    def wait_ready(self, timeout_s: float) -> RayNode:
        """Return who it is once it serves. Raises NodeError with the end of its log."""
        if not self._is_settled.wait(timeout_s):
            raise NodeError(f"{self._node.name} is not ready after {timeout_s:g} s")
        if self._failure is not None:
            raise self._failure
        return self.describe()

    def describe(self) -> RayNode:
        """Return who it is now; its endpoint is empty until it serves."""
        node = self._node
        problem = "" if node.endpoint else "it is starting"
        return RayNode(self._index, self._experts, node.endpoint, self._machine, node.pid, problem)

    def stop(self) -> None:
        """Drain the node and wait for its end."""
        self._is_stopping.set()
        self._node.stop()

    def _keep(self) -> None:
        # Ray restarts an actor whose process ends, and so the node with it.
        try:
            self._node.wait_ready(float("inf"), self._is_stopping.is_set)
        except NodeError as error:
            self._failure = error
        self._is_settled.set()
        self._node.wait()
        if not self._is_stopping.wait(RESTART_PAUSE_S):
            os._exit(1)


@contextmanager
def connected(address: str) -> Iterator[Ray]:
    """Join a running Ray cluster while the block runs.

    Raises UsageError: the extra is not installed, or nothing answers at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError(
            "`shoal cluster` needs Ray, which is not installed: pip install 'shoal[ray]'"
        ) from None
    _check_reachable(address)
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _nobody_at(address, error) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    # Ray itself would try for minutes.
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise _nobody_at(address, error) from None


def _nobody_at(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"--address {address}: no Ray cluster answers there ({_first_line(error)}); start one with "
        "`ray start --head`, or give host:6379 or ray://host:10001"
    )


def start(ray: Ray, fleet: Fleet, ready_timeout_s: float) -> list[RayNode]:
    """Place and start every node; return them once all serve. Leaves nothing when one cannot.

    Raises:
        UsageError: a fleet of that name runs, or Ray has no room for it.
        NodeError: a node did not come up; its log's end is in the message.
    """
    if _actors(ray, fleet.name):
        raise UsageError(
            f"a fleet named {fleet.name!r} runs already: stop it with `shoal cluster down --name "
            f"{shlex.quote(fleet.name)}` or choose another --name"
        )
    group = _place(ray, fleet)
    try:
        actors = [
            _start_actor(ray, fleet, group, index, experts)
            for index, experts in enumerate(fleet.ranges)
        ]
        pending = [actor.wait_ready.remote(ready_timeout_s) for actor in actors]
        return list(ray.get(pending, timeout=ready_timeout_s + ANSWER_TIMEOUT_S))
    except BaseException as error:
        stop(ray, fleet.name)
        cause = getattr(error, "cause", None)  # of Ray's error: what the actor raised
        if isinstance(cause, NodeError):
            raise cause from None
        if isinstance(error, ray.exceptions.RayError):
            raise NodeError(f"the nodes did not come up: {_first_line(error)}") from None
        raise


def describe(ray: Ray, name: str) -> list[RayNode]:
    """Return the nodes of a fleet, those that do not answer included. Empty: no such fleet."""
    nodes = []
    for index, actor in _actors(ray, name).items():
        try:
            nodes.append(ray.get(actor.describe.remote(), timeout=ANSWER_TIMEOUT_S))
        except ray.exceptions.RayError as error:
            nodes.append(RayNode(index, "?", problem=_first_line(error)))
    return nodes


def shards_of(nodes: Sequence[RayNode]) -> str:
    """Return the --moe-shards that names these nodes."""
    return moe_shards([node.experts for node in nodes], [node.endpoint for node in nodes])


def stop(ray: Ray, name: str) -> int:
    """Drain and end every node of a fleet and give its place back; return how many there were."""
    actors = _actors(ray, name)
    draining = [actor.stop.remote() for actor in actors.values()]
    ray.wait(draining, num_returns=len(draining), timeout=2 * STOP_TIMEOUT_S) if draining else None
    for actor in actors.values():
        ray.kill(actor, no_restart=True)
    if group := _placement_group(ray, name):
        ray.util.remove_placement_group(group)
    return len(actors)


def _place(ray: Ray, fleet: Fleet) -> Any:
    machines = [node for node in ray.nodes() if node["Alive"]]
    if fleet.strategy == STRICT_SPREAD and len(machines) < len(fleet.ranges):
        raise _no_room(ray, fleet)  # nothing to wait for
    group = ray.util.placement_group(
        [{"CPU": fleet.cpus}] * len(fleet.ranges),
        strategy=fleet.strategy,
        name=_group_name(fleet.name),
        lifetime="detached",
    )
    if not group.wait(PLACE_TIMEOUT_S):
        ray.util.remove_placement_group(group)
        raise _no_room(ray, fleet)
    return group


def _no_room(ray: Ray, fleet: Fleet) -> UsageError:
    machines = [node for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources().get("CPU", 0)
    return UsageError(
        f"Ray has no room for {len(fleet.ranges)} nodes of {fleet.cpus:g} CPUs by "
        f"{fleet.strategy}: it has {len(machines)} machines and {free:g} free CPUs; ask for "
        "fewer --nodes or --cpus, add machines, or take --strategy spread or pack"
    )


def _start_actor(ray: Ray, fleet: Fleet, group: Any, index: int, experts: str) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    options = {
        "name": _actor_name(fleet.name, index),
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": fleet.cpus,
        "max_concurrency": 2,  # it answers while it waits for its node
        "scheduling_strategy": strategy,
    }
    actor = ray.remote(**options)(NodeActor)
    port = fleet.base_port + index
    return actor.remote(index, experts, fleet.model, port, fleet.node_arguments)


def _actors(ray: Ray, name: str) -> dict[int, Any]:
    prefix = _actor_name(name, "")
    named = ray.util.list_named_actors(all_namespaces=False)
    indices = sorted(int(found.removeprefix(prefix)) for found in named if _is_of(found, prefix))
    return {index: ray.get_actor(_actor_name(name, index)) for index in indices}


def _is_of(actor_name: str, prefix: str) -> bool:
    return actor_name.startswith(prefix) and actor_name.removeprefix(prefix).isdigit()


def _placement_group(ray: Ray, name: str) -> Any | None:
    try:
        return ray.util.get_placement_group(_group_name(name))
    except ValueError:  # there is none
        return None


def _actor_name(name: str, index: int | str) -> str:
    return f"{name}/node-{index}"


def _group_name(name: str) -> str:
    return f"{NAMESPACE}/{name}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
