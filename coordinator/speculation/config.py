"""SpeculationConfig: who guesses and how much, as the command line or a caller says."""

from dataclasses import dataclass
from enum import StrEnum

from shoal import limits
from shoal.errors import UsageError

MAX_DIVERGENCE = 0.15  # share of a row's experts that a shadow may choose otherwise


class Speculate(StrEnum):
    """Who guesses."""

    AUTO = "auto"  # every drafter that was given, and lookup; where it pays
    OFF = "off"
    LOOKUP = "lookup"
    DRAFT = "draft"
    SHADOW = "shadow"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How a coordinator speculates; checked here, once.

    draft_model: name or path of an artifact; shadow: a format or the path of a shadow.
    max_draft: guesses that one pass verifies at most.
    draft_divergence: share of differing experts above which drafts become shorter.
    history: keep what was generated on disk and look it up.
    """

    mode: Speculate = Speculate.AUTO
    draft_model: str | None = None
    shadow: str | None = None
    max_draft: int = limits.MAX_DRAFT
    draft_divergence: float = MAX_DIVERGENCE
    history: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError naming the option and what it needs."""
        mode = self.mode
        if not 1 <= self.max_draft <= limits.MAX_DRAFT:
            raise UsageError(f"--max-draft {self.max_draft}: must be in 1..{limits.MAX_DRAFT}")
        if not 0 < self.draft_divergence <= 1:
            raise UsageError(
                f"--draft-divergence {self.draft_divergence}: must be above 0 and at most 1"
            )
        needs = {
            Speculate.DRAFT: (self.draft_model, "--draft-model"),
            Speculate.SHADOW: (self.shadow, "--shadow"),
            Speculate.BATCH: (self.shadow, "--shadow"),
        }
        if mode in needs and needs[mode][0] is None:
            raise UsageError(
                f"--speculate {mode} needs {needs[mode][1]}: there is nothing to draft with"
            )
        self._refuse_idle("--draft-model", self.draft_model is not None, {Speculate.DRAFT})
        self._refuse_idle("--history", self.history, {Speculate.LOOKUP})

    def check_shadow_is_used(self) -> None:
        """Raise UsageError for a shadow that nobody drafts with, where it has no other use."""
        users = {Speculate.SHADOW, Speculate.BATCH}
        self._refuse_idle("--shadow", self.shadow is not None, users)

    def _refuse_idle(self, option: str, is_given: bool, users: set[Speculate]) -> None:
        if is_given and self.mode not in {Speculate.AUTO, *users}:
            raise UsageError(
                f"{option} does nothing with --speculate {self.mode}: "
                f"use --speculate {max(users)}, or auto"
            )
