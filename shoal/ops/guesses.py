"""The native side of shoal.experts.prefetch: what is computed at every call. Never a token."""

from shoal._kernels import (
    chain_bins,
    chain_learn,
    gate_bins,
    learn_experts,
    note_uses,
    rank_experts,
)

__all__ = [
    "chain_bins",
    "chain_learn",
    "gate_bins",
    "learn_experts",
    "note_uses",
    "rank_experts",
]
