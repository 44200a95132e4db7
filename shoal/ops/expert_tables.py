"""A layer's experts in memory, called by number: one native call from a call's rows to its sums."""

from collections.abc import Mapping

from shoal._kernels import ExpertTable
from shoal.ops.matrices import U8, ExpertLayout

__all__ = ["ExpertTable", "expert_table"]


def expert_table(layout: ExpertLayout, weights: Mapping[int, U8]) -> ExpertTable:
    """Return a table of these experts; it keeps the arrays until it is withdrawn.

    `sums(scheme, dim, values, scales, row_offsets, experts, weights, grid, out)` takes the fields
    of an `ExpertCall` (and of its rows) and writes what `expert_sums` would have added to zeros;
    with row_offsets None, every row has as many pairs. It returns the rows that `expert_sums` would
    raise for, or None, having written nothing: the table was withdrawn, an expert is not in it, or
    the rows have another width or scheme. Any number of threads may call it.

    `withdraw(on_idle)`, once, before any of the arrays' memory is used for something else: True: no
    call is under way; False: on_idle() is called at the end of the last one, on its thread.

    Args:
        layout: of every expert.
        weights: expert -> its packed weights, layout.num_bytes, 64-byte aligned.
    """
    return ExpertTable(
        layout.dim,
        layout.ffn_dim,
        layout.gate_up,
        layout.down,
        list(weights),
        list(weights.values()),
    )
