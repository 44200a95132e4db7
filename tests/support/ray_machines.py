"""A Ray cluster of two pretended machines of one CPU, until standard input closes. Prints where.

A program of its own (`running_machines` starts it): Ray's threads and daemons stay out of pytest.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.limits import MIB

QUICK_HEALTH_CHECKS = {  # Ray notices a dead machine in 2.5 s instead of 16
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
}
STOP_TIMEOUT_S = 60.0


@contextmanager
def running_machines() -> Iterator[str]:
    """Yield the address of the cluster."""
    process = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **QUICK_HEALTH_CHECKS},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"Ray did not start: exit status {process.wait()}"
        yield json.loads(line)["address"]
    finally:
        try:
            process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Start it, say where, and stop it when nobody listens any more."""
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 1, "object_store_memory": 80 * MIB, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    cluster.add_node(num_cpus=1, object_store_memory=80 * MIB)
    sys.stdout.write(json.dumps({"address": cluster.address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
