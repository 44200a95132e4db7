"""A world to speculate in: a seeded link, machine and text, and one drafter; time is counted.

The loop here uses the cores as the engine does: draft while the planner wants more, verify the
best length, tell every core what came of it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.speculation.acceptance import Acceptance
from coordinator.speculation.pass_time import PassTime
from coordinator.speculation.planner import Planner
from shoal import limits


@dataclass(frozen=True)
class World:
    """num_layers round trips a pass; times in seconds.

    chances: true chances of a guess by text, one of which is at work for `spell` tokens or so.
    optimism: what the drafter says is true ** (1 / optimism): above 1 it believes too much.
    guess_s: what a guess costs; a free one (lookup) is compared with what came even if unverified.
    stalls: share of passes that take ten times as long.
    """

    rtt_s: float = 0.0
    num_layers: int = 30
    compute_s: float = 0.010
    row_s: float = 0.0
    expert_s: float = 0.0
    num_experts: int = 128
    experts_per_token: int = 8
    chances: tuple[float, ...] = (0.7,)
    spell: int = 200
    spread: float = 0.1
    optimism: float = 1.0
    guess_s: float = 0.0
    noise: float = 0.05
    stalls: float = 0.01
    prompt: int = 100

    def pass_s(self, num_rows: int) -> float:
        distinct = self.num_experts * (
            1 - (1 - self.experts_per_token / self.num_experts) ** num_rows
        )
        return (
            self.num_layers * (self.rtt_s + self.expert_s * distinct)
            + self.compute_s
            + self.row_s * num_rows
        )


@dataclass
class Outcome:
    seconds: float = 0.0
    off_s: float = 0.0
    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, world: World, length: int, tokens: int, draft_s: float) -> None:
        self.tokens += tokens
        self.passes += 1
        self.drafted += length
        self.lengths.append(length)
        self.seconds += mean_s(world, 1 + length) + draft_s
        self.off_s += tokens * mean_s(world, 1)

    @property
    def slower(self) -> float:
        """Seconds over those without speculation: 1.0 is a draw."""
        return self.seconds / self.off_s


class Text:
    """What is to come, the same however it is guessed: a chance and a die for every token."""

    def __init__(self, world: World, num_tokens: int, seed: int) -> None:
        rng = random.Random(seed)
        regime = rng.choice(world.chances)
        self._chances: list[float] = []
        self._dice: list[float] = []
        for _ in range(num_tokens + limits.MAX_DRAFT + 1):
            if rng.random() < 1 / world.spell:
                regime = rng.choice(world.chances)
            self._chances.append(min(0.99, max(0.01, regime + rng.gauss(0, world.spread))))
            self._dice.append(rng.random())

    def chances(self, position: int) -> list[float]:
        """Return the true chances of the guesses from there on."""
        return self._chances[position : position + limits.MAX_DRAFT]

    def accepted(self, position: int, length: int) -> int:
        """Return how many of so many guesses are right."""
        count = 0
        while count < length and self._dice[position + count] < self._chances[position + count]:
            count += 1
        return count


def noisy(rng: random.Random, world: World, num_rows: int) -> float:
    seconds = world.pass_s(num_rows) * max(0.5, 1 + rng.gauss(0, world.noise))
    return seconds * (10 if rng.random() < world.stalls else 1)


def run_static(world: World, length: int, num_tokens: int, seed: int) -> Outcome:
    """Draft `length` guesses each step, whatever happens."""
    text, outcome = Text(world, num_tokens, seed), Outcome()
    while outcome.tokens < num_tokens:
        tokens = 1 + text.accepted(outcome.tokens, length)
        outcome.add(world, length, tokens, length * world.guess_s)
    return outcome


def mean_s(world: World, num_rows: int) -> float:
    return world.pass_s(num_rows) * (1 + 9 * world.stalls)


def run_auto(
    world: World,
    num_tokens: int,
    seed: int,
    watch: Callable[[Planner, PassTime], None] = lambda _planner, _time: None,
) -> Outcome:
    """Let the planner decide. Time is what passes take on average, so luck with noise is none."""
    text, rng, outcome = Text(world, num_tokens, seed), random.Random(seed + 1), Outcome()
    pass_time = PassTime(world.num_experts, world.experts_per_token)
    acceptance, planner = Acceptance(), Planner(pass_time)
    if world.prompt:
        pass_time.observe(world.prompt, noisy(rng, world, world.prompt) * 1.2)
    while outcome.tokens < num_tokens:
        true = text.chances(outcome.tokens)
        raws: list[float] = []
        chances: list[float] = []
        while planner.wants(chances, acceptance.mean, world.guess_s):
            raws.append(true[len(raws)] ** (1 / world.optimism))
            chances.append(acceptance.chance(raws[-1]))
        draft_s = len(raws) * world.guess_s
        length = planner.best_length(chances, draft_s)
        pass_s = noisy(rng, world, 1 + length)
        accepted = text.accepted(outcome.tokens, length)
        pass_time.observe(1 + length, pass_s)
        acceptance.observe(raws[:length], accepted)
        if not length and not world.guess_s:
            raw = true[0] ** (1 / world.optimism)
            acceptance.observe([raw], text.accepted(outcome.tokens, 1))
        planner.observe(length, 1 + accepted, pass_s, draft_s)
        outcome.add(world, length, 1 + accepted, draft_s)
        watch(planner, pass_time)
    return outcome
