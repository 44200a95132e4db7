"""Transformer: one forward pass of a batch of rows, experts wherever the dispatch finds them.

    embed -> per layer: norm -> attention -> add -> norm -> route -> experts or dense FFN -> add
          -> norm -> lm_head, for the rows whose logits are wanted

Families differ only in the ModelSpec. No sequence of float operations depends on which rows
share a pass: the same row gives the same bits alone, in a chunk, or beside other requests. All
float arithmetic is in `shoal.ops`.

In the last layer every row writes its K and V, but only the rows whose logits are wanted go on.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.array_types import F32
from coordinator.batch import Batch
from coordinator.cancellation import Cancellation
from coordinator.expert_branch import DispatchedExperts, ExpertBranch
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.kv_arrays import KvArrays, KvPair
from coordinator.row_forms import RowForms
from coordinator.weights import ModelWeights, load_weights
from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.layer_weights import LayerWeights
from shoal.errors import NumericError
from shoal.model_spec import ModelSpec

# Rows times layers of one native call: a cancellation is seen after some 60 ms of a big model.
MAX_ROWS_AT_ONCE = 64


class Transformer:
    """A model that is ready to run. Not thread-safe: one pass at a time."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, experts: ExpertBranch) -> None:
        """Args: weights: may be shared by several transformers; nothing writes to them."""
        self._spec = spec
        self._weights = weights
        self._experts = experts
        self._layers = tuple(
            _layer(spec, index, layer_weights, experts)
            for index, layer_weights in enumerate(weights.layers)
        )
        self._routed_ends = _routed_ends(self._layers)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def forward(self, batch: Batch, cache: KvArrays, cancellation: Cancellation) -> F32:
        """Run the rows, write their KV to the batch's slots; return logits [R, V].

        Args:
            batch: T rows, all of whose earlier tokens are in the cache.
            cancellation: looked at before every layer of many rows, or every few layers of few.

        Raises:
            NumericError: naming layer and node; its `rows` are rows of the batch. The others may
                be run again without them.
            NodeError: no node computed a layer's experts.
            Cancelled: some layers' caches hold rows of this pass; running them again is right.
        """
        return self.logits(self.run_layers(batch, cache, cancellation), batch)

    def run_layers(self, batch: Batch, cache: KvArrays, cancellation: Cancellation) -> F32:
        """Do what `forward` does before the logits; return what they are made of, [R, D]."""
        places = self._places(batch)
        hidden = ops.embed(self._weights.embed, batch.token_ids)
        branch: ops.Branch | None = None
        last = len(self._layers) - 1
        all_go_on = len(batch.logit_rows) == batch.num_rows
        index = 0
        while index <= last:
            cancellation.check()
            ran = self._run_at_once(index, hidden, branch, places, cache, all_go_on)
            if ran is not None:
                hidden, branch = ran.residual, ran.sums
                index += len(ran.experts)
                continue
            going_on = batch.logit_rows if index == last and not all_go_on else None
            layer = self._layers[index]
            try:
                hidden, branch = layer.run(hidden, branch, places, cache.layer(index), going_on)
            except NumericError as error:
                raise _in_layer(index, error) from error
            index += 1
        return hidden if branch is None else ops.add_branch(hidden, branch)

    def _run_at_once(
        self,
        first: int,
        hidden: F32,
        branch: ops.Branch | None,
        places: ops.Places,
        cache: KvArrays,
        all_go_on: bool,
    ) -> ops.RanLayers | None:
        """Run layers from `first` on, several in one native call, as far as their experts allow.

        Of few rows, which all go on. None: `first` has to be run alone.
        """
        end = self._routed_ends[first]
        if not all_go_on:
            end = min(end, len(self._layers) - 1)
        layers = range(first, min(end, first + MAX_ROWS_AT_ONCE // places.num_rows))
        if not layers:
            return None
        run = ops.LayerRun(
            [_native(self._layers[index]) for index in layers],
            hidden,
            branch,
            places,
            [cache.layer(index) for index in layers],
        )
        ran = self._experts.run_layers(first, run)
        if ran is not None and ran.stopped is not None:
            raise _in_layer(first + len(ran.experts), ran.stopped) from ran.stopped
        return ran

    def _places(self, batch: Batch) -> ops.Places:
        rope = ops.rope_table(
            self._weights.inv_freq, batch.positions, self._spec.rope_attention_factor
        )
        return ops.Places(
            rope, batch.slots, batch.row_sequence, batch.positions, batch.block_tables
        )

    def logits(self, hidden: F32, batch: Batch) -> F32:
        """Return the logits [R, V] of what `run_layers` returned for the batch, [R, D].

        Raises NumericError, as `forward`.
        """
        if not hidden.shape[0]:
            return np.empty((0, self._spec.vocab_size), np.float32)
        lm_head = self._weights.lm_head
        normed = ops.rms_norm(hidden, self._weights.norm, self._spec.norm_eps)
        try:
            rows = ops.quantise_rows(lm_head.scheme, normed)
        except NumericError as error:
            bad = _batch_rows(error.rows, batch.logit_rows)
            raise NumericError(f"output embedding: {error}", bad) from error
        return ops.matmul(lm_head.matrix, rows, lm_head.bias)


def exact_transformer(artifact: Artifact, dispatch: ExpertDispatch) -> Transformer:
    """Read the artifact's dense part; return the model whose experts are the artifact's own."""
    return Transformer(artifact.spec, load_weights(artifact), DispatchedExperts(artifact, dispatch))


class _RoutedLayer:
    """One decoder layer whose FFN is experts."""

    def __init__(
        self, spec: ModelSpec, index: int, weights: LayerWeights, experts: ExpertBranch
    ) -> None:
        router = spec.layers[index].router
        assert router is not None, f"layer {index} has no experts"
        self._index = index
        self._experts = experts
        self.native = ops.RoutedLayer(
            weights.norms, weights.attention, router, weights.router, experts.scheme(index)
        )

    def run(
        self,
        hidden: F32,
        branch: ops.Branch | None,
        places: ops.Places,
        cache: KvPair,
        going_on: NDArray[np.intp] | None,
    ) -> tuple[F32, ops.Branch]:
        """Return the residual and the branch that is still to be added to it.

        Of the rows `going_on` only, if that is not None.
        """
        routed = self.native.run(hidden, branch, places, cache, going_on)
        if not len(routed.residual):
            return routed.residual, routed.normed
        forms = RowForms(routed.normed, routed.rows)
        try:
            return routed.residual, self._experts.run(self._index, forms, routed.plan)
        except NumericError as error:
            if going_on is None:
                raise
            raise NumericError(str(error), _batch_rows(error.rows, going_on)) from error


def _layer(
    spec: ModelSpec, index: int, weights: LayerWeights, experts: ExpertBranch
) -> _RoutedLayer | ops.DenseLayer:
    if weights.dense_ffn is None:
        return _RoutedLayer(spec, index, weights, experts)
    return ops.DenseLayer(weights.norms, weights.attention, *weights.dense_ffn)


def _native(layer: _RoutedLayer | ops.DenseLayer) -> ops.RoutedLayer:
    assert isinstance(layer, _RoutedLayer), "only layers with experts run together"
    return layer.native


def _routed_ends(layers: Sequence[_RoutedLayer | ops.DenseLayer]) -> list[int]:
    """Return, for each layer, the next one from there on that has no experts."""
    ends, end = [], len(layers)
    for index in reversed(range(len(layers))):
        if not isinstance(layers[index], _RoutedLayer):
            end = index
        ends.append(end)
    return ends[::-1]


def _in_layer(index: int, error: NumericError) -> NumericError:
    return NumericError(f"layer {index}: {error}", error.rows)


def _batch_rows(rows: tuple[int, ...], index: NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(int(index[row]) for row in rows)
