"""Whole decoder layers, but for their routed experts: one native call each.

    residual and the branch still to be added to it -> add -> norm -> attention -> add -> norm
        -> the rows as the experts take them, and the experts of each (RoutedLayer)
        -> a dense FFN's branch (DenseLayer)

kernels/layer_decoder.h and the attention's file say what a layer does: the ops of `floats` and
`matrices` one after the other, with their bits. Another kind of attention is another class beside
GroupedQuery. Weights must not change once a layer was made of them; it keeps them alive.

Thread-safe but for the arrays that are handed in. Arrays as in `floats`. Shape letters: T rows, R
of them that go on, D model dim, A experts a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal import _kernels
from shoal.errors import NumericError
from shoal.model_spec import AttentionSpec, QkNorm, RouterKind, RouterSpec
from shoal.ops.combine import I64, Sums, finish_sums
from shoal.ops.floats import F32, I32, KvArray, add, route
from shoal.ops.matrices import U8, ExpertLayout, Matrix
from shoal.quant import Scheme, round_up
from shoal.router import RoutingPlan
from shoal.rows import Rows

Index = NDArray[np.intp]
Branch = F32 | Sums  # [T, D]: what is still to be added to a residual

# By `Stop` of kernels/layer_rows.h.
_STOPS = (
    "a value that is not finite",
    "a key or value beyond {dtype}",
    "a router logit that is not finite",
    "an FFN output that is not finite",
    "an expert output that is not finite or beyond 2^44 quanta",
)


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix and what its products begin with; bias: [matrix.rows] or None."""

    matrix: Matrix
    bias: F32 | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme of the rows that it multiplies."""
        return self.matrix.scheme


class GroupedQuery:
    """Grouped-query attention with rotary positions over the paged KV cache.

    Multi-head attention is the case of as many KV heads as heads. Llama, Mixtral, Qwen3-MoE and
    OLMoE differ only in what the spec says: biases, clipping, and where q and k are normed.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        norm_eps: float,
        window: int | None,
        qkv: tuple[Linear, ...],
        o: Linear,
        q_norm: F32 | None,
        k_norm: F32 | None,
    ) -> None:
        """Args:
        window: keys a row sees, itself included; None: all.
        qkv: q, k and v; or one, their rows on top of each other, each whole row groups.
        q_norm, k_norm: [head_dim], or with QkNorm.PROJECTION of a whole projection's width.
        """
        if window is not None and window < 1:
            raise ValueError(f"window = {window}: must be at least 1")
        self.native = _kernels.GroupedQuery(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.scale,
            window=window or 0,
            clip=spec.clip_qkv or 0.0,
            norm_eps=norm_eps,
            norms_heads=spec.qk_norm is QkNorm.HEAD,
            q_norm=q_norm,
            k_norm=k_norm,
            qkv=[_native(linear) for linear in qkv],
            o=_native(o),
        )


class Places:
    """Where T rows stand: the same in every layer of a pass."""

    def __init__(
        self,
        rope: tuple[F32, F32],
        slots: I32,
        row_sequence: I32,
        positions: I32,
        block_tables: I32,
    ) -> None:
        """Args:
        rope: cos and sin of the rows' positions, of `rope_table`.
        slots: [T]: where K and V are written, see `kv_write`.
        row_sequence, positions: [T]; block_tables: [S, M]; see `attention`.
        """
        self.num_rows = len(slots)
        self.native = _kernels.Places(*rope, slots, row_sequence, positions, block_tables)


class Routed(NamedTuple):
    """What experts are asked.

    residual: [R, D]; normed: [R, D], what the experts take, and `rows` in their scheme; plan: of R
    rows.
    """

    residual: F32
    normed: F32
    rows: Rows
    plan: RoutingPlan


