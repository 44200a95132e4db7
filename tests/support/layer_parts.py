"""Decoder layers of every kind in small, and what they must do: their ops one after the other.

`composed` is the oracle of the native layer: the order of operations of docs/numerics.md, a call of
`ops` each.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from shoal import ops
from shoal.limits import KV_BLOCK_TOKENS
from shoal.model_spec import AttentionSpec, QkNorm, RouterKind, RouterSpec
from shoal.quant import Format, Scheme
from shoal.router import RoutingPlan
from shoal.rows import Rows

F32 = NDArray[np.float32]
Kv = NDArray[np.float16] | NDArray[np.float32]
I32 = NDArray[np.int32]
EPS = 1e-5
CACHED = 70  # tokens of each sequence before the rows: two blocks


def values(seed: int, *shape: int) -> F32:
    drawn = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    assert np.unique(drawn).size > drawn.size // 2, "inputs are degenerate"
    return drawn


def matrix(seed: int, fmt: Format, rows: int, cols: int) -> ops.Matrix:
    """Return a random matrix whose products with normal rows are of order 1."""
    drawn = values(seed, rows, cols) * np.float32(cols**-0.5)
    match fmt:
        case Format.F32:
            source = drawn.view(np.uint8)
        case Format.F16:
            source = drawn.astype(np.float16).view(np.uint8)
        case Format.Q4_K:
            source = ops.quantise_q4_k(drawn)
        case _:
            source = ops.quantise_table(fmt, drawn)
    return ops.pack_matrix(fmt, source, rows, cols)


@dataclass(frozen=True)
class Parts:
    """What a layer is made of. ffn: a dense one; router None: the layer has that."""

    spec: AttentionSpec
    window: int | None
    norms: tuple[F32, F32]
    qkv: tuple[ops.Linear, ...]  # three
    o: ops.Linear
    q_norm: F32 | None
    k_norm: F32 | None
    router: RouterSpec | None
    gate: ops.Linear | None
    scheme: Scheme
    ffn: tuple[ops.ExpertLayout, NDArray[np.uint8]] | None

    @property
    def dim(self) -> int:
        return self.o.matrix.rows

    def attention(self, qkv: tuple[ops.Linear, ...]) -> ops.GroupedQuery:
        return ops.GroupedQuery(self.spec, EPS, self.window, qkv, self.o, self.q_norm, self.k_norm)

    def layer(self, qkv: tuple[ops.Linear, ...] | None = None) -> ops.RoutedLayer | ops.DenseLayer:
        """Return the native layer; qkv: stacked, perhaps."""
        attention = self.attention(qkv or self.qkv)
        if self.ffn is not None:
            return ops.DenseLayer(self.norms, attention, *self.ffn)
        assert self.router is not None
        return ops.RoutedLayer(self.norms, attention, self.router, self.gate, self.scheme)


@cache
def make_parts(
    formats: tuple[Format, Format, Format],
    *,
    heads: tuple[int, int, int] = (4, 2, 64),  # heads, KV heads, head dim
    qk_norm: QkNorm = QkNorm.NONE,
    clip: float | None = None,
    has_bias: bool = False,
    window: int | None = None,
    router: RouterKind | None = RouterKind.SOFTMAX,
    renormalise: bool = True,
    scheme: Scheme = Scheme.INT8_256,
) -> Parts:
    """Args: formats: of q, k and v; o has q's."""
    num_heads, num_kv_heads, head_dim = heads
    dim = 256 if head_dim == 64 else 72
    widths = [count * head_dim for count in (num_heads, num_kv_heads, num_kv_heads)]
    spec = AttentionSpec(
        num_heads, num_kv_heads, head_dim, qk_norm, has_bias, clip, head_dim**-0.5, has_bias
    )

    def linear(seed: int, fmt: Format, rows: int, cols: int) -> ops.Linear:
        bias = values(seed + 100, rows) if has_bias else None
        return ops.Linear(matrix(seed, fmt, rows, cols), bias)

    norm_widths = {
        QkNorm.NONE: None,
        QkNorm.HEAD: (head_dim, head_dim),
        QkNorm.PROJECTION: (widths[0], widths[1]),
    }[qk_norm]
    layout = ops.ExpertLayout(dim, 48, Format.Q4_0, Format.F16)
    shapes = ((48, dim), (48, dim), (dim, 48))
    up_down = (Format.Q4_0, Format.Q4_0, Format.F16)
    ffn = np.zeros(0, np.uint8)
    if router is None:
        ffn = ops.aligned_empty(layout.num_bytes)
        rng = [values(60 + i, *shape) * np.float32(0.2) for i, shape in enumerate(shapes)]
        sources = [
            drawn.astype(np.float16).view(np.uint8)
            if fmt is Format.F16
            else ops.quantise_table(fmt, drawn)
            for fmt, drawn in zip(up_down, rng, strict=True)
        ]
        gate, up, down = sources
        ops.pack_expert(layout, gate, up, down, ffn)
    return Parts(
        spec=spec,
        window=window,
        norms=(values(1, dim), values(2, dim)),
        qkv=tuple(
            linear(10 + i, fmt, rows, dim)
            for i, (fmt, rows) in enumerate(zip(formats, widths, strict=True))
        ),
        o=linear(20, formats[0], dim, widths[0]),
        q_norm=None if norm_widths is None else values(3, norm_widths[0]),
        k_norm=None if norm_widths is None else values(4, norm_widths[1]),
        router=None if router is None else RouterSpec(router, 8, 3, renormalise),
        gate=(ops.Linear(matrix(30, Format.F32, 8, dim)) if router is RouterKind.SOFTMAX else None),
        scheme=scheme,
        ffn=(layout, ffn) if router is None else None,
    )


