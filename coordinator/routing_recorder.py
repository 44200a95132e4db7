"""RoutingRecorder: which experts each token of a text visited, wherever they were computed.

The coordinator sees the routing of every row, whoever owns the experts. A pass's rows are kept by
their positions, so a guess that was wrong is overwritten by the pass that puts it right; at the end
only the rows whose tokens became the text count. The last layer runs for all rows of a prompt while
somebody records, not just for those whose logits are wanted: no bit depends on that.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.array_types import F32, I32
from coordinator.batch import Batch
from coordinator.cancellation import Cancellation
from coordinator.expert_branch import ExpertBranch
from coordinator.kv_arrays import KvArrays
from coordinator.row_forms import RowForms
from coordinator.transformer import Transformer
from coordinator.weights import ModelWeights
from shoal import ops
from shoal.errors import CorruptArtifact, UsageError
from shoal.experts.routing_trace import RoutingTrace, TraceSegment, decode_trace, encode_trace
from shoal.limits import MAX_RECORDED_BYTES
from shoal.model_spec import ModelSpec, RouterKind
from shoal.quant import Scheme
from shoal.replaced_file import replace_file
from shoal.router import RoutingPlan

KIND = "run"  # of a segment: one request of `shoal run`


class RoutingRecorder:
    """Keeps one sequence's routing and adds it to a trace file. Not thread-safe."""

    def __init__(self, path: Path, spec: ModelSpec, identity: str) -> None:
        """Begin with the segments that the file holds, if there is one.

        Raises:
            UsageError: there is no such folder; the file is no trace, or another model's; the model
                has no experts to choose from, or not as many in every layer.
        """
        self._path = path
        routers = {
            index: layer.router
            for index, layer in enumerate(spec.layers)
            if layer.router is not None and layer.router.kind is not RouterKind.ALL
        }
        shapes = {(each.num_experts, each.experts_per_token) for each in routers.values()}
        if not shapes:
            raise UsageError("--record-routing: this model chooses no experts: leave it out")
        if len(shapes) > 1:
            raise UsageError(
                "--record-routing: the layers of this model choose among different numbers of "
                "experts, and a trace has one number: leave it out"
            )
        num_experts, self._top_k = shapes.pop()
        self._column = {layer: column for column, layer in enumerate(routers)}
        nothing = RoutingTrace(identity, num_experts, self._top_k, tuple(routers), ())
        self._trace = _read(path, nothing)
        self._max_rows = MAX_RECORDED_BYTES // (2 * len(routers) * self._top_k)
        self._tokens = np.empty(0, np.int32)  # with room behind the first _num_rows, as the next
        self._rows = self._empty(0)
        self._num_rows = 0
        self._pass: NDArray[np.uint16] | None = None

    def transformer(
        self, spec: ModelSpec, weights: ModelWeights, experts: ExpertBranch
    ) -> Transformer:
        """Return a model whose passes are recorded."""
        return _RecordedTransformer(spec, weights, _RecordedExperts(experts, self), self)

    def begin(self, batch: Batch) -> None:
        """A pass of one sequence begins."""
        self._pass = self._empty(batch.num_rows)

    def visit(self, layer: int, experts: I32) -> None:
        """The rows of the pass visit these experts [T, k] of a layer."""
        column = self._column.get(layer)
        if self._pass is not None and column is not None:
            self._pass[:, column] = np.sort(experts, axis=1)

    def end(self, batch: Batch) -> None:
        """The pass is done: its rows stand, and none after them."""
        assert self._pass is not None, "a pass ends that did not begin"
        first = int(batch.positions[0])
        assert first <= self._num_rows, "rows before these were not run"
        self._num_rows = first + batch.num_rows
        self._reserve()
        self._tokens[first : self._num_rows] = batch.token_ids
        self._rows[first : self._num_rows] = self._pass
        self._pass = None

    def write(self, token_ids: Sequence[int]) -> str:
        """Add the rows of a finished text to the file, and say what it holds.

        Args:
            token_ids: prompt and answer. The last token was perhaps never read.

        Raises: OSError: the file cannot be written; what was there still is.
        """
        said = np.array(token_ids[: self._num_rows], np.int32)
        differ = np.flatnonzero(said != self._tokens[: said.size])
        num_rows = int(differ[0]) if differ.size else said.size
        segments = list(self._trace.segments)
        segment = TraceSegment(f"{KIND}-{len(segments)}", KIND, self._rows[:num_rows])
        trace = replace(self._trace, segments=(*segments, segment))
        total = sum(each.experts.shape[0] for each in trace.segments)
        if total > self._max_rows:
            raise UsageError(
                f"--record-routing {self._path}: {total} tokens are more than the "
                f"{self._max_rows} that a trace holds: begin another file"
            )
        replace_file(self._path, encode_trace(trace))
        self._trace = trace
        return (
            f"routing of {num_rows} tokens added to {self._path} "
            f"({total} tokens of {len(trace.segments)} texts)"
        )

    def _reserve(self) -> None:
        """Make room for all rows, twice what was there: a long text is not copied every token."""
        if self._num_rows > len(self._tokens):
            more = max(self._num_rows, 2 * len(self._tokens)) - len(self._tokens)
            self._tokens = np.concatenate([self._tokens, np.empty(more, np.int32)])
            self._rows = np.concatenate([self._rows, self._empty(more)])

    def _empty(self, num_rows: int) -> NDArray[np.uint16]:
        return np.zeros((num_rows, len(self._column), self._top_k), np.uint16)


class _RecordedExperts:
    """Another branch, whose routing a recorder sees."""

    def __init__(self, inner: ExpertBranch, recorder: RoutingRecorder) -> None:
        self._inner, self._recorder = inner, recorder

    def scheme(self, layer: int) -> Scheme:
        """See `ExpertBranch.scheme`."""
        return self._inner.scheme(layer)

    def run(self, layer: int, forms: RowForms, plan: RoutingPlan) -> ops.Branch:
        """See `ExpertBranch.run`."""
        self._recorder.visit(layer, plan.experts)
        return self._inner.run(layer, forms, plan)

    def run_layers(self, first: int, run: ops.LayerRun) -> ops.RanLayers | None:
        """See `ExpertBranch.run_layers`."""
        ran = self._inner.run_layers(first, run)
        for layer, experts in enumerate(ran.experts if ran is not None else (), first):
            self._recorder.visit(layer, experts)
        return ran


class _RecordedTransformer(Transformer):
    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        experts: ExpertBranch,
        recorder: RoutingRecorder,
    ) -> None:
        super().__init__(spec, weights, experts)
        self._recorder = recorder

    def run_layers(self, batch: Batch, cache: KvArrays, cancellation: Cancellation) -> F32:
        """See `Transformer.run_layers`; all rows visit the last layer."""
        self._recorder.begin(batch)
        everyone = replace(batch, logit_rows=np.arange(batch.num_rows))
        hidden = super().run_layers(everyone, cache, cancellation)
        self._recorder.end(batch)
        return hidden[batch.logit_rows]


def _read(path: Path, nothing: RoutingTrace) -> RoutingTrace:
    if not path.parent.is_dir():
        raise UsageError(f"--record-routing {path}: there is no folder {path.parent}")
    try:
        found = decode_trace(path.read_bytes(), str(path))
    except FileNotFoundError:
        return nothing
    except CorruptArtifact as error:
        raise UsageError(f"--record-routing: {error}: name another file") from None
    if replace(found, segments=()) != nothing:
        raise UsageError(
            f"--record-routing {path}: recorded with another model (identity "
            f"{found.identity[:12]}, this one is {nothing.identity[:12]}): name another file"
        )
    return found
