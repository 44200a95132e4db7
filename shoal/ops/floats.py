"""Float work outside matrices: norms, adds, rope, routing, and attention over the paged KV cache.

Typed fronts of the native kernels; docs/numerics.md gives each one's exact sequence of operations.
Arrays must be C-contiguous and of the dtype stated: a wrong one is a TypeError or ValueError, never
a silent copy. Shape letters: T rows, H heads, d values of a head, r of them turned by rope.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal import _kernels
from shoal.errors import NumericError
from shoal.limits import KV_BLOCK_TOKENS
from shoal.model_spec import RouterKind
from shoal.quant import LANES
from shoal.router import RoutingPlan

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
KvArray = NDArray[np.float16] | NDArray[np.float32]


def rms_norm(x: F32, weight: F32, eps: float, out: F32 | None = None) -> F32:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Args:
        x: [..., D]; heads too: [T, H, d] with a weight [d].
        weight: [D].
        out: written and returned if given; may be x.
    """
    result = np.empty_like(x) if out is None else out
    _kernels.rms_norm(x, weight, eps, result)
    return result


def add(a: F32, b: F32, out: F32 | None = None) -> F32:
    """Return a + b, of one shape; `out` may be either."""
    result = np.empty_like(a) if out is None else out
    _kernels.add(a, b, result)
    return result


def clamp(x: F32, limit: float, out: F32 | None = None) -> F32:
    """Return x cut to [-limit, limit]; `out` may be x."""
    result = np.empty_like(x) if out is None else out
    _kernels.clamp(x, limit, result)
    return result


def rope_table(inv_freq: F32, positions: I32, attention_factor: float = 1.0) -> tuple[F32, F32]:
    """Return (cos, sin) [T, r/2] of float32(position) * inv_freq, times attention_factor.

    Raises:
        NumericError: an angle is beyond 2^23 or not a number; `rows` are those positions.
    """
    cos = np.empty((len(positions), len(inv_freq)), np.float32)
    sin = np.empty_like(cos)
    bad = _kernels.rope_table(inv_freq, positions, attention_factor, cos, sin)
    _refuse(bad, "a rope angle beyond 2^23 at position", [int(positions[t]) for t in bad])
    return cos, sin


def rope(x: F32, cos: F32, sin: F32) -> None:
    """Turn the first r values of each head of x [T, H, d] in place.

    Pairs are (i, i + r/2): rotate-half. cos and sin: [T, r/2] of `rope_table`.
    """
    _kernels.rope(x, cos, sin)


def route(kind: RouterKind, logits: F32, experts_per_token: int, renormalise: bool) -> RoutingPlan:
    """Pick each row's experts and their weights.

    Args:
        kind: SOFTMAX: softmax over all logits, the largest, ties to the lower index. ALL: every
            expert with weight 1; the values of logits do not matter, its shape does.
        logits: [T, E].
        renormalise: divide the chosen weights by their sum.

    Raises:
        NumericError: a logit is not finite; `rows` are those rows.
    """
    num_rows, num_experts = logits.shape
    if kind is RouterKind.ALL:
        experts = np.tile(np.arange(num_experts, dtype=np.int32), (num_rows, 1))
        return RoutingPlan(experts, np.ones((num_rows, num_experts), np.float32))
    experts = np.empty((num_rows, experts_per_token), np.int32)
    weights = np.empty((num_rows, experts_per_token), np.float32)
    bad = _kernels.route_softmax(logits, renormalise, experts, weights)
    _refuse(bad, "a router logit that is not finite in row", bad)
    return RoutingPlan(experts, weights)


class KvShape(NamedTuple):
    """Shapes of one layer's cache arrays: a key's lanes are 16 tokens, a value's its dimensions."""

    keys: tuple[int, int, int, int, int]
    values: tuple[int, int, int, int]


def kv_shape(num_blocks: int, num_kv_heads: int, head_dim: int) -> KvShape:
    """Return the shapes of a layer's keys and values; both arrays are float16 or float32."""
    return KvShape(
        (num_blocks, num_kv_heads, KV_BLOCK_TOKENS // LANES, head_dim, LANES),
        (num_blocks, num_kv_heads, KV_BLOCK_TOKENS, head_dim),
    )


def kv_write(k_cache: KvArray, v_cache: KvArray, k: F32, v: F32, slots: I32) -> None:
    """Round k and v to the cache's type and store them.

    Args:
        k_cache, v_cache: of `kv_shape`, both float16 or both float32.
        k, v: [T, KVH, d].
        slots: [T] block * 64 + offset, distinct.

    Raises:
        NumericError: a value is not finite, or overflows float16; `rows` are those rows. They are
            not written, the others are.
    """
    bad = _kernels.kv_write(k_cache, v_cache, k, v, slots)
    if bad:  # the dtype's name costs more than the write
        _refuse(bad, f"a key or value beyond {k_cache.dtype} in row", bad)


def attention(
    q: F32,
    k_cache: KvArray,
    v_cache: KvArray,
    block_tables: I32,
    row_sequence: I32,
    row_position: I32,
    scale: float,
    window: int | None,
) -> F32:
    """Return softmax(scale * q K) V of every row and head, [T, H, d].

    Row t sees the keys [max(0, p - window + 1), p] of its sequence, p its position: all of them
    must have been written. Exactness rule 6: the bits of a row depend on nothing but its q and
    those keys and values.

    Args:
        q: [T, H, d], H a multiple of the cache's KVH.
        block_tables: [S, M]: the block of tokens 64 m .. 64 m + 63 of sequence s. Entries that no
            row sees may hold anything.
        row_sequence, row_position: [T].
        window: keys a row sees, itself included; None: all.
    """
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1")
    out = np.empty_like(q)
    _kernels.attention(
        q, k_cache, v_cache, block_tables, row_sequence, row_position, scale, window or 0, out
    )
    return out


def _refuse(bad: list[int], what: str, named: list[int]) -> None:
    if bad:
        shown = ", ".join(map(str, named[:8])) + (", ..." if len(named) > 8 else "")
        raise NumericError(f"{what} {shown}", tuple(bad))
