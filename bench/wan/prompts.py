"""What is asked: the files of texts/, four kinds, at least two of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.app import OpenedModel, message

FOLDER = Path(__file__).parent / "texts"
KINDS = ("summarise", "code", "question", "story")
LONG_TOKENS = 512  # the prompt whose round trips are counted


@dataclass(frozen=True, slots=True)
class Prompt:
    """One of them, as the model's token ids."""

    name: str
    kind: str
    ids: tuple[int, ...]


def read_prompts(model: OpenedModel) -> tuple[Prompt, ...]:
    """Return all prompts, the kinds side by side: the first of each, then the second."""
    by_kind = [sorted(FOLDER.glob(f"{kind}-*.txt")) for kind in KINDS]
    assert all(len(paths) >= 2 for paths in by_kind), "two prompts of each kind"
    turns = [[paths[turn] for paths in by_kind] for turn in range(2)]
    return tuple(_read(model, path) for turn in turns for path in turn)


def one_of_each(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the first prompt of every kind."""
    return [next(prompt for prompt in prompts if prompt.kind == kind) for kind in KINDS]


def long_prompt(model: OpenedModel) -> tuple[int, ...]:
    """Return LONG_TOKENS ids of text: both texts to summarise, one after the other."""
    texts = [path.read_text("utf-8") for path in sorted(FOLDER.glob("summarise-*.txt"))]
    ids = model.tokenizer.encode("\n".join(texts))
    assert len(ids) >= LONG_TOKENS, len(ids)
    return tuple(ids[:LONG_TOKENS])


def _read(model: OpenedModel, path: Path) -> Prompt:
    text = path.read_text("utf-8").strip()
    if path.stem.endswith("-raw"):
        ids = model.tokenizer.encode(text)
    else:
        rendered = model.chat_template().render([message("user", text)])
        ids = model.tokenizer.encode_templated(rendered)
    return Prompt(path.stem, path.stem.partition("-")[0], tuple(ids))
