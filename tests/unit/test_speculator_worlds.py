"""The speculator in seeded worlds: real drafters' timing and luck are played, all deciding is real.

Time is a number that passes and guesses add to. A drafter knows the text and errs where its dice
say so; a pass of the model accepts what is right, as the engine does.
"""

import random
from collections.abc import Generator
from dataclasses import dataclass

import pytest

from coordinator.cancellation import Cancellation
from coordinator.kv_cache import KvBlockPool
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from coordinator.speculation.config import Speculate
from coordinator.speculation.interface import Drafter, DraftToken
from coordinator.speculation.pass_time import PassTime
from coordinator.speculation.speculator import Speculator
from shoal import limits
from shoal.ops import SamplingParams
from support.speculation_world import Text, World, noisy

PROMPT = [1] * 100
NUM_TOKENS = 400
VOCABULARY = 1 << 20


class Clock:
    """Seconds that somebody adds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Luck:
    """How a drafter fares: of a world, its chances and what a guess takes.

    is_there: share of the places where it has anything to say.
    """

    name: str
    chances: tuple[float, ...]
    guess_s: float
    local_expert_bytes: int
    spell: int = 60
    is_there: float = 1.0


class PlayedDrafter:
    """Says the truth where its dice are good."""

    def __init__(self, luck: Luck, truth: list[int], clock: Clock, seed: int) -> None:
        self.name, self.local_expert_bytes = luck.name, luck.local_expert_bytes
        self._luck, self._truth, self._clock = luck, truth, clock
        self._text = Text(World(chances=luck.chances, spell=luck.spell), len(truth), seed)
        self._rng = random.Random(seed)

    def begin(self, request: GenerationRequest) -> None:
        pass

    def draft(
        self, sequence: Sequence, cancellation: Cancellation
    ) -> Generator[DraftToken, None, None]:
        position = sequence.num_tokens
        if self._rng.random() >= self._luck.is_there:
            return
        chances = self._text.chances(position)
        num_right = self._text.accepted(position, len(chances))
        for place, chance in enumerate(chances):
            self._clock.now_s += self._luck.guess_s
            token_id = self._truth[position + place]
            yield DraftToken(token_id if place < num_right else token_id + 1, chance)

    def close(self) -> None:
        pass


def seconds(world: World, lucks: list[Luck], seed: int) -> float:
    """Return what an answer takes. The loop is the engine's: draft, pass, accept."""
    rng, clock = random.Random(seed), Clock()
    truth = [rng.randrange(1000) * 2 for _ in range(len(PROMPT) + NUM_TOKENS + 100)]
    drafters: list[Drafter] = [PlayedDrafter(luck, truth, clock, seed + 1) for luck in lucks]
    speculator = Speculator(
        drafters,
        PassTime(world.num_experts, world.experts_per_token),
        clock,
        mode=Speculate.AUTO,
        vocab_size=VOCABULARY,
        max_draft=limits.MAX_DRAFT,
        divergence=1.0,
    )
    sequence = Sequence(KvBlockPool(1))
    sequence.extend(truth[: len(PROMPT)])

    def run(num_rows: int) -> float:
        """Return what it takes without noise, which only the speculator is told of."""
        took_s = noisy(rng, world, num_rows)
        speculator.ran(num_rows, took_s)
        return world.pass_s(num_rows)

    speculator.begin(GenerationRequest(tuple(truth[: len(PROMPT)]), NUM_TOKENS, SamplingParams()))
    run(len(PROMPT))
    speculator.judged(0, 0)
    sequence.extend([truth[sequence.num_tokens]])
    end, passes_s = len(PROMPT) + NUM_TOKENS, 0.0
    while sequence.num_tokens < end:
        room = end - sequence.num_tokens - 1
        draft = speculator.draft(sequence, room, Cancellation())
        assert len(draft) <= room
        passes_s += run(1 + len(draft))
        start = sequence.num_tokens
        right = 0
        while right < len(draft) and draft[right] == truth[start + right]:
            right += 1
        sequence.extend(truth[start : start + right + 1])
        speculator.judged(right, min(len(draft), right + 1))
    speculator.close()
    return passes_s + clock.now_s


LOOKUP = Luck("lookup", (0.1, 0.9), 1e-5, 0, is_there=0.6)
USELESS = Luck("lookup", (0.05,), 1e-5, 0)
SHADOW = Luck("shadow", (0.85,), 0.012, 10**9)
SLOW = Luck(
    "draft", (0.5,), 0.2, 10**9
)  # how slow is known after two guesses: of a far link's size
WORLDS = [
    World(rtt_s=rtt_s, row_s=row_s, expert_s=expert_s, noise=0.1)
    for rtt_s in (0.0, 0.001, 0.02, 0.045)
    for row_s, expert_s in ((0.001, 0.0), (0.01, 0.0), (0.0, 4e-5))
]


@pytest.mark.parametrize(
    "world", WORLDS, ids=[f"{w.rtt_s * 1000:g} ms, {w.row_s}, {w.expert_s}" for w in WORLDS]
)
def test_no_drafters_make_it_slower_by_more_than_three_per_cent(world: World) -> None:
    seed = WORLDS.index(world)
    off_s = seconds(world, [], seed)
    choices = [[LOOKUP], [USELESS], [SHADOW], [LOOKUP, SHADOW]]
    if world.rtt_s >= 0.02:
        choices += [[SLOW], [USELESS, SLOW]]
    for lucks in choices:
        assert seconds(world, lucks, seed) <= 1.03 * off_s, lucks


@pytest.mark.parametrize("seed", range(3))
def test_two_drafters_are_about_as_good_as_the_better_one_or_better(seed: int) -> None:
    world = World(rtt_s=0.045, row_s=0.003, noise=0.1)
    off_s = seconds(world, [], seed)
    alone_s = [seconds(world, [luck], seed) for luck in (LOOKUP, SHADOW)]
    both_s = seconds(world, [LOOKUP, SHADOW], seed)
    assert both_s <= 1.1 * min(alone_s) < 0.4 * off_s


def test_a_drafter_that_is_never_right_is_hardly_asked() -> None:
    world = World(rtt_s=0.045, row_s=0.003, noise=0.1)
    hopeless = Luck("shadow", (0.02,), 0.05, 10**9)
    assert seconds(world, [hopeless], 0) <= 1.02 * seconds(world, [], 0)
