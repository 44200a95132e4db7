"""The ways of speculating that are compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Mode:
    """speculation: of SpeculationConfig; a shadow is named by its format until `with_shadows`.

    share: of the tokens asked for that it generates: 1 for all; a mode whose every token takes the
    same time needs few to tell.
    lanes: requests side by side, each with a coordinator of its own: a mode that only waits takes
    the others little; one that drafts with a model keeps a core busy.
    remembers: looks up in a history that holds the greedy answer to every prompt: the user was here
    before.
    """

    name: str
    speculation: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    lanes: int = 1
    remembers: bool = False

    @property
    def shadow(self) -> str | None:
        """The format of its shadow."""
        return self.speculation.get("shadow")

    def with_shadows(self, paths: Mapping[str, Path]) -> dict[str, Any]:
        """Return its configuration, with each shadow's path."""
        given = dict(self.speculation)
        if self.shadow is not None:
            given["shadow"] = str(paths[self.shadow])
        return given


OFF = Mode("off", {"mode": "off"}, share=1 / 6, lanes=4)
AUTO = Mode("auto, q4", {"mode": "auto", "shadow": "q4"})
BARE = Mode("auto, no shadow", {"mode": "auto"})
MODES = (
    OFF,
    Mode("lookup", {"mode": "lookup"}, lanes=5),
    Mode("lookup, second visit", {"mode": "lookup", "history": True}, lanes=5, remembers=True),
    Mode("shadow q3", {"mode": "shadow", "shadow": "q3"}, lanes=3),
    Mode("shadow q4", {"mode": "shadow", "shadow": "q4"}, lanes=2),
    Mode("batch, q4", {"mode": "batch", "shadow": "q4"}),
    AUTO,
)
