"""Stories: a plot, a cast, an opening, an ending."""

from collections.abc import Sequence

from tools.train_fables import cast
from tools.train_fables.cast import Character, make_character
from tools.train_fables.grammar import Chooser
from tools.train_fables.plots import HELPING, Plot
from tools.train_fables.plots_of_folly import FOLLY

PLOTS = HELPING + FOLLY
_POOLS: dict[str, Sequence[object]] = {
    "meals": cast.MEALS,
    "treasures": cast.TREASURES,
    "finds": cast.FINDS,
    "spots": cast.SPOTS,
    "barriers": cast.BARRIERS,
    "vessels": cast.VESSELS,
    "skills": cast.SKILLS,
}
_FIRST = (
    "[Once upon a time|Once upon a time|Once upon a time|Long ago|Many years ago|Once], "
    "[there was|there lived] {h.intro}. [{h} lived in a/an {h.home} in {place}.|{h.his} home was a/an {h.home} in {place}.|{h} lived in {place}.]",
    "[Once upon a time|Long ago|Many, many years ago], in {place}, there [lived|was] {h.intro}.",
    "[In {place} there once lived {h.intro}.|There was once {h.intro}, who lived in {place}.]",
    "{h} was {h.intro_short} who lived in [{place}|a/an {h.home} in {place}].",
    "[This is the story of {h}, {h.intro_short} from {place}.|Have you heard the story of {h}, {h.intro_short} from {place}?]",
)
_TRAITS = (
    "[Everyone who knew {h} liked {h.him}.|The neighbours often came to see {h.him}.|{h} had many dreams.]",
    "[{h} loved to sing in the morning.|{h} loved to look at the stars.|{h} loved to hear old stories.|{h} loved the smell of rain.|{h} loved {h.food} more than anything else.]",
    "[{h.his} house was small but warm.|It was a good place to live.|The days there were bright and long.|The wind there smelled of flowers.]",
    "[{h} woke up early every day.|{h} was always busy with something.|{h} liked to walk in the woods.|{h} liked to sit by the river and think.]",
)
_LESSON = (
    "[And so|That is how] {h} learned that {lesson}.|From that day on, {h} knew that {lesson}.|"
    "{h} never forgot that {lesson}.|^{lesson}.|The moral of the story is this: {lesson}.|"
    "Remember: {lesson}.|And that is why people say that {lesson}.|"
    "So you see that {lesson}."
)


def make_story(
    choose: Chooser,
    plot: Plot | None = None,
    hero: Character | None = None,
    is_titled: bool | None = None,
) -> str:
    """Return a story; what is not given is chosen."""
    plot = plot or choose.pick(PLOTS)
    slots = _cast(choose, plot, hero)
    body = [_opening(choose, plot, slots)]
    body += [choose.say(line, **slots).strip() for line in plot.lines]
    lesson = choose.say("[" + _LESSON + "]", lesson=choose.pick(plot.lessons), **slots)
    parts = [" ".join(body[: (split := choose.number(2, len(body) - 2))])]
    parts += [" ".join(body[split:]), lesson]
    if choose.chance(0.5):
        parts[-2:] = [" ".join(parts[-2:])]
    if choose.chance(0.15):
        parts.append("The end.")
    if is_titled if is_titled is not None else choose.chance(0.12):
        parts.insert(0, title_of(choose, plot, slots))
    return "\n\n".join(parts)


def hero_for(choose: Chooser, plot: Plot) -> Character:
    """Return somebody who can be the hero of a plot."""
    return make_character(choose, plot.roles["h"])


def title_of(choose: Chooser, plot: Plot, slots: dict[str, object]) -> str:
    """Return a story's title."""
    nouns = {key.upper(): _title_case(str(getattr(v, "noun", v))) for key, v in slots.items()}
    return _title_case(choose.say(plot.title, **slots, **nouns))


def _cast(choose: Chooser, plot: Plot, hero: Character | None) -> dict[str, object]:
    people: list[Character] = []
    slots: dict[str, object] = {}
    for slot, tags in plot.roles.items():
        who = hero if slot == "h" and hero else make_character(choose, tags, people)
        people.append(who)
        slots[slot] = who
    spots = choose.sample(cast.SPOTS, 2)
    for slot, pool in plot.things.items():
        slots[slot] = spots.pop() if pool == "spots" else choose.pick(_POOLS[pool])
    slots["season"] = choose.pick(cast.SEASONS)
    slots["place"] = choose.pick(cast.SETTINGS)
    return slots


def _opening(choose: Chooser, plot: Plot, slots: dict[str, object]) -> str:
    text = choose.say(choose.pick_weighted(_FIRST, (5, 3, 1, 1, 1)), **slots)
    if plot.opening and choose.chance(0.5):
        text = choose.say(plot.opening, **slots)
    if choose.chance(0.5):
        text += " " + choose.say(choose.pick(_TRAITS), **slots)
    return text


def _title_case(text: str) -> str:
    small = {"a", "an", "and", "the", "of", "to", "for", "at", "who", "in"}
    words = text.split()
    return " ".join(w if w in small and i else w[:1].upper() + w[1:] for i, w in enumerate(words))
