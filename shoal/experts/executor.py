"""ExpertExecutor: what a layer's experts make of a call's rows, as exact integer sums.

The same object serves a node and the coordinator's own process (`local`), so both run one code.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal import errors, ops
from shoal.experts.call import ExpertCall
from shoal.experts.grouping import group_pairs
from shoal.experts.store import ExpertStore
from shoal.model_spec import ModelSpec
from shoal.quant import Scheme


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

    def __init__(self, model: ExpertModel, store: ExpertStore) -> None:
        self._store = store
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
    def store(self) -> ExpertStore:
        return self._store

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
        """Whether computing a checked call would not wait for a read."""
        return self._store.is_resident(call.layer, call.experts.tolist())

    def compute(self, call: ExpertCall) -> NDArray[np.int64]:
        """Return [T, D]: per row, the sum over its pairs of rne(weight * expert(row) * 2^grid).

        Raises:
            NotOwned: an expert that the store does not own. There are no zeros in its place.
            NumericError: naming layer and rows that are not finite or beyond the grid.
            CorruptArtifact, OSError: an expert could not be read.
        """
        return self.compute_timed(call).sums

    def compute_timed(self, call: ExpertCall) -> Computed:
        """Like `compute`, and tell how long it waited for experts."""
        facts = self._layers[call.layer]
        grouped = group_pairs(call)
        sums = np.zeros((call.rows.num_rows, self._dim), np.int64)
        bad_rows: set[int] = set()
        with self._store.acquire(call.layer, grouped.experts) as acquired:
            for wave in acquired:
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
            if bad_rows:
                raise _numeric_error(call.layer, sorted(bad_rows))
            return Computed(sums, acquired.load_s)


def _numeric_error(layer: int, rows: list[int]) -> errors.NumericError:
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return errors.NumericError(
        f"experts of layer {layer}: an expert output that is not finite or beyond 2^44 quanta "
        f"in row {shown}",
        tuple(rows),
    )