class RoutedLayer:
    """A decoder layer up to its experts."""

    def __init__(
        self,
        norms: tuple[F32, F32],
        attention: GroupedQuery,
        router: RouterSpec,
        gate: Linear | None,
        scheme: Scheme,
    ) -> None:
        """Args:
        norms: [D] each: the attention's weight and the FFN's; their epsilon is the attention's.
        gate: [E, D] float32; None for RouterKind.ALL alone.
        scheme: of the experts.
        """
        if (gate is None) != (router.kind is RouterKind.ALL):
            raise ValueError(f"a router of kind {router.kind.value} with the gate {gate}")
        # What each of some fifty calls a token would ask for again.
        self._router = router
        self._is_everyone = gate is None
        self._scheme = scheme
        self._num_quants = round_up(len(norms[0]), scheme.span)
        self._num_scales = self._num_quants // scheme.span
        self._last_plan: RoutingPlan | None = None
        self._blank: Rows | None = None
        self.native = _kernels.DecoderLayer(
            attention_norm=norms[0],
            attention=attention.native,
            ffn_norm=norms[1],
            gate=None if gate is None else _native(gate),
            experts_per_token=router.experts_per_token,
            renormalise=router.renormalise,
            scheme=scheme,
            ffn=None,
        )

    @property
    def num_experts(self) -> int:
        """Experts that its router chooses from."""
        return self._router.num_experts

    @property
    def experts_per_row(self) -> int:
        """Experts that a row visits."""
        router = self._router
        return router.num_experts if self._is_everyone else router.experts_per_token

    def blank_row(self, dim: int) -> Rows:
        """Return a row of the form that the experts take; its values say nothing."""
        if self._blank is None:
            size = max(4 * dim, self._num_quants)
            scales = np.zeros(max(1, self._num_scales), np.float32)
            self._blank = self.rows_of(dim, np.zeros(size, np.uint8), scales)
        return self._blank

    def rows_of(self, dim: int, values: U8, scales: F32) -> Rows:
        """Return the row that native code left in this memory, as the experts take it."""
        if self._scheme is Scheme.F32:
            floats = values[: 4 * dim].view(np.float32)[None]
            return Rows(Scheme.F32, dim, floats, np.empty((1, 0), np.float32))
        quants = values.view(np.int8)[None, : self._num_quants]
        return Rows(self._scheme, dim, quants, scales[None, : self._num_scales])

    def run(
        self,
        hidden: F32,
        branch: Branch | None,
        places: Places,
        cache: tuple[KvArray, KvArray],
        going_on: Index | None,
    ) -> Routed:
        """Write the rows' K and V, attend, and route.

        Args:
            hidden: [T, D], the residual; kept as it is.
            branch: to be added to it first; None: nothing.
            cache: K and V of this layer, see `kv_shape`.
            going_on: [R] ascending: the rows that do more than write their K and V; None: all.

        Raises:
            NumericError: its rows are rows of `hidden`. Slots of the others may be written.
        """
        num_rows = places.num_rows if going_on is None else len(going_on)
        dim = hidden.shape[1]
        residual = np.empty((num_rows, dim), np.float32)
        normed = np.empty((num_rows, dim), np.float32)
        quants = scales = None
        if self._scheme is not Scheme.F32:
            quants = np.empty((num_rows, self._num_quants), np.int8)
            scales = np.empty((num_rows, self._num_scales), np.float32)
        plan = self._empty_plan(num_rows)
        experts, weights = (None, None) if self._is_everyone else (plan.experts, plan.weights)
        stopped = _kernels.run_layer(
            self.native,
            hidden,
            *split_branch(branch),
            places.native,
            cache[0],
            cache[1],
            going_on,
            residual,
            normed,
            quants,
            scales,
            experts,
            weights,
            None,
        )
        if stopped is not None:
            raise numeric_error(*stopped, cache)
        if quants is None or scales is None:
            rows = Rows(Scheme.F32, dim, normed, np.empty((num_rows, 0), np.float32))
        else:
            rows = Rows(self._scheme, dim, quants, scales)
        return Routed(residual, normed, rows, plan)

    def _empty_plan(self, num_rows: int) -> RoutingPlan:
        """Return a plan to be filled in; that of RouterKind.ALL is what it is."""
        if not self._is_everyone:
            shape = (num_rows, self._router.experts_per_token)
            return RoutingPlan(np.empty(shape, np.int32), np.empty(shape, np.float32))
        # It depends on nothing but the number of rows, which is 1 for most of a request.
        plan = self._last_plan
        if plan is None or plan.experts.shape[0] != num_rows:
            router = self._router
            nothing = np.empty((num_rows, router.num_experts), np.float32)
            plan = route(router.kind, nothing, router.experts_per_token, router.renormalise)
            self._last_plan = plan
        return plan


class DenseLayer:
    """A whole decoder layer, whose FFN is one."""

    def __init__(
        self,
        norms: tuple[F32, F32],
        attention: GroupedQuery,
        layout: ExpertLayout,
        weights: U8,
    ) -> None:
        """Args: norms: see RoutedLayer. layout, weights: the FFN, as one expert."""
        ffn = _kernels.DenseFfn(
            layout.dim, layout.ffn_dim, layout.gate_up, layout.down, weights=weights
        )
        self._native = _kernels.DecoderLayer(
            attention_norm=norms[0],
            attention=attention.native,
            ffn_norm=norms[1],
            gate=None,
            experts_per_token=0,
            renormalise=False,
            scheme=Scheme.F32,
            ffn=ffn,
        )

    def run(
        self,
        hidden: F32,
        branch: Branch | None,
        places: Places,
        cache: tuple[KvArray, KvArray],
        going_on: Index | None,
    ) -> tuple[F32, F32]:
        """Return the residual and the FFN's branch, which is still to be added to it: [R, D].

        Arguments and errors as `RoutedLayer.run`.
        """
        num_rows = places.num_rows if going_on is None else len(going_on)
        residual = np.empty((num_rows, hidden.shape[1]), np.float32)
        normed, ffn = np.empty_like(residual), np.empty_like(residual)
        stopped = _kernels.run_layer(
            self._native,
            hidden,
            *split_branch(branch),
            places.native,
            cache[0],
            cache[1],
            going_on,
            residual,
            normed,
            None,
            None,
            None,
            None,
            ffn,
        )
        if stopped is not None:
            raise numeric_error(*stopped, cache)
        return residual, ffn


def add_branch(hidden: F32, branch: Branch) -> F32:
    """Return hidden + branch, as a layer adds it."""
    if isinstance(branch, Sums):
        branch = finish_sums(branch.values, branch.grid)
    return add(hidden, branch)


def split_branch(branch: Branch | None) -> tuple[F32 | None, I64 | None, int]:
    """Return a branch as native calls take it: floats, or sums and their grid."""
    if isinstance(branch, Sums):
        return None, branch.values, branch.grid
    return branch, None, 0


def _native(linear: Linear) -> _kernels.Linear:
    matrix = linear.matrix
    return _kernels.Linear(matrix.format, matrix.rows, matrix.cols, matrix.data, linear.bias)


def numeric_error(stop: int, rows: list[int], cache: tuple[KvArray, KvArray]) -> NumericError:
    """Return the error of a native layer that stopped."""
    what = _STOPS[stop].format(dtype=cache[0].dtype)
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return NumericError(f"{what} in row {shown}", tuple(rows))
