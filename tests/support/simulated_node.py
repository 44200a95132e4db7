"""A node of the simulated world (support.dispatch_simulator): what it is and what it has."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class SimNode:
    """One node. process: which of its lives. connection: None while it is lost."""

    number: int
    work_s: float
    is_up: bool = True
    is_frozen: bool = False
    is_draining: bool = False
    process: int = 0
    connection: int | None = None
    met_process: int = -1
    slowness: float = 1.0
    loss: float = 0.0
    refusal: float = 0.0
    free_s: float = 0.0
    held: dict[int, int] = field(default_factory=dict)  # attempt -> call
    backlog: list[Callable[[], None]] = field(default_factory=list)
    is_progressing: bool = False
