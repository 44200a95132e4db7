"""Transformer: one forward pass of a batch of rows, experts wherever the dispatch finds them.

    embed -> per layer: norm -> attention -> add -> norm -> route -> experts or dense FFN -> add
          -> norm -> lm_head, for the rows whose logits are wanted

Families differ only in the ModelSpec. No sequence of float operations depends on which rows
share a pass: the same row gives the same bits alone, in a chunk, or beside other requests. All
float arithmetic is in `shoal.ops`.

In the last layer every row writes its K and V, but only the rows whose logits are wanted go on.
"""

import numpy as np
from numpy.typing import NDArray

from coordinator.array_types import F32
from coordinator.attention.grouped_query import GroupedQueryAttention, Places
from coordinator.batch import Batch
from coordinator.cancellation import Cancellation
from coordinator.expert_branch import DispatchedExperts, ExpertBranch
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.kv_arrays import KvArrays, KvPair
from coordinator.row_forms import RowForms
from coordinator.weights import DenseFfn, LayerWeights, ModelWeights, load_weights
from shoal import ops
from shoal.artifact import Artifact
from shoal.errors import NumericError
from shoal.model_spec import ModelSpec
from shoal.quant import Scheme
from shoal.router import RoutingPlan


class Transformer:
    """A model that is ready to run. Not thread-safe: one pass at a time."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, experts: ExpertBranch) -> None:
        """Args: weights: may be shared by several transformers; nothing writes to them."""
        self._spec = spec
        self._weights = weights
        self._layers = tuple(
            _Layer(spec, index, layer_weights, experts)
            for index, layer_weights in enumerate(weights.layers)
        )

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def forward(self, batch: Batch, cache: KvArrays, cancellation: Cancellation) -> F32:
        """Run the rows, write their KV to the batch's slots; return logits [R, V].

        Args:
            batch: T rows, all of whose earlier tokens are in the cache.
            cancellation: looked at before every layer.

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
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            cancellation.check()
            going_on = batch.logit_rows if index == last else None
            try:
                hidden = layer.run(hidden, places, cache.layer(index), going_on)
            except NumericError as error:
                raise NumericError(f"layer {index}: {error}", error.rows) from error
        return hidden

    def _places(self, batch: Batch) -> Places:
        cos, sin = ops.rope_table(
            self._weights.inv_freq, batch.positions, self._spec.rope_attention_factor
        )
        return Places(
            cos=cos,
            sin=sin,
            slots=batch.slots,
            row_sequence=batch.row_sequence,
            positions=batch.positions,
            block_tables=batch.block_tables,
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
            return lm_head(ops.quantise_rows(lm_head.scheme, normed))
        except NumericError as error:
            rows = _batch_rows(error.rows, batch.logit_rows)
            raise NumericError(f"output embedding: {error}", rows) from error


def exact_transformer(artifact: Artifact, dispatch: ExpertDispatch) -> Transformer:
    """Read the artifact's dense part; return the model whose experts are the artifact's own."""
    return Transformer(artifact.spec, load_weights(artifact), DispatchedExperts(artifact, dispatch))


class _Layer:
    """One decoder layer: two branches, each added to the residual."""

    def __init__(
        self, spec: ModelSpec, index: int, weights: LayerWeights, experts: ExpertBranch
    ) -> None:
        self._norm_eps = spec.norm_eps
        self._attention_norm = weights.attention.norm
        self._ffn_norm = weights.ffn_norm
        self._attention = GroupedQueryAttention(
            spec.attention, spec.norm_eps, spec.layers[index].window, weights.attention
        )
        self._ffn: _DenseFfnBranch | _RoutedBranch
        if weights.dense_ffn is not None:
            self._ffn = _DenseFfnBranch(weights.dense_ffn)
        else:
            self._ffn = _RoutedBranch(spec, index, weights, experts)

    def run(
        self, hidden: F32, places: Places, cache: KvPair, going_on: NDArray[np.intp] | None
    ) -> F32:
        """Return the next residual; of the rows `going_on` only, if that is not None."""
        normed = ops.rms_norm(hidden, self._attention_norm, self._norm_eps)
        q = self._attention.write_kv(RowForms(normed), places, cache)
        if going_on is None:
            return self._finish(hidden, q, places, cache)
        if not going_on.size:
            return hidden[going_on]
        try:
            return self._finish(hidden[going_on], q[going_on], places.take(going_on), cache)
        except NumericError as error:
            raise NumericError(str(error), _batch_rows(error.rows, going_on)) from error

    def _finish(self, hidden: F32, q: F32, places: Places, cache: KvPair) -> F32:
        hidden = ops.add(hidden, self._attention.attend(q, places, cache))
        normed = ops.rms_norm(hidden, self._ffn_norm, self._norm_eps)
        return ops.add(hidden, self._ffn.run(RowForms(normed)))


class _RoutedBranch:
    """Route the rows and have their experts compute."""

    def __init__(
        self, spec: ModelSpec, index: int, weights: LayerWeights, experts: ExpertBranch
    ) -> None:
        router = spec.layers[index].router
        assert router is not None, f"layer {index} has no experts"
        self._index = index
        self._router = router
        self._gate = weights.router
        self._experts = experts
        self._last_plan: RoutingPlan | None = None

    def run(self, forms: RowForms) -> F32:
        """Return the branch [T, D]."""
        plan = self._everyone(forms.num_rows) if self._gate is None else self._route(forms)
        return self._experts.run(self._index, forms, plan)

    def _route(self, forms: RowForms) -> RoutingPlan:
        assert self._gate is not None, "a router without a matrix"
        router = self._router
        logits = self._gate(forms.get(Scheme.F32))
        return ops.route(router.kind, logits, router.experts_per_token, router.renormalise)

    def _everyone(self, num_rows: int) -> RoutingPlan:
        # The plan depends on nothing but the number of rows, which is 1 for most of a request.
        plan = self._last_plan
        if plan is None or plan.experts.shape[0] != num_rows:
            router = self._router
            nothing = np.empty((num_rows, router.num_experts), np.float32)
            plan = ops.route(router.kind, nothing, router.experts_per_token, router.renormalise)
            self._last_plan = plan
        return plan


class _DenseFfnBranch:
    """An FFN that the coordinator keeps."""

    def __init__(self, ffn: DenseFfn) -> None:
        self._ffn = ffn

    def run(self, forms: RowForms) -> F32:
        """Return the branch [T, D]."""
        layout = self._ffn.layout
        return ops.expert_ffn(layout, self._ffn.weights, forms.get(layout.scheme))


def _batch_rows(rows: tuple[int, ...], index: NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(int(index[row]) for row in rows)
