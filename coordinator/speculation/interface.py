"""Drafter: guesses the tokens that follow. The target verifies them, so a guess costs time only."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from coordinator.array_types import F32
from coordinator.cancellation import Cancellation
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.routing_watch import Routing


@dataclass(frozen=True, slots=True)
class DraftToken:
    """One guess.

    chance: in (0, 1], how likely it is accepted if all guesses before it were, as the drafter sees
        it; whoever uses it calibrates it with what was accepted before.
    routing: which experts the row visited that this guess was sampled from, where the drafter ran
        the target's own layers; it is compared with what the target does there.
    """

    token_id: int
    chance: float
    routing: Routing | None = None


class Drafter(Protocol):
    """Guesses how a sequence goes on. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """How figures call it."""
        ...

    @property
    def local_expert_bytes(self) -> int:
        """Bytes of expert weights that it keeps in this process. Every figure states them."""
        ...

    def begin(self, request: GenerationRequest) -> None:
        """Hear of a new request, before its first `draft`. Its sampling draws drafts as well."""
        ...

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        """Guess token after token until nothing is left to say or the caller stops asking.

        The caller closes the iterator. What it takes from it may be more than is ever verified.

        Args:
            sequence: the target's, never changed here: all tokens so far, of which the last is not
                in the KV cache yet. It may change as soon as the iterator is closed.
        """
        ...

    def close(self) -> None:
        """Let go of memory and files. No iterator may be open."""
        ...


@runtime_checkable
class AskingDrafter(Drafter, Protocol):
    """A drafter that asks nodes, too."""

    @property
    def has_guess(self) -> bool:
        """Whether the next guess of the open iterator is there already, and costs nothing."""
        ...

    @property
    def num_round_trips(self) -> int:
        """Waits for nodes, one after the other, since it was made."""
        ...


@runtime_checkable
class HiddenDrafter(Drafter, Protocol):
    """A drafter that goes on from the target's own hidden rows, as EAGLE and MTP heads do."""

    def verified(self, hidden: F32) -> None:
        """Hear of rows that have become part of the text. Called before the next `draft`.

        To be noted, not computed with: no time is measured here, and no failure is expected.

        Args:
            hidden: [N, D], N >= 1: the target's residuals behind its last layer, before the final
                norm, of consecutive tokens. The first row of a request is that of the prompt's last
                token, the last one is always that of the token before the sequence's last, whose
                own row the next pass runs. The drafter may keep it; it is not to be changed.
        """
        ...
