"""What a command line says of speculation; light, as --help reads it."""

from dataclasses import dataclass
from typing import Annotated

import typer

from coordinator.speculation.config import MAX_DIVERGENCE, Speculate, SpeculationConfig
from shoal import limits


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """Exact speculation: guesses that one pass verifies. The same tokens, in fewer round trips."""

    speculate: Annotated[
        Speculate,
        typer.Option(
            help="guess tokens and verify several in one pass; auto: where that is faster"
        ),
    ] = Speculate.AUTO
    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="a smaller model with the same tokenizer that guesses, in this process",
            show_default=False,
        ),
    ] = None
    shadow: Annotated[
        str | None,
        typer.Option(
            metavar="q3|q4|PATH",
            help="a coarser copy of the experts that guesses, in this process (`shoal shadow`)",
            show_default=False,
        ),
    ] = None
    max_draft: Annotated[
        int, typer.Option(metavar="N", help="guesses that one pass verifies at most")
    ] = limits.MAX_DRAFT
    draft_divergence: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="drafts become shorter while a shadow routes this share of a row otherwise",
        ),
    ] = MAX_DIVERGENCE
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            help="keep what is generated on this machine's disk and look guesses up there",
        ),
    ] = False

    def config(self) -> SpeculationConfig:
        """Return what was asked for. Raises UsageError."""
        return SpeculationConfig(
            self.speculate,
            self.draft_model,
            self.shadow,
            self.max_draft,
            self.draft_divergence,
            self.history,
        )
