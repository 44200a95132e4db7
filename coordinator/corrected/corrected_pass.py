"""Rows through the model in a few round trips, approximately: the stand-in's pass, then sweeps.

A layer's call leaves as soon as the layer's input is known, and is waited for where the next sweep
needs it: the wire and the nodes work while the pass goes on. A sweep takes a round trip or the time
of a pass in this process, whichever is longer.
"""

from coordinator.array_types import F32
from coordinator.batch import Batch
from coordinator.cancellation import Cancellation
from coordinator.corrected.experts import CorrectedExperts, WindowPass
from coordinator.kv_arrays import KvArrays
from coordinator.transformer import Transformer


class CorrectedPass:
    """Runs batches as `Transformer.forward` does, but approximately. Not thread-safe.

    The KV that it writes is approximate too: nothing exact may be computed from it.

    Args:
        transformer: the model with `experts` as its experts.
        num_sweeps: at least 1; one round trip each.
    """

    def __init__(
        self, transformer: Transformer, experts: CorrectedExperts, num_sweeps: int
    ) -> None:
        assert num_sweeps >= 1, num_sweeps
        self._transformer = transformer
        self._experts = experts
        self._num_sweeps = num_sweeps

    @property
    def num_round_trips(self) -> int:
        """So far."""
        return self._experts.num_round_trips

    def forward(self, batch: Batch, cache: KvArrays, cancellation: Cancellation) -> F32:
        """Run the rows, write their KV; return their logits [T, V].

        Args:
            batch: T rows, the logits of all of which are wanted.

        Raises: what Transformer.forward does.
        """
        assert batch.logit_rows.size == batch.num_rows, "every row goes through all layers"
        transformer, experts, num_rows = self._transformer, self._experts, batch.num_rows
        try:
            experts.begin(WindowPass(0, num_rows, is_sweep=False, asks=True))
            transformer.run_layers(batch, cache, cancellation)
            for left in reversed(range(self._num_sweeps)):
                experts.begin(WindowPass(0, num_rows, is_sweep=True, asks=left > 0))
                if left:
                    transformer.run_layers(batch, cache, cancellation)
            return transformer.forward(batch, cache, cancellation)
        except BaseException:
            experts.abandon()
            raise
