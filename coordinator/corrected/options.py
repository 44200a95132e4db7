"""--moe-dispatch and --moe-iters; light, as --help reads it."""

from dataclasses import dataclass
from typing import Annotated

import typer

from coordinator.corrected.config import DEFAULT_ITERS, MAX_ITERS, MoeDispatch, MoeDispatchConfig


@dataclass(frozen=True, slots=True)
class MoeDispatchOptions:
    """How many round trips a token takes."""

    moe_dispatch: Annotated[
        MoeDispatch,
        typer.Option(
            help="stream: a round trip a layer, exact; batch: a few a token, NOT exact, needs "
            "--shadow; auto: measures the link and stays exact"
        ),
    ] = MoeDispatch.AUTO
    moe_iters: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"with batch: round trips a token, 1 to {MAX_ITERS}; more are nearer to the exact"
            f" text; default: {DEFAULT_ITERS}",
            show_default=False,
        ),
    ] = None

    def config(self) -> MoeDispatchConfig:
        """Return what was asked for. Raises UsageError."""
        return MoeDispatchConfig(self.moe_dispatch, self.moe_iters)
