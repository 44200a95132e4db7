"""What speculation did for one request: frozen counts, for reports (core)."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DrafterFigures:
    """Of one drafter.

    drafted: guesses that a pass verified; accepted: those that were right; passes: that verified
    a guess of its; ahead: guesses that were made while a pass ran and were of use; draft_s: seconds
    that it was waited for; local_expert_bytes: of expert weights
    that it keeps in this process; divergence: the share of experts that it routed otherwise than
    the target lately, 0 where it does not run the target's layers; round_trips: to nodes, that
    drafting took.
    """

    drafted: int
    accepted: int
    passes: int
    draft_s: float
    local_expert_bytes: int
    divergence: float
    round_trips: int = 0
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class SpeculationFigures:
    """mode: what --speculate said; passes: of the decode, with or without guesses.

    round_trips: to nodes, one after the other: of the layers of the passes, and of drafting.
    local_expert_bytes: of all drafters together; two that share a shadow count it once.
    """

    mode: str
    passes: int = 0
    round_trips: int = 0
    local_expert_bytes: int = 0
    per_drafter: Mapping[str, DrafterFigures] = field(default_factory=dict)

    @property
    def drafted(self) -> int:
        return sum(figures.drafted for figures in self.per_drafter.values())

    @property
    def accepted(self) -> int:
        return sum(figures.accepted for figures in self.per_drafter.values())
