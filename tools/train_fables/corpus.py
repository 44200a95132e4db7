"""The whole text: domains in their shares, as documents, reproducible by seed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tools.train_fables import facts, plain
from tools.train_fables.chat import END, make_chat
from tools.train_fables.grammar import Chooser
from tools.train_fables.stories import make_story


@dataclass(frozen=True)
class Document:
    """One text. nats: of the choices that made it, an upper bound of its information."""

    domain: str
    text: str
    nats: float


def _directions(choose: Chooser) -> str:
    return plain.make_recipe(choose) if choose.chance(0.75) else plain.make_how_to(choose)


def _facts(choose: Chooser) -> str:
    return facts.make_quiz(choose) if choose.chance(0.6) else facts.make_statements(choose)


def _news(choose: Chooser) -> str:
    return plain.make_weather(choose) if choose.chance(0.5) else plain.make_news(choose)


def _code(choose: Chooser) -> str:
    return plain.make_code(choose) if choose.chance(0.5) else plain.make_list(choose)


# domain -> what makes a document of it, its share of documents (stories are the longest)
DOMAINS: dict[str, tuple[Callable[[Chooser], str], float]] = {
    "fable": (lambda choose: make_story(choose), 30),
    "chat": (make_chat, 25),
    "facts": (_facts, 13),
    "recipe": (_directions, 9),
    "letter": (plain.make_letter, 8),
    "news": (_news, 7),
    "rhyme": (plain.make_rhyme, 4),
    "code": (_code, 4),
}
SPLITS = ("train", "seed", "held-out")


def document(index: int, split: str, domain: str | None = None) -> Document:
    """Return the document of that index: the same for ever. split: one of SPLITS."""
    choose = Chooser(index, split)
    if domain is None:
        names = list(DOMAINS)
        domain = choose.pick_weighted(names, [DOMAINS[name][1] for name in names])
    return Document(domain, DOMAINS[domain][0](choose), choose.nats)


def documents(split: str, start: int = 0) -> Iterator[Document]:
    """Yield document after document without end."""
    index = start
    while True:
        yield document(index, split)
        index += 1


__all__ = ["DOMAINS", "END", "SPLITS", "Document", "document", "documents"]
