"""Guesser: from the calls of every stream to probabilities for the layer that comes next (core).

    settle(stream, call)   the truth has come: models and counters learn
    guess(stream, call)    what will the next layer's call want?

The unit is a call, not a row: its features are the best of its rows' and its truth the experts
that any row wants. Calls of one row, of a few and of many have models of their own, and within
these the number of rows is a feature. A long prompt's call wants nearly everything: its guess is
then every owned expert, equals in the order of the file, and reading ahead is a sweep.

Guessing costs some hundred microseconds, mostly of the chain. Where the pre-gate alone recalls as
much as all together, within two points, three calls of four are guessed by it alone; where
nothing is ever sure enough for a read, only every fourth call is guessed, to learn from.

History is kept per stream: two conversations that take turns do not spoil each other's.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.experts.prefetch import locality, markov
from shoal.experts.prefetch.admission import min_probability
from shoal.experts.prefetch.fusion import Fusion
from shoal.experts.prefetch.interface import PredictorFigures
from shoal.experts.prefetch.locality import LocalityWindow
from shoal.experts.prefetch.markov import SetMarkov
from shoal.limits import MAX_PREFETCH_STREAMS
from shoal.rows import Rows

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
Truth = NDArray[np.bool_]

FEW_ROWS = 16  # a batch of decodes; beyond it, prompts: 16 rows x 8 of 128 touch 64 % by chance
SCORED_ROWS = 64  # of a prompt's chunk: what they agree on, 500 rows would not tell better
PREGATE_BINS = 24
FUSED = "fused"
PREDICTORS = ("pregate", "markov", "locality")
_BINS = {
    "pregate": (PREGATE_BINS,),
    "markov": (markov.BINS, markov.BINS),
    "locality": (locality.RECENT_BINS, locality.LATELY_BINS),
}
_TAUGHT_CALLS = 48  # of a layer: every one is learned from; recall is there after some thirty
_LEARN_EVERY = 4  # calls after that: learning costs as much as guessing
_JUDGE_EVERY = 8  # calls: the single predictors, for the figures only, cost three times that
_SIZE_BINS = 10  # the number of rows: up to 1, 2, 4, ... 512
_LEAN_AFTER, _LEAN_LEAD, _LEAD_STEP = 8, 0.02, 1 / 32  # judged calls; recall; running mean
_MUTE_SHARE = 0.1  # of calls with a guess worth a read: below it, most calls are not guessed
_DARING_STEP = 1 / 16  # of that share's running mean
_NOTHING = np.empty(0, np.int64)
WOULD_TAKE = 0.5  # a single predictor's precision is that of the experts it gives more than this


class Gate(Protocol):
    """Scores a layer's experts from the rows of the layer before: a `Pregate`."""

    def features(self, rows: Rows) -> I64:
        """Return the bins [1, E], each in [0, PREGATE_BINS)."""
        ...


class CallKind(IntEnum):
    ONE = 0
    FEW = 1
    MANY = 2


def kind_of(num_rows: int) -> CallKind:
    if num_rows == 1:
        return CallKind.ONE
    return CallKind.FEW if num_rows <= FEW_ROWS else CallKind.MANY


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """A layer with a router: its size, and which of its experts are owned."""

    layer: int
    num_experts: int
    experts_per_token: int
    owned: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Guess:
    """Owned experts of `target` by falling probability, equals by index; their probabilities."""

    target: int
    kind: CallKind
    experts: I64
    probabilities: F64
    features: I64  # [features, E]; the first one is the number of rows


@dataclass(slots=True)
class _Count:
    wanted: int = 0
    hits: int = 0
    admitted: int = 0
    right: int = 0


@dataclass(slots=True)
class _Stream:
    sets: dict[int, I64] = field(default_factory=dict)  # layer -> experts of its last call
    windows: dict[int, LocalityWindow] = field(default_factory=dict)
    pending: Guess | None = None


