"""How often lookup's guesses are right, by length of the match: the table in speculation/lookup.py.

    python -m bench.lookup_chances smollm2

The model answers the prompts of bench/wan/texts, greedily and at temperature 0.8, in this process.
Each token that it chose is compared with what the longest match before it would have guessed. No
clock is involved. Random weights would say nothing: what a model repeats is learned.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from bench.wan.prompts import read_prompts
from coordinator.app import CoordinatorConfig, Feedback, OpenedModel, start_engine
from coordinator.cancellation import Cancellation
from coordinator.request import GenerationRequest, TokenGenerated
from coordinator.speculation.config import Speculate, SpeculationConfig
from coordinator.speculation.lookup import CHANCES, column_of
from coordinator.speculation.suffix_index import SuffixIndex

TEMPERATURES = (0.0, 0.8)
COLUMNS = ("once", "always", "mostly", "at most half")

Guess = tuple[int, int, bool]  # length of the match, column of the table, was it right


def answers(name: str, num_tokens: int) -> Iterator[tuple[str, Sequence[int], list[int]]]:
    """Yield (kind and temperature, prompt, answer) of every prompt."""
    speculation = SpeculationConfig(mode=Speculate.LOOKUP)  # the same tokens, sooner
    model = OpenedModel(CoordinatorConfig(model=name, max_context=4096, speculation=speculation))
    silent = Feedback(lambda _: None, lambda _: None, lambda *_: nullcontext(lambda _: None))
    with start_engine(model, silent) as coordinator:
        for temperature in TEMPERATURES:
            sampling = model.sampling({"temperature": temperature})
            for prompt in read_prompts(model):
                request = GenerationRequest(prompt.ids, num_tokens, sampling)
                events = coordinator.engine.generate(request, Cancellation())
                answer = [event.token_id for event in events if isinstance(event, TokenGenerated)]
                yield f"{prompt.kind} at {temperature}", prompt.ids, answer


def judged(prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Guess]:
    """Yield the guess at each token of the answer that had one."""
    index = SuffixIndex(len(prompt) + len(answer))
    index.extend(prompt)
    for token_id in answer:
        walk = index.walk()
        while walk.length and walk.best() is None:
            walk.shorten()
        found = walk.best() if walk.length else None
        if found is not None:
            best, total = found
            yield walk.length, column_of(best, total), best.token_id == token_id
        index.extend([token_id])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=220, help="of an answer, at most")
    arguments = parser.parse_args()
    right, seen, tokens = Counter[tuple[int, int]](), Counter[tuple[int, int]](), Counter[str]()
    hits = Counter[str]()
    for kind, prompt, answer in answers(arguments.model, arguments.tokens):
        tokens[kind] += len(answer)
        for length, column, is_right in judged(prompt, answer):
            row = max(known for known in CHANCES if known <= length)
            seen[row, column] += 1
            right[row, column] += is_right
            hits[kind] += is_right
    print(f"{tokens.total()} tokens; right of seen, by length of the match\n")
    print("length", *(f"{name:>14}" for name in COLUMNS))
    for row in CHANCES:
        cells = [f"{right[row, column]}/{seen[row, column]}" for column in range(len(COLUMNS))]
        print(f"{row:6}", *(f"{cell:>14}" for cell in cells))
    print("\nguessed right, of all tokens")
    for kind, count in tokens.items():
        print(f"{kind:20} {hits[kind] / count:.2f} of {count}")


if __name__ == "__main__":
    main()
