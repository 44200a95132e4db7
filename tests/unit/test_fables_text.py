"""The shipped model's text: reproducible, grammatical, its held-out part apart."""

import re

import numpy as np
import pytest

from tools.train_fables.cast import KINDS
from tools.train_fables.chat import CHAT_TEMPLATE, make_chat
from tools.train_fables.corpus import DOMAINS, Document, document
from tools.train_fables.facts import make_fact
from tools.train_fables.grammar import Chooser
from tools.train_fables.ngrams import KneserNey
from tools.train_fables.stories import PLOTS, make_story

COUNT = 400


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [document(index, "train") for index in range(COUNT)]


def test_a_document_is_the_same_every_time_and_differs_by_seed_and_split() -> None:
    assert document(7, "train") == document(7, "train")
    assert len({document(7, split).text for split in ("train", "seed", "held-out")}) == 3
    assert document(8, "train") != document(7, "train")


def test_every_domain_comes_up(documents: list[Document]) -> None:
    assert {d.domain for d in documents} == set(DOMAINS)
    assert all(d.nats > 0 for d in documents)


def test_no_template_is_left_unfilled(documents: list[Document]) -> None:
    left = re.compile(r"[{}^]|a/an|\[[^x ]|\|(?!\w+\|>)(?! )|  |\b[Aa] [aeio]\w|\b[Aa]n [bcdfgjk]")
    prose = [d for d in documents if d.domain != "code"]
    found = [
        (d.domain, m.group(), d.text[:60])
        for d in prose
        if (m := left.search(without_tags(d.text)))
    ]
    assert not found


def without_tags(text: str) -> str:
    return re.sub(r"<\|\w+\|>", "\n", text)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.topic)
def test_every_plot_ends_with_its_lesson(plot: object) -> None:
    for seed in range(5):
        chosen = next(p for p in PLOTS if p is plot)
        text = make_story(Chooser(seed, "train"), chosen)
        assert any(lesson in text[-400:].lower() for lesson in map(str.lower, chosen.lessons))
        assert text.removesuffix('"')[-1] in ".!?"


def test_stories_do_not_repeat() -> None:
    stories = [make_story(Chooser(seed, "train")) for seed in range(500)]
    assert len(set(stories)) == len(stories)


def test_names_and_kinds_that_are_held_out_never_meet_in_training() -> None:
    train, held_out = Chooser(0, "train"), Chooser(0, "held-out")
    pairs = [(name, kind.noun) for name in ("Pip", "Maya", "Dora", "Leo") for kind in KINDS]
    kept_back = [pair for pair in pairs if held_out.allows(*pair)]
    assert kept_back, "nothing is held out: generalisation is not tested"
    assert not any(train.allows(*pair) for pair in kept_back)
    assert all(train.allows(*pair) or pair in kept_back for pair in pairs)


def test_sums_are_right() -> None:
    checked = 0
    for seed in range(600):
        question, answer = make_fact(Chooser(seed, "train"))
        if match := re.fullmatch(r"(\d+) (plus|minus) (\d+) is (\d+)\.", answer):
            first, sign, second, result = match.groups()
            value = int(first) + int(second) if sign == "plus" else int(first) - int(second)
            assert value == int(result), question
            checked += 1
    assert checked > 30


def test_conversations_are_what_the_template_writes() -> None:
    import datetime

    from coordinator.chat_template import ChatTemplate

    template = ChatTemplate(CHAT_TEMPLATE, {}, datetime.datetime.now)
    for seed in range(50):
        text = make_chat(Chooser(seed, "train"))
        turns = re.findall(r"<\|(system|user|assistant)\|>([^<]*)", text)
        messages = [{"role": role, "content": content} for role, content in turns]
        rendered = template.render(messages, add_generation_prompt=False)
        assert rendered.removesuffix("<|end|>") == text


def test_the_five_gram_baseline_is_a_distribution() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 7, 500).astype(np.uint16)
    starts = np.arange(0, 500, 50)
    model = KneserNey(tokens, starts, 7)
    for length in (1, 2, 5, 8):
        context = tokens[100 : 100 + length]
        ends = [np.append(context, np.uint16(token)) for token in range(7)]
        total = sum(float(np.exp(model.log_probs(end)[-1])) for end in ends)
        assert total == pytest.approx(1.0)
