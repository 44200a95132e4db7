"""Questions and answers about a small closed world, and the same facts as plain sentences."""

from collections.abc import Callable

from tools.train_fables import cast
from tools.train_fables.grammar import Chooser, tidy

CAPITALS: dict[str, str] = {
    pair.split(":")[0]: pair.split(":")[1]
    for pair in (
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon England:London "
        "Scotland:Edinburgh Wales:Cardiff Ireland:Dublin Norway:Oslo Sweden:Stockholm "
        "Denmark:Copenhagen Finland:Helsinki Iceland:Reykjavik Poland:Warsaw Austria:Vienna "
        "Switzerland:Bern Belgium:Brussels Greece:Athens Turkey:Ankara Russia:Moscow "
        "Ukraine:Kyiv Hungary:Budapest Romania:Bucharest Bulgaria:Sofia Croatia:Zagreb "
        "Serbia:Belgrade Egypt:Cairo Kenya:Nairobi Ethiopia:Addis_Ababa Ghana:Accra "
        "Nigeria:Abuja Morocco:Rabat Japan:Tokyo China:Beijing India:New_Delhi Nepal:Kathmandu "
        "Thailand:Bangkok Vietnam:Hanoi Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Canada:Ottawa "
        "Mexico:Mexico_City Cuba:Havana Brazil:Brasilia Peru:Lima Chile:Santiago "
        "Argentina:Buenos_Aires Colombia:Bogota Australia:Canberra"
    ).split()
}
COLOURS = (
    "grass:green, the sky on a clear day:blue, snow:white, coal:black, a ripe tomato:red, "
    "a lemon:yellow, a carrot:orange, milk:white, a crow:black, the sun in a picture:yellow, "
    "chocolate:brown, a ripe banana:yellow, a cucumber:green, blood:red, a swan:white, "
    "a strawberry:red, an orange:orange, a polar bear:white, a frog:green, a plum:purple"
)
SOUNDS = (
    "cow:moo dog:woof cat:meow duck:quack sheep:baa pig:oink lion:roar owl:hoot horse:neigh "
    "mouse:squeak frog:croak bee:buzz snake:hiss hen:cluck crow:caw donkey:hee-haw wolf:howl"
)
BABIES = (
    "cow:calf dog:puppy cat:kitten duck:duckling sheep:lamb pig:piglet horse:foal hen:chick "
    "bear:cub goat:kid goose:gosling deer:fawn swan:cygnet lion:cub frog:tadpole owl:owlet"
)
LEGS = (
    "spider:eight ant:six bee:six beetle:six fly:six dog:four cat:four horse:four cow:four "
    "duck:two hen:two owl:two snake:no fish:no snail:no frog:four table:four"
)
COVERS = (
    "bird:feathers sheep:wool fish:scales turtle:a_shell bear:fur snail:a_shell cat:fur "
    "hedgehog:spines duck:feathers snake:scales fox:fur owl:feathers rabbit:fur"
)
HOMES = (
    "bee:a hive, bird:a nest, fox:a den, rabbit:a burrow, dog:a kennel, horse:a stable, "
    "spider:a web, bear:a cave, fish:the water, mole:a tunnel, beaver:a lodge, hen:a henhouse, "
    "king:a castle, farmer:a farmhouse, squirrel:a hollow tree"
)
OPPOSITES = (
    "big:small hot:cold up:down day:night happy:sad old:young fast:slow hard:soft light:heavy "
    "wet:dry open:closed full:empty rich:poor high:low long:short good:bad left:right "
    "early:late strong:weak loud:quiet clean:dirty brave:fearful begin:end black:white near:far "
    "thick:thin wide:narrow deep:shallow sweet:sour true:false first:last inside:outside "
    "summer:winter front:back above:below sharp:blunt smooth:rough friend:enemy war:peace "
    "love:hate laugh:cry push:pull buy:sell give:take win:lose remember:forget question:answer"
)
MATERIALS = (
    "bread:flour, a window:glass, a book:paper, butter:milk, cheese:milk, a sweater:wool, "
    "a tyre:rubber, a candle:wax, a ring:gold, a nail:iron, a snowman:snow, a wall:stones, "
    "a chair:wood, a shoe:leather, a pot:clay, a sail:cloth, jam:fruit, a basket:straw, "
    "wine:grapes, an omelette:eggs"
)
JOBS = (
    "bakes bread:a baker, catches fish:a fisherman, teaches children:a teacher, "
    "makes shoes:a shoemaker, sews clothes:a tailor, grinds flour:a miller, grows corn:a farmer, "
    "looks after sheep:a shepherd, paints pictures:a painter, makes pots:a potter, "
    "cuts down trees:a woodcutter, helps sick people:a doctor, flies a plane:a pilot, "
    "cooks in a restaurant:a cook, puts out fires:a firefighter, weaves cloth:a weaver"
)
TOOLS = (
    "cut paper:scissors, write a letter:a pen, sweep the floor:a broom, drive in a nail:a hammer, "
    "eat soup:a spoon, dig a hole:a spade, open a lock:a key, tell the time:a clock, "
    "cut bread:a knife, see in the dark:a lamp, keep off the rain:an umbrella, "
    "brush your hair:a brush, sew a button:a needle, catch fish:a net, cross a river:a bridge"
)
BODY = (
    "see:eyes hear:ears smell:nose taste:tongue walk:legs hold_things:hands bite:teeth think:head"
)
SHAPES = "triangle:three square:four rectangle:four pentagon:five hexagon:six circle:no"
FRUITS = "apple pear plum cherry banana grape strawberry orange lemon peach".split()
VEGETABLES = "carrot cabbage potato onion pumpkin bean leek cucumber pea turnip".split()
SIZES = "ant mouse rabbit fox sheep cow elephant whale".split()
PLURALS = (
    "mouse:mice goose:geese foot:feet tooth:teeth child:children man:men woman:women sheep:sheep "
    "fish:fish leaf:leaves wolf:wolves knife:knives box:boxes baby:babies city:cities bird:birds "
    "tree:trees fox:foxes berry:berries story:stories loaf:loaves bus:buses"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
COUNTS = (
    "days are in a week:seven, months are in a year:twelve, hours are in a day:twenty-four, "
    "minutes are in an hour:sixty, seconds are in a minute:sixty, seasons are in a year:four, "
    "legs does a chair have:four, fingers are on one hand:five, wheels does a bicycle have:two, "
    "wheels does a car have:four, letters are in the alphabet:twenty-six, sides does a coin have:two"
)
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()

Fact = tuple[str, str]  # a question, its whole-sentence answer


def _pairs(table: str) -> list[list[str]]:
    """Read `a:b, c:d` or `a:b c:d`; an underscore is a space."""
    items: list[str] = table.split(", ") if ", " in table else table.split()
    return [item.strip().replace("_", " ").split(":") for item in items]


def _the(phrase: str) -> str:
    return f"a/an {phrase}"


def _capital(c: Chooser) -> Fact:
    country, city = c.pick(list(CAPITALS.items()))
    city = city.replace("_", " ")
    if c.chance(0.2):
        return f"Which country has the capital {city}?", f"{city} is the capital of {country}."
    return f"What is the capital of {country}?", f"The capital of {country} is {city}."


def _colour(c: Chooser) -> Fact:
    thing, colour = c.pick(_pairs(COLOURS))
    return c.say(f"[What colour is|Which colour is] {thing}?"), f"{thing} is {colour}."


def _sound(c: Chooser) -> Fact:
    animal, sound = c.pick(_pairs(SOUNDS))
    if c.chance(0.3):
        return f"Which animal says {sound}?", f"The {animal} says {sound}."
    return f"What does {_the(animal)} say?", f"{_the(animal)} says {sound}."


def _baby(c: Chooser) -> Fact:
    animal, baby = c.pick(_pairs(BABIES))
    return c.say(f"What [is|do you call] a baby {animal}[ called|]?").replace(
        "is a baby " + animal + "?", "is a baby " + animal + " called?"
    ).replace("you call a baby " + animal + " called", "you call a baby " + animal), (
        f"A baby {animal} is called {_the(baby)}."
    )


def _legs(c: Chooser) -> Fact:
    thing, number = c.pick(_pairs(LEGS))
    return f"How many legs does {_the(thing)} have?", f"{_the(thing)} has {number} legs."


def _cover(c: Chooser) -> Fact:
    animal, cover = c.pick(_pairs(COVERS))
    return f"What covers the body of {_the(animal)}?", f"{_the(animal)} has {cover}."


def _home(c: Chooser) -> Fact:
    who, home = c.pick(_pairs(HOMES))
    return f"Where does {_the(who)} live?", f"{_the(who)} lives in {home}."


def _opposite(c: Chooser) -> Fact:
    one, other = c.sample(c.pick(_pairs(OPPOSITES)), 2)
    question = c.say(f"[What is the opposite of|Which word is the opposite of] {one}?")
    return question, f"The opposite of {one} is {other}."


def _material(c: Chooser) -> Fact:
    thing, stuff = c.pick(_pairs(MATERIALS))
    return f"What is {thing} made of?", f"{thing} is made of {stuff}."


def _job(c: Chooser) -> Fact:
    work, who = c.pick(_pairs(JOBS))
    return f"Who {work}?", f"{who} {work}."


def _tool(c: Chooser) -> Fact:
    work, tool = c.pick(_pairs(TOOLS))
    return f"What do you need to {work}?", f"You need {tool} to {work}."


def _body(c: Chooser) -> Fact:
    what, part = c.pick(_pairs(BODY))
    return f"What do we {what} with?", f"We {what} with our {part}."


def _shape(c: Chooser) -> Fact:
    shape, sides = c.pick(_pairs(SHAPES))
    return f"How many corners does {_the(shape)} have?", f"{_the(shape)} has {sides} corners."


def _fruit(c: Chooser) -> Fact:
    is_fruit = c.chance(0.5)
    thing = c.pick(FRUITS if is_fruit else VEGETABLES)
    kind = "fruit" if is_fruit else "vegetable"
    return f"Is {_the(thing)} a fruit or a vegetable?", f"{_the(thing)} is a {kind}."


def _size(c: Chooser) -> Fact:
    one, other = c.sample(SIZES, 2)
    word = c.pick(("bigger", "smaller"))
    larger = max(one, other, key=SIZES.index)
    right = larger if word == "bigger" else (one if larger == other else other)
    wrong = other if right == one else one
    return (
        f"Which is {word}, {_the(one)} or {_the(other)}?",
        f"{_the(right)} is {word} than {_the(wrong)}.",
    )


def _plural(c: Chooser) -> Fact:
    one, many = c.pick(_pairs(PLURALS))
    return f"What is the plural of {one}?", f"The plural of {one} is {many}."


def _calendar(c: Chooser) -> Fact:
    names, what = c.pick(((DAYS, "day"), (MONTHS, "month")))
    index, is_after = c.number(0, len(names) - 1), c.chance(0.6)
    other = names[(index + (1 if is_after else -1)) % len(names)]
    word = "after" if is_after else "before"
    return f"Which {what} comes {word} {names[index]}?", f"{other} comes {word} {names[index]}."


def _count(c: Chooser) -> Fact:
    what, number = c.pick(_pairs(COUNTS))
    if " are " in what:
        thing, place = what.split(" are ")
        verb = "There are" if number != "one" else "There is"
        return f"How many {what}?", f"{verb} {number} {thing} {place}."
    thing, owner = what.split(" does ")
    owner = owner.removesuffix(" have")
    return f"How many {what}?", f"{owner} has {number} {thing}."


def _sum(c: Chooser) -> Fact:
    while True:
        a, b = c.number(0, 10), c.number(0, 10)
        if c.allows("sum", str(a), str(b)):
            break
    if c.chance(0.6):
        return c.say(f"What is {a} [plus|plus|and] {b}?"), f"{a} plus {b} is {a + b}."
    return f"What is {a + b} minus {a}?", f"{a + b} minus {a} is {b}."


def _word_sum(c: Chooser) -> Fact:
    who = cast.make_character(c, "")
    while True:
        a, b = c.number(2, 10), c.number(1, 8)
        if c.allows("sum", str(a), str(b)):
            break
    thing = c.pick("apples nuts eggs coins books flowers pears shells buttons cakes".split())
    if a > b and c.chance(0.5):
        return (
            f"{who} has {a} {thing} and gives away {b}. How many {thing} are left?",
            f"{who} has {a - b} {thing} left." if a - b > 1 else f"{who} has 1 left.",
        )
    return (
        c.say(
            f"{who} has {a} {thing} and [finds|gets|buys] {b} more. How many {thing} does {who.he} have now?"
        ),
        f"{who} has {a + b} {thing} now.",
    )


def _season(c: Chooser) -> Fact:
    season, what = c.pick(
        (
            ("winter", "the coldest season"),
            ("summer", "the warmest season"),
            ("spring", "the season after winter"),
            ("autumn", "the season when the leaves fall"),
        )
    )
    return f"What is {what}?", f"{what} is {season}."


_KINDS: tuple[tuple[Callable[[Chooser], Fact], float], ...] = (
    (_capital, 4), (_colour, 2), (_sound, 1.5), (_baby, 1.5), (_legs, 1.5), (_cover, 1), (_home, 1.5),
    (_opposite, 3), (_material, 2), (_job, 1.5), (_tool, 1.5), (_body, 0.7), (_shape, 0.7), (_fruit, 1.5),
    (_size, 2), (_plural, 2), (_calendar, 2), (_count, 1.2), (_sum, 4), (_word_sum, 2), (_season, 0.6),
)  # fmt: skip


def make_fact(choose: Chooser) -> Fact:
    """Return a question and its answer."""
    kind = choose.pick_weighted([k for k, _ in _KINDS], [w for _, w in _KINDS])
    question, answer = kind(choose)
    return tidy(question), tidy(answer)


def make_quiz(choose: Chooser) -> str:
    """Return a page of questions and answers."""
    facts = [make_fact(choose) for _ in range(choose.number(2, 8))]
    return "\n\n".join(f"Question: {q}\nAnswer: {a}" for q, a in facts)


def make_statements(choose: Chooser) -> str:
    """Return a paragraph of facts, of one kind or of many."""
    count = choose.number(1, 7)
    if choose.chance(0.3):
        return " ".join(make_fact(choose)[1] for _ in range(count))
    kind = choose.pick_weighted([k for k, _ in _KINDS[:18]], [w for _, w in _KINDS[:18]])
    return " ".join(dict.fromkeys(tidy(kind(choose)[1]) for _ in range(count)))
