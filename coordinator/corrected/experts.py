"""F(noted) + G(now) - G(noted): the experts of a layer as a corrected pass has them.

G - G is taken of the stand-in's integer sums: it is exactly nothing where a row asks what it asked
before, and F + 0 is F.
"""

from dataclasses import dataclass

from coordinator.array_types import F32
from coordinator.corrected.surrogate import Surrogate
from coordinator.corrected.window import LayerWindow
from coordinator.expert_dispatch import BULK_ROWS_PER_CALL, ExpertDispatch, PendingSums
from coordinator.row_forms import RowForms
from shoal import limits, ops
from shoal.artifact import Artifact
from shoal.quant import Scheme
from shoal.router import RoutingPlan


@dataclass(frozen=True, slots=True)
class WindowPass:
    """What the next forward pass does with the window's rows first .. end - 1: all of its rows.

    is_sweep: correct the stand-in by the answers, which every row must have asked for.
    asks: send what a layer asks as soon as it is known; the pass after this one takes the answers.
    """

    first: int
    end: int
    is_sweep: bool
    asks: bool


@dataclass(frozen=True, slots=True)
class _Question:
    """Rows first .. end - 1 of one layer, on their way."""

    first: int
    end: int
    answer: PendingSums


class CorrectedExperts:
    """The experts of one artifact, approximately; an ExpertBranch. See the package.

    Args:
        artifact: the target's, whose schemes and grids the true experts have.
        dispatch: where these are. Their calls stay in flight from one pass to the next: whoever
            stops in between must `abandon` them.
        max_calls_ahead: at one node: beyond, the oldest is waited for before the next leaves.
    """

    def __init__(
        self,
        artifact: Artifact,
        dispatch: ExpertDispatch,
        surrogate: Surrogate,
        max_calls_ahead: int = limits.MAX_CALLS_AHEAD,
    ) -> None:
        layers = [i for i, layer in enumerate(artifact.spec.layers) if layer.router is not None]
        self._forms = {index: (artifact.scheme(index), artifact.grid(index)) for index in layers}
        self._windows = {index: LayerWindow() for index in layers}
        self._dispatch = dispatch
        self._surrogate = surrogate
        self._max_calls_ahead = max_calls_ahead
        self._questions: dict[int, _Question] = {}
        self._pass = WindowPass(0, 0, is_sweep=False, asks=False)
        self.num_round_trips = 0  # so far

    def begin(self, window_pass: WindowPass) -> None:
        """Say what the next pass is."""
        self._pass = window_pass
        self.num_round_trips += window_pass.asks

    def scheme(self, layer: int) -> Scheme:
        """See ExpertBranch.scheme."""
        return self._forms[layer][0]

    def run(self, layer: int, forms: RowForms, plan: RoutingPlan) -> F32:
        """See ExpertBranch.run. Raises also what the calls of the pass before bring."""
        first, end = self._pass.first, self._pass.end
        assert forms.num_rows == end - first, (
            "every row of a corrected pass goes through all layers"
        )
        window = self._windows[layer]
        sums = self._surrogate.sums(layer, forms, plan)
        grid = self._surrogate.grid(layer)
        if self._pass.is_sweep:
            self._take_answer(layer)
            change = sums - window.sums(first, end)
            branch = ops.add(window.answers(first, end), ops.finish_sums(change, grid))
        else:
            branch = ops.finish_sums(sums, grid)
        window.note(first, forms.get(self._forms[layer][0]), plan, sums)
        if self._pass.asks:
            self._ask(layer, first, end)
        return branch

    def run_layers(self, first: int, run: ops.LayerRun) -> None:
        """See `ExpertBranch.run_layers`: what a layer adds here is never its sums alone."""

    def ask(self, first: int, end: int) -> None:
        """Send what rows first .. end - 1 ask of all layers, together; the next sweep waits."""
        self.num_round_trips += 1
        for layer in self._windows:
            self._ask(layer, first, end)

    def abandon(self) -> None:
        """Take back what is on its way. What was noted stays."""
        for question in self._questions.values():
            question.answer.abandon()
        self._questions.clear()

    def _ask(self, layer: int, first: int, end: int) -> None:
        calls_per_node = -(-(end - first) // BULK_ROWS_PER_CALL)
        if (len(self._questions) + 1) * calls_per_node > self._max_calls_ahead:
            self._take_answer(next(iter(self._questions)))
        assert layer not in self._questions, f"layer {layer} asks twice"
        pending = self._dispatch.start(layer, *self._windows[layer].asked(first, end))
        self._questions[layer] = _Question(first, end, pending)

    def _take_answer(self, layer: int) -> None:
        """Wait for what a layer asked, unless that was taken before."""
        question = self._questions.pop(layer, None)
        if question is not None:
            grid = self._forms[layer][1]
            self._windows[layer].answer(
                question.first, ops.finish_sums(question.answer.wait(), grid)
            )
