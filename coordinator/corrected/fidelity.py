"""Fidelity of the corrected pass: the same text exactly and with N sweeps, and what either writes.

*Teacher forced*: every token of a given text is run, one by one as in decoding, on the KV that the
mode itself has written; its logits are compared with the exact ones. *Free running*: each mode
writes, sampled with the same noise; what it wrote is then read exactly and compared step by step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator.array_types import F32, I64
from coordinator.batch import Batch, Piece, make_batch
from coordinator.cancellation import Cancellation
from coordinator.corrected.corrected_pass import CorrectedPass
from coordinator.corrected.experts import CorrectedExperts
from coordinator.corrected.fidelity_figures import (
    Closeness,
    closeness,
    distinct_grams,
    first_difference,
    overlap,
    perplexity,
)
from coordinator.corrected.surrogate import Surrogate
from coordinator.dispatch_stats import DispatchStats
from coordinator.expert_branch import DispatchedExperts, ExpertBranch
from coordinator.expert_dispatch import ExpertDispatch, PendingSums
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool, blocks_for
from coordinator.row_forms import RowForms
from coordinator.sequence import Sequence as Tokens
from coordinator.transformer import Transformer
from coordinator.weights import load_weights
from shoal import ops
from shoal.artifact import Artifact
from shoal.model_spec import RouterKind
from shoal.router import RoutingPlan
from shoal.rows import Rows


class Runner(Protocol):
    """What runs batches: a transformer, or a corrected pass over one."""

    def forward(self, batch: Batch, cache: KvArrays, cancellation: Cancellation) -> F32: ...


class Zeros:
    """Nothing in place of the experts, as larql's predispatch has it: a reference, never a mode."""

    def __init__(self, artifact: Artifact) -> None:
        self._dim = artifact.spec.model_dim

    def grid(self, layer: int) -> int:
        """See Surrogate."""
        return 0

    def sums(self, layer: int, forms: RowForms, plan: RoutingPlan) -> I64:
        """See Surrogate."""
        return np.zeros((forms.num_rows, self._dim), np.int64)


