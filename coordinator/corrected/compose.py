"""Composition of --moe-dispatch: how an engine's tokens meet their experts, and who is told."""

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.corrected.config import MIN_SHADOW_BITS, MoeDispatch, MoeDispatchConfig
from coordinator.corrected.corrected_pass import CorrectedPass
from coordinator.corrected.experts import CorrectedExperts
from coordinator.corrected.surrogate import Shadow, expert_bits
from coordinator.expert_dispatch import ExpertDispatch
from coordinator.speculation.shadow_experts import ShadowExperts
from coordinator.transformer import Transformer
from coordinator.weights import ModelWeights
from shoal.artifact import Artifact
from shoal.errors import UsageError

SLOW_TOKENS_PER_S = 5.0  # that a link allows: below, how to raise it is told


@dataclass(frozen=True, slots=True)
class MoeDispatchFigures:
    """How the tokens of an engine meet their experts. For reports.

    asked: what --moe-dispatch said; mode: what it came to, never an approximate one by itself.
    num_iters: round trips of an approximate token; None: it is exact.
    shadow_format, shadow_expert_bytes: of the stand-in of an approximate one.
    link_rtt_ms: to the farthest node, at the start; None: no nodes.
    """

    asked: MoeDispatch
    mode: MoeDispatch
    num_iters: int | None = None
    shadow_format: str | None = None
    shadow_expert_bytes: int = 0
    link_rtt_ms: float | None = None

    @property
    def is_exact(self) -> bool:
        return self.num_iters is None

    def words(self) -> str:
        """Return what the line of figures says; nothing of an exact mode."""
        if self.num_iters is None:
            return ""
        return (
            f"NOT EXACT: {trips(self.num_iters)} a token, corrected with"
            f" {self.shadow_expert_bytes / 1e6:.0f} MB of experts here"
        )


def check_shadow(shadow: Artifact, min_bits: float = MIN_SHADOW_BITS) -> None:
    """Raise UsageError for a stand-in too coarse for --moe-dispatch batch."""
    bits = expert_bits(shadow)
    if bits < min_bits:
        raise UsageError(
            f"--shadow {shadow.path} has {bits:.1f} bits a weight: --moe-dispatch batch needs"
            f" {min_bits:g} or more, with fewer what it says is garbage. Make another with"
            " `shoal shadow MODEL OUT --format q4`"
        )


def corrected_pass(
    artifact: Artifact,
    weights: ModelWeights,
    dispatch: ExpertDispatch,
    shadow: ShadowExperts,
    num_sweeps: int,
) -> CorrectedPass:
    """Return what runs the tokens of an approximate engine; the others are its target's."""
    surrogate = Shadow(shadow.artifact, shadow.dispatch)
    experts = CorrectedExperts(artifact, dispatch, surrogate)
    return CorrectedPass(Transformer(artifact.spec, weights, experts), experts, num_sweeps)


def announce(
    figures: MoeDispatchFigures,
    num_round_trips: int,
    could_guess: bool,
    tell: Callable[[str], None],
) -> None:
    """Tell what a user must know of the mode before the first token.

    Args:
        num_round_trips: of an exact pass. could_guess: whether more drafters could be asked for.
    """
    if figures.num_iters is not None:
        instead = f" instead of {num_round_trips}" if num_round_trips else ""
        tell(
            f"NOT EXACT: --moe-dispatch batch takes {trips(figures.num_iters)} a token{instead} and"
            " computes the text nearly, not exactly, as the model would (docs/batch-dispatch.md)."
            " Exact and quick on a slow link: --speculate batch"
        )
    elif figures.link_rtt_ms is not None and figures.asked is MoeDispatch.AUTO and could_guess:
        seconds = figures.link_rtt_ms / 1e3 * num_round_trips
        if seconds * SLOW_TOKENS_PER_S > 1.0:
            tell(
                f"the nodes are {figures.link_rtt_ms:.0f} ms away: {num_round_trips} round trips"
                f" allow {1 / seconds:.1f} passes a second. Guesses make more than a token of each,"
                " the same text: --shadow q4 or --draft-model"
            )


def trips(count: int) -> str:
    """Return a number of round trips in words."""
    return f"{count} round trip" if count == 1 else f"{count} round trips"


def figures_of(
    config: MoeDispatchConfig, shadow: ShadowExperts | None, link_rtt_s: float | None
) -> MoeDispatchFigures:
    """Return what a configuration comes to."""
    rtt_ms = None if link_rtt_s is None else link_rtt_s * 1e3
    if config.is_exact or shadow is None:
        return MoeDispatchFigures(config.mode, MoeDispatch.STREAM, link_rtt_ms=rtt_ms)
    return MoeDispatchFigures(
        config.mode,
        MoeDispatch.BATCH,
        config.num_sweeps,
        shadow.artifact.manifest.quantisation,
        shadow.num_bytes,
        rtt_ms,
    )