class _Models:
    """What is learned about one layer as a target, for calls of one kind."""

    def __init__(self, layer: RoutedLayer, predictors: Sequence[str]) -> None:
        rate = layer.experts_per_token / layer.num_experts
        self.fused = Fusion([_SIZE_BINS, *(b for name in predictors for b in _BINS[name])], rate)
        alone = predictors if len(predictors) > 1 else ()  # a single one is the fused one
        self.single = {name: Fusion(_BINS[name], rate) for name in alone}
        self.calls = 0
        self.judged = 0
        self.lead = 0.0  # running mean: recall of all together less that of the pre-gate alone
        self.daring = 1.0  # running mean: share of calls with a guess that may be worth a read

    @property
    def learns_next(self) -> bool:
        """Whether the call that comes next is learned from."""
        return self.calls < _TAUGHT_CALLS or (self.calls + 1) % _LEARN_EVERY == 0

    @property
    def is_mute(self) -> bool:
        """Whether nothing sure enough is ever said: a layer that nothing predicts."""
        return self.calls > _TAUGHT_CALLS and self.daring < _MUTE_SHARE

    @property
    def is_lean(self) -> bool:
        """Whether the pre-gate alone does: where it is as good, the others are only work."""
        return self.judged >= _LEAN_AFTER and self.lead < _LEAN_LEAD