class RoutingTap:
    """A dispatch that remembers which experts each layer asked last."""

    def __init__(self, inner: ExpertDispatch) -> None:
        self._inner = inner
        self.asked: dict[int, NDArray[np.int32]] = {}

    @property
    def stats(self) -> DispatchStats:
        return self._inner.stats

    def start(self, layer: int, rows: Rows, plan: RoutingPlan) -> PendingSums:
        self.asked[layer] = plan.experts
        return self._inner.start(layer, rows, plan)

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True, slots=True)
class Written:
    """What a mode wrote, free running.

    agreement, kl: with the exact model that reads the same text. exact_perplexity: of the text, by
    the exact model. same_tokens: before the first that stream writes otherwise.
    distinct: share of its runs of four tokens that come once.
    """

    token_ids: tuple[int, ...]
    agreement: float
    kl: float
    exact_perplexity: float
    same_tokens: int
    distinct: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One mode beside the exact one. routing: None where every expert is always chosen."""

    forced: Closeness
    routing: float | None
    free: Written


@dataclass(frozen=True, slots=True)
class _Run:
    """logits: [T, V], of the tokens after the prompt. asked: per layer, [T, A]."""

    token_ids: tuple[int, ...]
    logits: F32
    asked: dict[int, NDArray[np.int32]]


class FidelityBench:
    """One text and one model; modes are measured one after the other.

    Args:
        text: ids: `num_prompt` that are read exactly, and those that are run one by one.
        num_free: tokens that are written, free running. sampling: how: with the same noise, modes
            whose logits are near write the same.
    """

    def __init__(
        self,
        artifact: Artifact,
        dispatch: ExpertDispatch,
        text: Sequence[int],
        num_prompt: int,
        num_free: int,
        sampling: ops.SamplingParams,
    ) -> None:
        assert 0 < num_prompt < len(text), (num_prompt, len(text))
        self._artifact = artifact
        self._tap = RoutingTap(dispatch)
        self._sampling = sampling
        self._text, self._num_prompt, self._num_free = list(text), num_prompt, num_free
        self._weights = load_weights(artifact)
        num_blocks = blocks_for(max(len(text), num_prompt + num_free))
        self._pool = KvBlockPool(num_blocks)
        self._kv = KvArrays(artifact.spec, artifact.kv_dtype, num_blocks)
        self._exact = self._transformer(DispatchedExperts(artifact, self._tap))
        self._forced = self._read(self._text)
        self._free = self._decode(self._exact, None)
        self._next_ids = self._text[num_prompt + 1 :]

    def stream(self) -> Fidelity:
        """Measure the exact mode too, token by token: the figures of no difference."""
        forced = self._decode(self._exact, self._text[self._num_prompt :])
        return self._fidelity(forced, self._free)

    def corrected(self, surrogate: Surrogate, num_sweeps: int) -> Fidelity:
        """Measure the corrected pass with that stand-in."""
        experts = CorrectedExperts(self._artifact, self._tap, surrogate)
        runner = CorrectedPass(self._transformer(experts), experts, num_sweeps)
        return self._measured(runner)

    def alone(self, experts: ExpertBranch) -> Fidelity:
        """Measure other experts by themselves, without a round trip."""
        return self._measured(self._transformer(experts))

    def _transformer(self, experts: ExpertBranch) -> Transformer:
        return Transformer(self._artifact.spec, self._weights, experts)

    def _measured(self, runner: Runner) -> Fidelity:
        forced = self._decode(runner, self._text[self._num_prompt :])
        return self._fidelity(forced, self._decode(runner, None))

    def _decode(self, runner: Runner, given: list[int] | None) -> _Run:
        """Read the prompt exactly, then run token after token; None: those it chooses."""
        tokens = self._tokens(self._text[: self._num_prompt])
        logits = self._pass(self._exact, tokens, self._num_prompt, 1)[-1]
        num_steps = self._num_free if given is None else len(given)
        rows, asked = [], []
        for step in range(num_steps):
            if given is None:
                tokens.extend([self._choose(logits, tokens)])
            else:
                tokens.extend([given[step]])
            self._tap.asked.clear()
            logits = self._pass(runner, tokens, 1, 1)[-1]
            rows.append(logits)
            asked.append(dict(self._tap.asked))
        ids = tuple(tokens.token_ids[self._num_prompt :].tolist())
        tokens.truncate(0)
        layers = asked[0]
        together = {layer: np.concatenate([step[layer] for step in asked]) for layer in layers}
        return _Run(ids, np.stack(rows), together)

    def _choose(self, logits: F32, tokens: Tokens) -> int:
        sampling = self._sampling
        return ops.sample(logits, sampling, tokens.token_ids, sampling.seed, 0, tokens.num_tokens)

    def _read(self, ids: list[int]) -> _Run:
        """Run a text exactly, at once: the same bits as one by one."""
        tokens = self._tokens(ids)
        first = self._num_prompt
        logits = self._pass(self._exact, tokens, len(ids), len(ids))[first:]
        tokens.truncate(0)
        asked = {layer: experts[first:] for layer, experts in self._tap.asked.items()}
        return _Run(tuple(ids[first:]), logits, asked)

    def _fidelity(self, forced: _Run, free: _Run) -> Fidelity:
        ids = list(free.token_ids)
        exact = self._read(self._text[: self._num_prompt] + ids).logits[:-1]
        written = closeness(exact, free.logits[:-1], ids[1:])
        exact_forced = self._forced.logits[:-1]
        return Fidelity(
            forced=closeness(exact_forced, forced.logits[:-1], self._next_ids),
            routing=self._routing_overlap(forced),
            free=Written(
                token_ids=free.token_ids,
                agreement=written.agreement,
                kl=written.kl,
                exact_perplexity=perplexity(exact, ids[1:]),
                same_tokens=first_difference(ids, self._free.token_ids),
                distinct=distinct_grams(ids),
            ),
        )

    def _routing_overlap(self, run: _Run) -> float | None:
        shares = [
            overlap(self._forced.asked[index], run.asked[index])
            for index, layer in enumerate(self._artifact.spec.layers)
            if index in run.asked
            and layer.router is not None
            and layer.router.kind is not RouterKind.ALL
        ]
        return sum(shares) / len(shares) if shares else None

    def _tokens(self, ids: list[int]) -> Tokens:
        tokens = Tokens(self._pool)
        tokens.extend(ids)
        return tokens

    def _pass(self, runner: Runner, tokens: Tokens, num_rows: int, num_logits: int) -> F32:
        reserved = tokens.try_reserve(tokens.num_cached + num_rows)
        assert reserved, "the pool was made for the longer of the texts"
        batch = make_batch([Piece(tokens, num_rows, num_logits)])
        logits = runner.forward(batch, self._kv, Cancellation())
        tokens.advance(num_rows)
        return logits
