"""A coordinator in a process of its own, which asks nodes for sums: one row a line of stdin.

python -m support.asking ARTIFACT SHARDS

Both transports are open all the while. Prints "open", then for each line N of stdin the digests
of the sums of row N in layer 0 that they brought, in one line.
"""

import hashlib
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from coordinator.expert_dispatch import ExpertDispatch
from coordinator.remote_dispatch import open_remote_dispatch
from shoal import ops
from shoal.artifact import Artifact
from shoal.router import RoutingPlan
from shoal.transport import Transport

SHARD_WAIT_S = 120.0


def sums_of_row(
    dispatch: ExpertDispatch, artifact: Artifact, number: int, num_rows: int = 1
) -> bytes:
    """Return the digest of what all experts of layer 0 make of a row with that number.

    Args:
        num_rows: so many copies of it: more work.
    """
    x = np.linspace(-1, number, artifact.spec.model_dim, dtype=np.float32)[None].repeat(num_rows, 0)
    experts = np.arange(16, dtype=np.int32)[None].repeat(num_rows, 0)
    plan = RoutingPlan(experts, np.full(experts.shape, 0.1, np.float32))
    sums = dispatch.start(0, ops.quantise_rows(artifact.scheme(0), x), plan).wait()
    return hashlib.sha256(sums.tobytes()).hexdigest().encode()


def main() -> None:
    """Ask until stdin ends."""
    artifact = Artifact.open(Path(sys.argv[1]))
    with ExitStack() as stack:
        dispatches = [
            stack.enter_context(
                closing(
                    open_remote_dispatch(
                        artifact, sys.argv[2], shard_wait_s=SHARD_WAIT_S, transport=transport
                    )
                )
            )
            for transport in (Transport.FAST, Transport.GRPCIO)
        ]
        sys.stdout.write("open\n")
        sys.stdout.flush()
        for line in sys.stdin:
            digests = [sums_of_row(one, artifact, int(line)).decode() for one in dispatches]
            sys.stdout.write(" ".join(digests) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