@dataclass(frozen=True)
class World:
    """T rows of two sequences, each with CACHED tokens, and the cache of one layer."""

    hidden: F32
    branch: ops.Branch | None
    cos: F32
    sin: F32
    slots: I32
    row_sequence: I32
    positions: I32
    block_tables: I32
    keys: Kv
    values: Kv

    @property
    def cache(self) -> tuple[Kv, Kv]:
        return self.keys, self.values

    def places(self) -> ops.Places:
        rope = (self.cos, self.sin)
        return ops.Places(rope, self.slots, self.row_sequence, self.positions, self.block_tables)

    def with_own_cache(self) -> "World":
        return replace(self, keys=self.keys.copy(), values=self.values.copy())


def make_world(
    parts: Parts, num_rows: int, dtype: str, *, has_branch: bool = True, rotary: float = 1.0
) -> World:
    """Args: rotary: the share of a head's dimensions that rope turns."""
    kv_heads, head_dim = parts.spec.num_kv_heads, parts.spec.head_dim
    tables = np.array([[5, 0, 3], [1, 4, 2]], np.int32)
    k_shape, v_shape = ops.kv_shape(6, kv_heads, head_dim)
    keys, vs = np.full(k_shape, np.nan, dtype), np.full(v_shape, np.nan, dtype)
    before = np.arange(CACHED)
    for sequence, table in enumerate(tables):
        k, v = (values(40 + 2 * sequence + i, CACHED, kv_heads, head_dim) for i in range(2))
        ops.kv_write(keys, vs, k, v, slots_of(table, before))
    row_sequence = np.array([0] * (num_rows - num_rows // 3) + [1] * (num_rows // 3), np.int32)
    ahead = [np.arange(np.count_nonzero(row_sequence == each)) for each in (0, 1)]
    positions = (CACHED + np.concatenate(ahead)).astype(np.int32)
    slots = np.concatenate(
        [slots_of(table, CACHED + steps) for table, steps in zip(tables, ahead, strict=True)]
    )
    half = int(head_dim * rotary) // 2
    inv_freq = (np.float32(1) / np.arange(1, half + 1, dtype=np.float32)).astype(np.float32)
    cos, sin = ops.rope_table(inv_freq, positions)
    branch = values(51, num_rows, parts.dim) if has_branch else None
    hidden = values(50, num_rows, parts.dim)
    return World(hidden, branch, cos, sin, slots, row_sequence, positions, tables, keys, vs)


def slots_of(table: I32, positions: NDArray[np.intp]) -> I32:
    block = table[positions // KV_BLOCK_TOKENS]
    return (block * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS).astype(np.int32)


def composed(
    parts: Parts, world: World, going_on: NDArray[np.intp] | None
) -> tuple[F32, F32, Rows | None, RoutingPlan | None]:
    """Return residual; normed (a dense FFN: its branch); rows and plan for the experts.

    Raises: NumericError, its rows of those going on once these were taken.
    """
    assert not isinstance(world.branch, ops.Sums), "finish them first"
    hidden = world.hidden if world.branch is None else ops.add(world.hidden, world.branch)
    normed = ops.rms_norm(hidden, parts.norms[0], EPS)
    q, k, v = (_product(linear, normed) for linear in parts.qkv)
    heads = (-1, parts.spec.num_kv_heads, parts.spec.head_dim)
    k_heads = _turned(parts, k, parts.k_norm, heads, world.cos, world.sin)
    v_heads = _clipped(parts, v).reshape(heads)
    ops.kv_write(world.keys, world.values, k_heads, v_heads, world.slots)
    rows = np.arange(len(hidden)) if going_on is None else going_on
    heads = (-1, parts.spec.num_heads, parts.spec.head_dim)
    q_heads = _turned(parts, q[rows], parts.q_norm, heads, world.cos[rows], world.sin[rows])
    mixed = ops.attention(
        q_heads,
        world.keys,
        world.values,
        world.block_tables,
        world.row_sequence[rows],
        world.positions[rows],
        parts.spec.scale,
        parts.window,
    )
    residual = ops.add(hidden[rows], _product(parts.o, mixed.reshape(len(rows), -1)))
    normed = ops.rms_norm(residual, parts.norms[1], EPS)
    if parts.ffn is not None:
        layout, weights = parts.ffn
        quantised = ops.quantise_rows(layout.scheme, normed)
        return residual, ops.expert_ffn(layout, weights, quantised), None, None
    router = parts.router
    assert router is not None
    if parts.gate is None:
        logits = np.zeros((len(rows), router.num_experts), np.float32)
    else:
        logits = _product(parts.gate, normed)
    plan = ops.route(router.kind, logits, router.experts_per_token, router.renormalise)
    return residual, normed, ops.quantise_rows(parts.scheme, normed), plan


def _product(linear: ops.Linear, x: F32) -> F32:
    return ops.matmul(linear.matrix, ops.quantise_rows(linear.scheme, x), linear.bias)


def _clipped(parts: Parts, x: F32) -> F32:
    limit = parts.spec.clip_qkv
    return x if limit is None else ops.clamp(x, limit)


def _turned(
    parts: Parts, x: F32, norm: F32 | None, heads: tuple[int, int, int], cos: F32, sin: F32
) -> F32:
    """Norm, clip and rope, in that order."""
    if norm is not None and parts.spec.qk_norm is QkNorm.HEAD:
        x = ops.rms_norm(x.reshape(heads), norm, EPS)
    elif norm is not None:
        x = ops.rms_norm(x, norm, EPS)
    turned = _clipped(parts, x).reshape(heads).copy()
    ops.rope(turned, cos, sin)
    return turned
