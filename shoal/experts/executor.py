"""ExpertExecutor: what a layer's experts make of a call's rows, as exact integer sums.

The same object serves a node and the coordinator's own process (`local`), so both run one code.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal import errors, ops
from shoal.experts.call import ExpertCall
from shoal.experts.grouping import GroupedPairs, group_pairs
from shoal.experts.prefetch.interface import Prefetcher
from shoal.experts.store import Acquisition, ExpertLender
from shoal.model_spec import ModelSpec
from shoal.ops.frames import CallView
from shoal.quant import Scheme
from shoal.router import RoutingPlan
from shoal.rows import Rows


class ExpertModel(Protocol):
    """What an executor asks of an artifact."""

    @property
    def spec(self) -> ModelSpec: ...
    def scheme(self, layer: int) -> Scheme: ...
    def expert_layout(self, layer: int) -> ops.ExpertLayout: ...
    def grid(self, layer: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Computed:
    """sums: [T, D] int64; load_s: seconds spent waiting for experts to be read."""

    sums: NDArray[np.int64]
    load_s: float


@dataclass(frozen=True, slots=True)
class _LayerFacts:
    layout: ops.ExpertLayout
    scheme: Scheme
    grid: int
    num_experts: int


class ExpertExecutor:
    """Computes expert calls with the experts that a store gives out. Thread-safe.

    One call at a time uses all threads of the kernels' pool; a second concurrent one runs alone on
    its caller's thread, with the same bits.
    """

    def __init__(
        self,
        model: ExpertModel,
        store: ExpertLender,
        *,
        prefetcher: Prefetcher | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args: prefetcher: told of every call; clock: whose time it is told."""
        self._store = store
        self._tables = store.tables
        self._prefetcher = prefetcher
        self._clock = clock
        self._dim = model.spec.model_dim
        self._layers = {
            index: _LayerFacts(
                model.expert_layout(index),
                model.scheme(index),
                model.grid(index),
                layer.router.num_experts,
            )
            for index, layer in enumerate(model.spec.layers)
            if layer.router is not None
        }

    @property
    def store(self) -> ExpertLender:
        return self._store

    def close(self) -> None:
        """Close prefetcher and store. No call may be under way."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._store.close()

    def use_prefetcher(self, prefetcher: Prefetcher | None) -> None:
        """Tell another one of the calls from now on; it may hear of the end of older calls."""
        self._prefetcher = prefetcher

    @property
    def wants_hints(self) -> bool:
        """Whether it reads ahead: else `hint` does nothing."""
        return self._prefetcher is not None

    def hint(self, layer: int, experts: Sequence[int], stream: int = 0) -> None:
        """Hear which experts a stream's next call of a layer will likely need. Never waits.

        Some may not be owned.
        """
        prefetcher = self._prefetcher
        if prefetcher is not None and layer in self._layers:
            owned = set(self._store.ownership.experts(layer))
            mine = [expert for expert in experts if expert in owned]
            if mine:
                prefetcher.on_hint(layer, mine, self._clock(), stream)

    def grid(self, layer: int) -> int:
        """Return g of that layer's sums: an integer stands for itself times 2^-g."""
        return self._layers[layer].grid

    def check(self, call: ExpertCall) -> None:
        """Refuse a call that does not fit the model.

        Raises:
            MalformedMessage: naming the field.
            NotOwned: naming the experts that the store does not own.
        """
        facts = self._layers.get(call.layer)
        if facts is None:
            raise errors.MalformedMessage(f"layer {call.layer}: the model has no experts there")
        rows = call.rows
        if rows.dim != self._dim:
            raise errors.MalformedMessage(f"dim = {rows.dim}: the model's is {self._dim}")
        if rows.scheme is not facts.scheme:
            raise errors.MalformedMessage(
                f"scheme {rows.scheme.name}: layer {call.layer} takes {facts.scheme.name}"
            )
        experts = call.experts.tolist()
        highest = max(experts)
        if highest >= facts.num_experts:
            raise errors.MalformedMessage(
                f"expert {highest}: layer {call.layer} has 0-{facts.num_experts - 1}"
            )
        self._store.ownership.check(call.layer, experts)

    def pair_bytes(self, call: ExpertCall) -> int:
        """Return an upper bound of the weight bytes that computing a checked call walks over."""
        return int(call.experts.size) * self._layers[call.layer].layout.num_bytes

    def is_resident(self, call: ExpertCall) -> bool:
        """Whether computing a checked call now would not wait for a read."""
        return self._store.is_resident(call.layer, call.experts.tolist())

    def compute_resident(self, call: ExpertCall) -> Computed | None:
        """Check and compute a call if that takes no read and nobody has to be told of it.

        The quickest way where it is open. None: the call is right and nothing was done: go the long
        way, `open` or `try_open`.

        Raises:
            MalformedMessage, NotOwned: as `check`.
            NumericError: as `compute`.
        """
        sums = self._table_sums(call.layer, call.rows, call.row_offsets, call.experts, call.weights)
        if sums is None:
            self.check(call)
            return None
        return Computed(sums, 0.0)

    def answer_resident(self, call: CallView, max_weight_bytes: int, queue_us: int) -> bytes | None:
        """Return the frame of a call's reply if that takes no read and nobody has to be told of it.

        From the bytes of a call to those of its reply in one native step. None: nothing was done;
        the call walks over more weights than that, must be told of, or may not even be right.

        Raises:
            NumericError: as `compute`.
        """
        layer = call.layer
        table = self._tables.get(layer)
        if table is None or self._prefetcher is not None:
            return None
        answer = table.answer(call, self._layers[layer].grid, max_weight_bytes, queue_us)
        if isinstance(answer, list):
            raise _numeric_error(layer, answer)
        return answer

    def resident(self, layers: range) -> list[ops.ResidentExperts]:
        """Return the experts of the first of these layers: those that are whole in memory.

        None where somebody has to be told of calls.
        """
        lent: list[ops.ResidentExperts] = []
        for layer in layers if self._prefetcher is None else ():
            table = self._tables.get(layer)
            if table is None:
                break
            lent.append(ops.ResidentExperts(table, self._layers[layer].grid))
        return lent

    def resident_layers(self) -> list[tuple[int, ops.ExpertTable, int]]:
        """Return (layer, table, grid) of the layers that `answer_resident` answers for."""
        if self._prefetcher is not None:
            return []
        tables = dict(self._tables)
        return [(layer, table, self._layers[layer].grid) for layer, table in tables.items()]

    def open(self, call: ExpertCall, stream: int = 0) -> "OpenCall":
        """Hold a checked call's experts that are in memory, and start to read the others.

        Never waits. Compute it (or close it) soon: what it holds is not evicted.

        Args:
            stream: whose call it is; a prefetcher tells streams apart.

        Raises:
            NotOwned: an expert that the store does not own. There are no zeros in its place.
        """
        grouped = group_pairs(call)
        return self._opened(call, grouped, self._store.acquire(call.layer, grouped.experts), stream)

    def try_open(self, call: ExpertCall, stream: int = 0) -> "OpenCall | None":
        """Like `open`, if all its experts are in memory; else do nothing and return None."""
        grouped = group_pairs(call)
        acquisition = self._store.try_acquire(call.layer, grouped.experts)
        if acquisition is None:
            return None
        return self._opened(call, grouped, acquisition, stream)

    def compute(self, call: ExpertCall) -> NDArray[np.int64]:
        """Return [T, D]: per row, the sum over its pairs of rne(weight * expert(row) * 2^grid).

        Raises:
            NotOwned: as `open`.
            NumericError: naming layer and rows that are not finite or beyond the grid.
            CorruptArtifact, ExpertUnavailable: an expert could not be read.
        """
        sums = self._table_sums(call.layer, call.rows, call.row_offsets, call.experts, call.weights)
        return self.open(call).compute().sums if sums is None else sums

    def compute_plan(self, layer: int, rows: Rows, plan: RoutingPlan) -> NDArray[np.int64] | None:
        """Return what `compute` does if that takes no read; None as `compute_resident`.

        For the coordinator's own rows: the plan is trusted, and nothing is made of it on the way.

        Raises: NumericError: as `compute`.
        """
        return self._table_sums(layer, rows, None, plan.experts, plan.weights)

    def _table_sums(
        self,
        layer: int,
        rows: Rows,
        row_offsets: NDArray[np.int32] | None,
        experts: NDArray[np.int32],
        weights: NDArray[np.float32],
    ) -> NDArray[np.int64] | None:
        # A prefetcher hears of every call.
        table = self._tables.get(layer)
        if table is None or self._prefetcher is not None:
            return None
        sums = np.empty((rows.values.shape[0], self._dim), np.int64)
        bad_rows = table.sums(
            rows.scheme,
            rows.dim,
            rows.values,
            rows.scales,
            row_offsets,
            experts,
            weights,
            self._layers[layer].grid,
            sums,
        )
        if bad_rows:
            raise _numeric_error(layer, bad_rows)
        return None if bad_rows is None else sums

    def _opened(
        self, call: ExpertCall, grouped: GroupedPairs, acquisition: Acquisition, stream: int
    ) -> "OpenCall":
        if self._prefetcher is not None:
            self._prefetcher.on_call(call, grouped.experts, self._clock(), stream)
        return OpenCall(self, call, grouped, acquisition, stream)

    def compute_opened(
        self, call: ExpertCall, grouped: GroupedPairs, acquisition: Acquisition, stream: int
    ) -> Computed:
        """See `OpenCall.compute`."""
        facts = self._layers[call.layer]
        sums = np.zeros((call.rows.num_rows, self._dim), np.int64)
        bad_rows: set[int] = set()
        num_missing = len(grouped.experts)
        with acquisition:
            for wave in acquisition:
                num_missing -= len(wave.positions)
                if num_missing == 0 and self._prefetcher is not None:
                    self._prefetcher.on_loaded(call.layer, self._clock(), stream)
                # Integers are added, so the order in which experts come does not show.
                pairs = grouped.take(wave.positions)
                try:
                    ops.expert_sums(
                        facts.layout,
                        wave.weights,
                        call.rows,
                        pairs.pair_offsets,
                        pairs.pair_rows,
                        pairs.pair_weights,
                        facts.grid,
                        sums,
                    )
                except errors.NumericError as error:
                    bad_rows.update(error.rows)
        if self._prefetcher is not None:
            self._prefetcher.on_done(call.layer, acquisition.load_s, self._clock(), stream)
        if bad_rows:
            raise _numeric_error(call.layer, sorted(bad_rows))
        return Computed(sums, acquisition.load_s)


