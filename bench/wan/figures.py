"""What is made of the measurements: rates, shares, repetition. No I/O, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

N_GRAM = 3  # tokens: what prompt lookup needs at least to make a sensible guess

Result = dict[str, Any]  # what a worker answers (worker.py), with what was asked


@dataclass(frozen=True, slots=True)
class Totals:
    """Of several requests of one mode. seconds: from the start of each to its last token."""

    num_tokens: int
    seconds: float
    decoded: int
    decode_s: float
    passes: int
    drafted: int
    accepted: int
    round_trips: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decoded / self.decode_s if self.decoded else 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.decoded / self.passes if self.passes else 0.0

    @property
    def accepted_per_pass(self) -> float:
        return self.accepted / self.passes if self.passes else 0.0

    @property
    def round_trips_per_token(self) -> float:
        return self.round_trips / self.num_tokens

    @property
    def pass_s(self) -> float:
        """Drafting and pass together."""
        return self.decode_s / self.passes if self.passes else 0.0

    def figures(self) -> dict[str, float]:
        """Return all of them, for the result file."""
        return {
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "passes": self.passes,
            "tokens_per_pass": self.tokens_per_pass,
            "accepted_per_pass": self.accepted_per_pass,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "round_trips_per_token": self.round_trips_per_token,
            "pass_s": self.pass_s,
        }


def totals(results: Sequence[Result]) -> Totals:
    """Add up requests: total tokens by total time, not a mean of rates."""
    counts = [len(result["token_ids"]) for result in results]
    return Totals(
        num_tokens=sum(counts),
        seconds=sum(r["first_token_s"] + r["decode_s"] for r in results),
        decoded=sum(count - 1 for count in counts),  # the first one is of the prompt's pass
        decode_s=sum(r["decode_s"] for r in results),
        passes=sum(r["passes"] for r in results),
        drafted=sum(r["drafted"] for r in results),
        accepted=sum(r["accepted"] for r in results),
        round_trips=sum(r["prefill_round_trips"] + r["decode_round_trips"] for r in results),
    )


def repetition(ids: Sequence[int], begin: int = 0, n: int = N_GRAM) -> float:
    """Return the share of n-grams ending at `begin` or later that came before in the ids."""
    seen: set[tuple[int, ...]] = set()
    repeated = counted = 0
    for end in range(n, len(ids) + 1):
        gram = tuple(ids[end - n : end])
        if end > begin:
            counted += 1
            repeated += gram in seen
        seen.add(gram)
    return repeated / counted if counted else 0.0
