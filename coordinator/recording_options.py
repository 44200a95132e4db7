"""--record-routing; light, as --help reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shoal.paths import user_path


@dataclass(frozen=True, slots=True)
class RecordingOptions:
    """What is kept of a request."""

    record_routing: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="add to this file which experts each token visited, wherever they are computed",
            show_default=False,
        ),
    ] = None

    @property
    def path(self) -> Path | None:
        """Where to; None: nothing is recorded."""
        return None if self.record_routing is None else user_path(self.record_routing)