class OpenCall:
    """A call whose experts are held or on their way. Compute it once, or close it."""

    __slots__ = ("_acquisition", "_call", "_executor", "_grouped", "_stream")

    def __init__(
        self,
        executor: ExpertExecutor,
        call: ExpertCall,
        grouped: GroupedPairs,
        acquisition: Acquisition,
        stream: int,
    ) -> None:
        self._executor = executor
        self._call = call
        self._grouped = grouped
        self._acquisition = acquisition
        self._stream = stream

    @property
    def is_whole(self) -> bool:
        """Whether it will compute without waiting for a read."""
        return self._acquisition.is_whole

    def compute(self) -> Computed:
        """Compute what has come, wait for more, until the call is whole. Raises as `compute`."""
        return self._executor.compute_opened(
            self._call, self._grouped, self._acquisition, self._stream
        )

    def abandon(self, error: BaseException) -> None:
        """End its wait for reads, now or later, by raising `error` from `compute`."""
        self._acquisition.abandon(error)

    def close(self) -> None:
        """Let go of its experts: it will not be computed."""
        with self._acquisition:
            pass


def _numeric_error(layer: int, rows: list[int]) -> errors.NumericError:
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return errors.NumericError(
        f"experts of layer {layer}: an expert output that is not finite or beyond 2^44 quanta "
        f"in row {shown}",
        tuple(rows),
    )