class Guesser:
    """Learns from calls and guesses the next one's experts.

    Args:
        layers: those with a router and owned experts, ascending; a pass visits them in turn.
        pregates: by source layer; only where the next layer that the model routes is owned.
        predictors: names out of PREDICTORS, at least one.
    """

    def __init__(
        self,
        layers: Sequence[RoutedLayer],
        pregates: Mapping[int, Gate],
        predictors: Sequence[str] = PREDICTORS,
    ) -> None:
        assert layers and predictors
        self._layers = {layer.layer: layer for layer in layers}
        order = [layer.layer for layer in layers]
        self._next = dict(zip(order, [*order[1:], order[0]], strict=True))
        self._before = {
            target: (order[index - 1], order[(index - 2) % len(order)])
            for index, target in enumerate(order)
        }
        self._pregates = pregates
        self._predictors = tuple(predictors)
        firsts = [1 + sum(len(_BINS[b]) for b in predictors[:n]) for n in range(len(predictors))]
        self._rows = {
            name: slice(first, first + len(_BINS[name]))
            for name, first in zip(predictors, firsts, strict=True)
        }
        self._num_features = 1 + sum(len(_BINS[name]) for name in predictors)
        self._owned = {layer.layer: np.array(layer.owned, np.int64) for layer in layers}
        self._markov = {
            target: SetMarkov(
                self._layers[target].num_experts,
                (self._layers[one].num_experts, self._layers[two].num_experts),
            )
            for target, (one, two) in self._before.items()
        }
        self._models = {
            (layer.layer, kind): _Models(layer, self._predictors)
            for layer in layers
            for kind in CallKind
        }
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        names = (FUSED, *predictors)
        self._counts = {(layer, name): _Count() for layer in order for name in names}

    def settle(self, stream: int, layer: int, num_rows: int, experts: I64) -> Guess | None:
        """Learn what a call wants; return the guess that was made about it, if one was.

        Args:
            experts: distinct, ascending.
        """
        history = self._stream(stream)
        kind = kind_of(num_rows)
        guess, history.pending = history.pending, None
        if guess is not None and (guess.target != layer or guess.kind is not kind):
            guess = None
        if guess is not None:
            self._judge(guess, experts)
        self._remember(history, layer, kind, experts)
        return guess

    def guess(self, stream: int, layer: int, rows: Rows) -> Guess:
        """Return what the call after this one, of the next layer, will want."""
        history = self._stream(stream)
        target, kind = self._next[layer], kind_of(rows.num_rows)
        owned, model = self._owned[target], self._models[target, kind]
        if model.is_mute and not model.learns_next:
            history.pending = Guess(target, kind, _NOTHING, np.empty(0), _NOTHING)
            return history.pending
        if model.is_lean and not model.learns_next and layer in self._pregates:
            features = self._pregates[layer].features(_some(rows))
            fusion = model.single["pregate"]
        else:
            features = self._features(history, layer, target, rows)
            fusion = model.fused
        ranked, p = fusion.rank(features, owned)
        history.pending = Guess(target, kind, ranked, p, features)
        return history.pending

    def forget(self, stream: int) -> None:
        """The stream's pending guess will not be settled: calls were missed."""
        if stream in self._streams:
            self._streams[stream].pending = None

    def figures(self, layer: int | None = None) -> dict[str, PredictorFigures]:
        """Return each predictor's counters, of one target layer or of all."""
        totals: dict[str, PredictorFigures] = {}
        for name in (FUSED, *self._predictors):
            source = name if len(self._predictors) > 1 else FUSED
            counts = [
                count
                for (target, of), count in self._counts.items()
                if of == source and layer in (None, target)
            ]
            totals[name] = PredictorFigures(
                sum(c.wanted for c in counts),
                sum(c.hits for c in counts),
                sum(c.admitted for c in counts),
                sum(c.right for c in counts),
            )
        return totals

    def _stream(self, stream: int) -> _Stream:
        history = self._streams.pop(stream, None) or _Stream()
        self._streams[stream] = history  # the newest last
        if len(self._streams) > MAX_PREFETCH_STREAMS:
            self._streams.popitem(last=False)
        return history

    def _features(self, history: _Stream, layer: int, target: int, rows: Rows) -> I64:
        num_experts = self._layers[target].num_experts
        features = np.empty((self._num_features, num_experts), np.int64)
        features[0] = min((rows.num_rows - 1).bit_length(), _SIZE_BINS - 1)
        for name, place in self._rows.items():
            if name == "pregate":
                gate = self._pregates.get(layer)
                features[place] = gate.features(_some(rows)) if gate is not None else 0
            elif name == "markov":
                self._markov[target].features(self._sets(history, target), features[place])
            else:
                window = history.windows.get(target)
                features[place] = window.features() if window is not None else 0
        return features

    def _sets(self, history: _Stream, target: int) -> tuple[I64, I64]:
        one, two = self._before[target]
        return history.sets.get(one, _NOTHING), history.sets.get(two, _NOTHING)

    def _judge(self, guess: Guess, experts: I64) -> None:
        model = self._models[guess.target, guess.kind]
        learns = model.learns_next
        model.calls += 1
        if not learns or len(guess.features) < model.fused.num_features:  # or made while lean
            return
        is_daring = bool(guess.probabilities[0] > min_probability())
        model.daring += _DARING_STEP * (is_daring - model.daring)
        truth = np.zeros(self._layers[guess.target].num_experts, np.bool_)
        truth[experts] = True
        recall = self._count(FUSED, guess.target, guess.experts, guess.probabilities, truth)
        model.fused.update(guess.features, truth)
        if model.calls % (_JUDGE_EVERY if model.calls > _TAUGHT_CALLS else _LEARN_EVERY):
            return
        owned = self._owned[guess.target]
        for name, fusion in model.single.items():
            features = guess.features[self._rows[name]]
            alone = self._count(name, guess.target, *fusion.rank(features, owned), truth)
            fusion.update(features, truth)
            if name == "pregate":
                model.judged += 1
                model.lead += _LEAD_STEP * (recall - alone - model.lead)

    def _count(self, name: str, target: int, ranked: I64, p: F64, truth: Truth) -> float:
        # Returns the recall of this one guess.
        count = self._counts[target, name]
        is_right = truth[ranked]
        would_take = p > WOULD_TAKE
        num_wanted = int(truth.sum())
        count.wanted += num_wanted
        num_hits = int(is_right[:num_wanted].sum())
        count.hits += num_hits
        count.admitted += int(would_take.sum())
        count.right += int((would_take & is_right).sum())
        return num_hits / max(1, num_wanted)

    def _remember(self, history: _Stream, layer: int, kind: CallKind, experts: I64) -> None:
        model = self._models[layer, kind]
        is_heard = not (model.is_lean or model.is_mute) or model.calls % _LEARN_EVERY == 0
        if "markov" in self._predictors and kind is CallKind.ONE and is_heard:
            self._markov[layer].observe(self._sets(history, layer), experts)
        history.sets[layer] = experts
        if "locality" in self._predictors:
            if layer not in history.windows:
                history.windows[layer] = LocalityWindow(self._layers[layer].num_experts)
            history.windows[layer].observe(experts)


def _some(rows: Rows) -> Rows:
    if rows.num_rows <= SCORED_ROWS:
        return rows
    return rows.take(np.arange(SCORED_ROWS) * rows.num_rows // SCORED_ROWS)
