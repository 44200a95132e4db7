"""Grouped-query attention with rotary positions over the paged KV cache.

Multi-head attention is the case of as many KV heads as heads. Llama, Mixtral, Qwen3-MoE and OLMoE
differ only in what `ModelSpec` says: biases, clipping, and where q and k are normed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.array_types import F32, I32
from coordinator.kv_arrays import KvPair
from coordinator.row_forms import RowForms
from coordinator.weights import AttentionWeights
from shoal import ops
from shoal.model_spec import AttentionSpec, QkNorm


@dataclass(frozen=True, slots=True)
class Places:
    """Where T rows stand: one per row of a forward pass, the same in every layer.

    cos, sin: [T, rotary_dim / 2] float32, of the rows' positions.
    slots, row_sequence, positions: [T] int32; block_tables: [S, M] int32. See `batch.Batch`.
    """

    cos: F32
    sin: F32
    slots: I32
    row_sequence: I32
    positions: I32
    block_tables: I32

    def take(self, index: NDArray[np.intp]) -> "Places":
        """Return the places of the rows at `index`."""
        return Places(
            cos=self.cos[index],
            sin=self.sin[index],
            slots=self.slots[index],
            row_sequence=self.row_sequence[index],
            positions=self.positions[index],
            block_tables=self.block_tables,
        )


class GroupedQueryAttention:
    """The attention of one layer. No state but weights."""

    def __init__(
        self, spec: AttentionSpec, norm_eps: float, window: int | None, weights: AttentionWeights
    ) -> None:
        self._spec = spec
        self._norm_eps = norm_eps
        self._window = window
        self._weights = weights

    def write_kv(self, forms: RowForms, places: Places, cache: KvPair) -> F32:
        """Write K and V of the rows [T, D] to their slots; return their q, [T, H * head_dim].

        All rows of a pass are written before any of them attends.

        Raises: NumericError with the rows that do not fit the cache's type.
        """
        spec, weights = self._spec, self._weights
        q, k, v = weights.qkv(forms)
        k_heads = self._clip(self._norm_heads(k, weights.k_norm, spec.num_kv_heads))
        ops.rope(k_heads, places.cos, places.sin)
        v_heads = self._clip(v).reshape(-1, spec.num_kv_heads, spec.head_dim)
        ops.kv_write(cache[0], cache[1], k_heads, v_heads, places.slots)
        return q

    def attend(self, q: F32, places: Places, cache: KvPair) -> F32:
        """Return the attention branch [T, D] of rows whose K and V are in the cache.

        Args:
            q: of `write_kv`, of all rows or of some; overwritten.

        Raises: NumericError with the rows that became non-finite.
        """
        spec, weights = self._spec, self._weights
        q_heads = self._clip(self._norm_heads(q, weights.q_norm, spec.num_heads))
        ops.rope(q_heads, places.cos, places.sin)
        mixed = ops.attention(
            q_heads,
            cache[0],
            cache[1],
            places.block_tables,
            places.row_sequence,
            places.positions,
            spec.scale,
            self._window,
        )
        flat = mixed.reshape(-1, spec.num_heads * spec.head_dim)
        return weights.o(ops.quantise_rows(weights.o.scheme, flat))

    def _clip(self, values: F32) -> F32:
        """Clip after the norm, as OLMoE does."""
        limit = self._spec.clip_qkv
        return values if limit is None else ops.clamp(values, limit, out=values)

    def _norm_heads(self, projected: F32, weight: F32 | None, num_heads: int) -> F32:
        heads = (-1, num_heads, self._spec.head_dim)
        if weight is None:
            return projected.reshape(heads)
        if self._spec.qk_norm is QkNorm.PROJECTION:
            return ops.rms_norm(projected, weight, self._norm_eps).reshape(heads)
        return ops.rms_norm(projected.reshape(heads), weight, self._norm_eps)
