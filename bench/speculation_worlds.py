"""What the planner of speculation loses and leaves lying, in seeded worlds where time is a number.

    python -m bench.speculation_worlds

Worlds are drawn at random: links of 0 to 100 ms, rows and experts that cost nothing or a lot, texts
that are easy, hard or both by turns, drafters that are free or slow and believe too much or too
little, noise and stalls. *slower*: seconds over those of plain decoding. *regret*: over those of
the best fixed draft length in hindsight, 0 among them, where that gains a tenth or more. Each world
begins knowing nothing.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.speculation_world import World, run_auto, run_static

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
TOKENS = (64, 200, 600, 2000)


def draw(rng: random.Random) -> World:
    """Return a world; one in two is behind a link of 20 ms or more."""
    return World(
        rtt_s=rng.choice((0.0, 0.001, 0.005, 0.02, 0.045, 0.1)),
        num_layers=rng.choice((6, 30)),
        row_s=rng.choice((0.0, 0.001, 0.003, 0.01, 0.03)),
        expert_s=rng.choice((0.0, 0.0, 1e-5, 4e-5)),
        num_experts=rng.choice((16, 128)),
        chances=rng.choice(((0.02,), (0.3,), (0.5,), (0.7,), (0.9,), (0.05, 0.9), (0.2, 0.6))),
        spell=rng.choice((30, 200)),
        optimism=rng.choice((0.5, 1.0, 2.0, 4.0)),
        guess_s=rng.choice((0.0, 0.0, 0.002, 0.01, 0.05)),
        noise=rng.choice((0.0, 0.05, 0.15)),
        prompt=rng.choice((5, 100, 512)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{arguments.worlds} worlds; slower: 1.0 is plain decoding")
    print("tokens  link      worst   95 %   over 1.03   mean   mean regret")
    for num_tokens in TOKENS:
        rng = random.Random(arguments.seed)
        near: list[tuple[float, float]] = []
        far: list[tuple[float, float]] = []
        for number in range(arguments.worlds):
            world = draw(rng)
            slower = run_auto(world, num_tokens, number).slower
            best = min(run_static(world, n, num_tokens, number).slower for n in LENGTHS)
            (far if world.rtt_s >= 0.02 else near).append((slower, best))
        for name, outcomes in (("< 20 ms", near), (">= 20 ms", far)):
            slowers = sorted(slower for slower, _ in outcomes)
            most = slowers[int(0.95 * len(slowers))]
            regrets = [slower / best for slower, best in outcomes if best < 0.9]
            print(
                f"{num_tokens:6}  {name:8} {slowers[-1]:6.3f} {most:6.3f}"
                f" {sum(s > 1.03 for s in slowers):5} of {len(slowers):3}"
                f" {sum(slowers) / len(slowers):6.3f} {sum(regrets) / len(regrets):10.3f}"
            )


if __name__ == "__main__":
    main()
