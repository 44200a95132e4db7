"""Other sorts of text: recipes, directions, letters, news, rhymes, lists and small programs."""

from tools.train_fables import cast
from tools.train_fables.cast import make_character
from tools.train_fables.facts import DAYS
from tools.train_fables.grammar import Chooser, tidy

# dish | what it begins with | filling, of which one or two | how it is cooked
_DISHES = """
soup|potatoes,carrots,leeks,peas,pumpkin,mushrooms,beans|boil
stew|potatoes,carrots,beans,onions,turnips,mushrooms|boil
pie|apples,cherries,plums,pears,berries,pumpkin|bake
cake|apples,cherries,nuts,honey,lemons,carrots|bake
porridge|honey,apples,nuts,berries,raisins|stir
salad|cucumbers,tomatoes,apples,nuts,cheese,pears,beans|mix
bread|nuts,raisins,seeds,olives,onions|bake
pancakes|apples,berries,honey,cheese,cherries|fry
jam|plums,cherries,strawberries,pears,berries|boil
""".strip().splitlines()
_BASE = {
    "soup": ("water", "salt", "butter"),
    "stew": ("water", "salt", "oil"),
    "pie": ("flour", "butter", "sugar"),
    "cake": ("flour", "eggs", "sugar"),
    "porridge": ("oats", "milk", "salt"),
    "salad": ("lettuce", "oil", "salt"),
    "bread": ("flour", "yeast", "salt"),
    "pancakes": ("flour", "eggs", "milk"),
    "jam": ("sugar", "lemon juice", "water"),
}
_AMOUNTS = {
    "water": "{n} cups of water", "salt": "a pinch of salt", "butter": "{n} spoons of butter",
    "oil": "{n} spoons of oil", "flour": "{n} cups of flour", "sugar": "{n} spoons of sugar",
    "eggs": "{n} eggs", "milk": "{n} cups of milk", "oats": "{n} cups of oats",
    "lettuce": "a head of lettuce", "yeast": "a spoon of yeast", "lemon juice": "{n} spoons of lemon juice",
    "honey": "{n} spoons of honey", "cheese": "a piece of cheese", "pumpkin": "half a pumpkin",
    "raisins": "{n} spoons of raisins", "nuts": "a handful of nuts", "seeds": "a handful of seeds",
    "berries": "a bowl of berries", "peas": "{n} cups of peas", "beans": "{n} cups of beans",
    "cherries": "a bowl of cherries", "strawberries": "a bowl of strawberries", "olives": "a handful of olives",
}  # fmt: skip
_STEPS = {
    "boil": (
        "Wash and cut the {fill}.",
        "[Put everything into a big pot.|Put the {fill} into a pot with the {base}.]",
        "[Let it boil|Let it simmer] for {minutes} minutes[ and stir now and then|].",
    ),
    "bake": (
        "[Mix the {base} in a bowl.|Put the {base} in a bowl and mix well.]",
        "[Add|Stir in] the {fill}.",
        "[Put it in the oven|Bake it in a hot oven] for {minutes} minutes[, until it is golden brown|].",
    ),
    "stir": (
        "[Warm the {base} in a pot.|Put the {base} in a pot and heat it slowly.]",
        "[Stir|Keep stirring] for {minutes} minutes, until it is thick.",
        "[Add|Put] the {fill} on top.",
    ),
    "mix": (
        "Wash everything well.",
        "Cut the {fill} into small pieces.",
        "Mix with the {base} in a big bowl[ and wait for {minutes} minutes|].",
    ),
    "fry": (
        "[Beat the {base} until it is smooth.|Mix the {base} to a smooth dough.]",
        "Heat a little butter in a pan and fry for {minutes} minutes on each side.",
        "[Serve|Fill them] with the {fill}.",
    ),
}
_MINUTES = {"boil": (20, 25, 30, 40), "bake": (30, 35, 40, 45), "stir": (5, 8, 10), "mix": (5, 10), "fry": (2, 3)}  # fmt: skip


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def dish(choose: Chooser) -> tuple[str, list[str], str]:
    """Return a dish's name, its fillings, and how it is cooked."""
    name, fillings, way = choose.pick(_DISHES).split("|")
    allowed = [f for f in fillings.split(",") if choose.allows("dish", name, f)]
    return name, choose.sample(allowed or fillings.split(","), 1), way


def make_recipe(choose: Chooser, what: tuple[str, list[str], str] | None = None) -> str:
    """Return a recipe: what is needed, then the steps, which use just that."""
    name, fills, way = what or dish(choose)
    base = list(_BASE[name])
    amounts: list[str] = []
    for item in fills + base:
        text = _AMOUNTS.get(item, "{n} " + item)
        amounts.append(text.replace("{n}", str(choose.number(2, 6))))
    slots = {"fill": _join(fills), "base": _join(base), "minutes": choose.pick(_MINUTES[way])}
    steps = [choose.say(step, **slots) for step in _STEPS[way]]
    steps.append(
        choose.say(
            "[Serve it warm.|Let it cool before you eat.|Enjoy your meal!|Share it with a friend.]"
        )
        if way != "mix"
        else choose.say("[Serve it fresh.|Enjoy your meal!|Share it with a friend.]")
    )
    title = f"{fills[0].removesuffix('s') if not fills[0].endswith('ies') else fills[0][:-3] + 'y'} {name}"
    title = title.replace("tomatoe ", "tomato ").replace("potatoe ", "potato ")
    if choose.chance(0.5):
        head = tidy(f"How to make {title}") + "\n\nYou need:\n"
        lines = "".join(f"- {amount}\n" for amount in amounts)
        return head + lines + "\n" + "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1))
    need = choose.say("[For this you need|You need|Take]", **{}) + " " + _join(amounts) + "."
    return f"{title[0].upper() + title[1:]}\n\n{need} " + " ".join(steps)


_HOW_TO = (
    ("plant a tree", "Dig a deep hole.", "Put the young tree into the hole.", "Fill the hole with earth.", "Give it plenty of water."),
    ("make tea", "Boil some water.", "Put the tea into a pot.", "Pour the hot water over it.", "Wait for {n} minutes.", "Pour it into cups."),
    ("wash your hands", "Turn on the water.", "Take some soap.", "Rub your hands for {n} seconds.", "Rinse them and dry them."),
    ("build a snowman", "Roll a big ball of snow.", "Put a smaller ball on top.", "Put a third ball on that.", "Use a carrot for the nose and stones for the eyes."),
    ("send a letter", "Write the letter.", "Fold it and put it into an envelope.", "Write the address on it.", "Put a stamp on it.", "Take it to the post office."),
    ("make a fire", "Gather dry wood.", "Put small sticks in the middle.", "Put bigger sticks around them.", "Light it with a match.", "Never leave it alone."),
    ("feed the birds", "Fill a bowl with seeds.", "Hang it in a tree.", "Stand back and be quiet.", "Wait for the birds to come."),
    ("make a paper boat", "Take a sheet of paper.", "Fold it in half.", "Fold the corners to the middle.", "Fold up the edges.", "Pull it open and let it swim."),
    ("fly a kite", "Wait for a windy day.", "Find an open field.", "Hold the kite up high.", "Run against the wind.", "Let out the line slowly."),
    ("boil an egg", "Fill a pot with water.", "Let the water boil.", "Put the egg in with a spoon.", "Wait for {n} minutes.", "Cool it in cold water."),
    ("clean a room", "Open the window.", "Put everything in its place.", "Wipe the table.", "Sweep the floor.", "Take out the rubbish."),
    ("mend a sock", "Find a thread of the same colour.", "Put the thread through the needle.", "Close the hole with small stitches.", "Tie a knot and cut the thread."),
)  # fmt: skip


def make_how_to(choose: Chooser, index: int | None = None) -> str:
    """Return directions, as numbered lines or as a paragraph."""
    title, *steps = _HOW_TO[index] if index is not None else choose.pick(_HOW_TO)
    steps = [step.replace("{n}", str(choose.pick((3, 4, 5, 6, 10, 20)))) for step in steps]
    if choose.chance(0.6):
        return f"How to {title}\n\n" + "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1))
    words = ["first", "then", "next", "after that", "now"]
    said = [f"{words[i]} {s[0].lower()}{s[1:]}" for i, s in enumerate(steps[:-1])]
    said.append(f"finally, {steps[-1][0].lower()}{steps[-1][1:]}")
    return f"How to {title}\n\n" + tidy(" ".join(said))


def how_to_titles() -> list[str]:
    """Return what `make_how_to` can tell about, in its order."""
    return [entry[0] for entry in _HOW_TO]


_LETTER = (
    "[Thank you for your letter.|It was good to hear from you.|I hope that you are well.|How are you?|I have not written for a long time.]",
    "[We are staying {where}.|I am {where} this week.|We came to a little house {where}.] [The weather is {weather}.|It is {weather} here.]",
    "[Yesterday|On {day}|This morning|Last night] [we|I] [walked to the old mill|saw a deer in the garden|went swimming|picked a basket of berries|baked an apple cake|climbed a hill and looked at the sea|found a shiny shell|read a long book by the fire|helped to bring in the hay].",
    "[{o} is here, too, and sends {o.his} love.|{o} [broke a plate|lost a shoe|learned to swim|has a cold|grew two inches|sang for us], and we [all laughed|were surprised|had a long talk about it].|Do you remember {o}? {o.he} [has a new dog|is a {job} now|asked about you|is getting married].]",
    "[Could you send me {x.a}?|I am sending you {x.a}. I hope that you like {x.it}.|I have {x.a} for you.|I found {x.a} for you at the market.]",
    "[Please write soon.|We will be home on {day}.|Come and visit us in {season}.|I miss you very much.|I look forward to your letter.|See you on {day}.]",
)


def make_letter(choose: Chooser) -> str:
    """Return a letter or a short note."""
    sender, to = make_character(choose, "human"), make_character(choose, "human")
    slots: dict[str, object] = {
        "o": make_character(choose, "human", [sender, to]),
        "where": choose.pick(("by the sea", "in the mountains", "on a farm", "in the city", "by the lake", "at my aunt's house")),
        "weather": choose.pick(("warm and sunny", "cold and wet", "windy", "lovely", "cool but dry", "hot")),
        "day": choose.pick(DAYS), "season": choose.pick(cast.SEASONS), "x": choose.pick(cast.TREASURES + cast.MEALS),
        "job": choose.pick(("teacher", "baker", "doctor", "farmer", "painter", "tailor")),
    }  # fmt: skip
    lines = [choose.say(line, **slots) for line in _LETTER if choose.chance(0.75)]
    if len(lines) < 2:
        lines = [choose.say(line, **slots) for line in _LETTER[:3]]
    close = choose.pick(("Love,", "With love,", "Yours,", "Your friend,", "Best wishes,"))
    head = choose.pick(("Dear", "Dear", "My dear", "Hello"))
    return f"{head} {to},\n\n{' '.join(lines)}\n\n{close}\n{sender}"


_SKIES = {"sunny": "stay sunny", "cloudy": "stay dry", "rainy": "rain all day", "windy": "blow hard", "snowy": "snow", "foggy": "be foggy"}  # fmt: skip
_TOWNS = "Oakton Millbrook Redhill Seaford Greenfield Ashby Brookside Hillcrest Marsh_End Stonebridge".split()


def make_weather(choose: Chooser) -> str:
    """Return a forecast whose nights are colder than its days."""
    day = choose.number(0, 6)
    town = choose.pick(_TOWNS).replace("_", " ")
    text = choose.say(
        "[Weather for|The weather in|Weather report for] {t}, {d}.", t=town, d=DAYS[day]
    )
    sky = choose.pick(tuple(_SKIES))
    high = choose.number(-3, 3) if sky == "snowy" else choose.number(6, 30)
    low = high - choose.number(3, 8)
    wind = choose.pick(("north", "south", "east", "west"))
    text += " " + choose.say(
        "[It will be {sky}.|The day will be {sky}.|Expect a {sky} day.] "
        "[The temperature will reach {high} degrees, and fall to {low} degrees at night.|"
        "By day {high} degrees, at night {low} degrees.] "
        "[A {s} wind blows from the {wind}.|The wind comes from the {wind}.|There is {s2} wind.]",
        sky=sky, high=high, low=low, wind=wind, s=choose.pick(("light", "strong", "cold" if high < 12 else "warm")),
        s2=choose.pick(("little", "no", "some")),
    )  # fmt: skip
    advice = {
        "sunny": "[Do not forget your hat.|A good day for a picnic.]", "cloudy": "[It will stay dry.|A good day for a walk.]",
        "rainy": "[Take an umbrella.|Wear your boots.]", "windy": "[Hold on to your hat.|A good day to fly a kite.]",
        "snowy": "[Roads may be icy.|Dress warmly.]", "foggy": "[Drive slowly.|Take care on the roads.]",
    }[sky]  # fmt: skip
    text += " " + choose.say(advice)
    if choose.chance(0.6):
        text += " " + choose.say(
            "[{d} will be {sky}.|On {d} it will be {sky}.|The outlook for {d}: {sky}.]",
            d=DAYS[(day + 1) % 7], sky=choose.pick(tuple(_SKIES)),
        )  # fmt: skip
    return text


def make_news(choose: Chooser) -> str:
    """Return a short item of village news."""
    who, other = make_character(choose, "human grown"), make_character(choose, "human grown")
    slots: dict[str, object] = {
        "w": who, "o": other, "town": choose.pick(_TOWNS).replace("_", " "), "day": choose.pick(DAYS),
        "n": choose.number(12, 98), "k": choose.number(2, 9), "what": choose.pick(("bridge", "school", "library", "mill", "well", "market hall")),
        "pet": choose.pick(("cat", "dog", "goat", "pony", "goose", "donkey")), "crop": choose.pick(("apples", "corn", "potatoes", "pumpkins", "plums")),
    }  # fmt: skip
    body = choose.pick(
        (
            '[The new {what} was opened|A new {what} was opened] on {day}. [More than {n} people came to see it.|About {n} people were there.] [It took {k} years to build.|The work took {k} months.] "[This is a great day for our town|We have waited a long time for this]," said {w}, {w.a_plain}.',
            '[The {pet} of {w}, {w.a_plain}, was found on {day}|{w}, {w.a_plain}, lost a {pet} last week, and it was found on {day}]. It had been missing for {k} days. {o}, {o.a_plain}, [found it in the woods|found it behind the church|heard it in the old barn]. "[I am so glad|I never gave up hope]," said {w}.',
            '[Farmers bring in {n} tons of {crop}|The harvest of {crop} was good this year]. "[We had rain at the right time|It is the best year in a long time]," said {w}, {w.a_plain}. The price is {k} coins a bag. [The market is open on {day}.|The harvest feast will be on {day}.]',
            'A fire broke out in the {what} on {day} night. {k} people [helped to put it out|carried water from the river]. [Nobody was hurt.|One person was slightly hurt.] "[It all went very fast|We were lucky]," said {w}, {w.a_plain}. [The cause is not known.|The {what} will be closed for {k} weeks.]',
            '{w}, {w.a_plain}, won the [race|song contest|cooking contest] on {day}. {n} people took part. [{o}, {o.a_plain}, came second.|Second place went to {o}, {o.a_plain}.] The prize was [a silver cup|{k} gold coins|a fat goose]. "[I can hardly believe it|I trained all year]," said {w}.',
        )
    )
    head = choose.say("[{town} News|News from {town}|{town}, {day}]", **slots)
    return f"{head}\n\n{choose.say(body, **slots)}"


_RHYMES = (
    "cat hat mat rat", "sun fun run bun", "tree bee sea me", "day play hay way", "night light bright kite",
    "moon spoon noon tune", "house mouse", "star far jar car", "rain train lane again", "snow go slow grow",
    "king ring sing wing", "boat goat coat note", "bell well tell shell", "hill mill still will", "bread bed head red",
)  # fmt: skip
_LINE_ENDS = {
    "cat": "I have a little cat", "hat": "who wears a little hat", "mat": "and sits upon the mat", "rat": "and never saw a rat",
    "sun": "Here comes the yellow sun", "fun": "and we have lots of fun", "run": "so come with me and run", "bun": "and eat a honey bun",
    "tree": "I sat beneath a tree", "bee": "and heard a busy bee", "sea": "it came across the sea", "me": "and sang a song to me",
    "day": "It is a lovely day", "play": "so come with me and play", "hay": "we jump into the hay", "way": "and laugh along the way",
    "night": "It is a quiet night", "light": "the stars give us their light", "bright": "the moon is big and bright", "kite": "and I dream of my kite",
    "moon": "I saw the silver moon", "spoon": "it looked just like a spoon", "noon": "I slept until past noon", "tune": "and sang a little tune",
    "house": "There is a little house", "mouse": "and in it lives a mouse",
    "star": "I saw a little star", "far": "it was so very far", "jar": "I keep it in a jar", "car": "and take it in my car",
    "rain": "Drip, drop, here comes the rain", "train": "I see it from the train", "lane": "it runs along the lane", "again": "and then the sun again",
    "snow": "Look at the falling snow", "go": "come on, and let us go", "slow": "the old cart is so slow", "grow": "and see our snowman grow",
    "king": "There was a merry king", "ring": "who lost his golden ring", "sing": "it made the people sing", "wing": "a bird hid it under its wing",
    "boat": "I have a little boat", "goat": "my captain is a goat", "coat": "he wears a yellow coat", "note": "and sings a merry note",
    "bell": "I hear a silver bell", "well": "it rings down by the well", "tell": "what story does it tell", "shell": "it sleeps inside a shell",
    "hill": "I climbed a little hill", "mill": "on top there was a mill", "still": "the wind was very still", "will": "come with me, if you will",
    "bread": "I smell the morning bread", "bed": "and jump out of my bed", "head": "a cap upon my head", "red": "my cheeks are warm and red",
}  # fmt: skip


def make_rhyme(choose: Chooser) -> str:
    """Return couplets and quatrains that rhyme."""
    verses: list[str] = []
    for group in choose.sample(_RHYMES, choose.number(1, 3)):
        lines = [_LINE_ENDS[word] for word in group.split()]
        keep = lines if len(lines) == 2 else (lines if choose.chance(0.6) else lines[:2])
        ends = [","] * len(keep)
        if len(keep) == 4:
            ends[1] = choose.pick((",", ";", "."))
        verses.append(
            "\n".join(f"{tidy(a)}{b}" for a, b in zip(keep, [*ends[:-1], "."], strict=True))
        )
    return "\n\n".join(verses)


_ITEMS = {"bread": 3, "milk": 2, "eggs": 4, "apples": 5, "cheese": 6, "butter": 4, "tea": 7, "rice": 3, "soap": 2, "candles": 5, "honey": 8, "flour": 2, "salt": 1, "jam": 6}  # fmt: skip


def make_list(choose: Chooser) -> str:
    """Return a shopping list whose total is right, a number line, a table or a to-do list."""
    way = choose.number(0, 3)
    if way == 0:
        items = choose.sample(sorted(_ITEMS), choose.number(2, 5))
        lines = [f"{item}: {_ITEMS[item]} coins" for item in items]
        return (
            "Shopping list\n\n"
            + "\n".join(lines)
            + f"\ntotal: {sum(_ITEMS[i] for i in items)} coins"
        )
    if way == 1:
        start, step, count = choose.number(0, 12), choose.number(1, 10), choose.number(5, 9)
        row = ", ".join(str(start + i * step) for i in range(count))
        return choose.say(
            "[Count by {k} from {a}:|Numbers from {a}, step {k}:] {r}", k=step, a=start, r=row
        )
    if way == 2:
        head = "name | kind | age\n-----|------|----\n"
        rows = [make_character(choose, "animal") for _ in range(choose.number(2, 5))]
        return head + "\n".join(f"{r.name} | {r.noun} | {choose.number(1, 12)}" for r in rows)
    todo = choose.sample(
        ("feed the hens", "water the garden", "write to Grandmother", "mend the fence", "buy bread", "clean the stable", "pick the apples", "wash the windows", "sharpen the knives", "call the doctor", "read a book", "sweep the floor"),
        choose.number(3, 6),
    )  # fmt: skip
    day = choose.pick(DAYS)
    return f"To do on {day}\n\n" + "\n".join(f"[{choose.pick(('x', ' '))}] {t}" for t in todo)


def make_code(choose: Chooser) -> str:
    """Return a small program and what it prints."""
    name = choose.pick(("x", "n", "count", "total", "size", "age"))
    a, b = choose.number(1, 9), choose.number(1, 9)
    way = choose.number(0, 4)
    if way == 0:
        code, out = f"{name} = {a}\nprint({name} + {b})", str(a + b)
    elif way == 1:
        word = choose.pick(("hello", "fox", "star", "yes", "moon", "tick"))
        count = choose.number(2, 5)
        code, out = f'for i in range({count}):\n    print("{word}")', "\n".join([word] * count)
    elif way == 2:
        word, op = choose.pick((("add", "+"), ("multiply", "*"), ("subtract", "-")))
        value = {"+": a + b, "*": a * b, "-": a - b}[op]
        code, out = f"def {word}(a, b):\n    return a {op} b\n\nprint({word}({a}, {b}))", str(value)
    elif way == 3:
        limit = choose.number(1, 9)
        code = f'{name} = {a}\nif {name} > {limit}:\n    print("big")\nelse:\n    print("small")'
        out = "big" if a > limit else "small"
    else:
        words = choose.sample(("red", "blue", "green", "cat", "dog", "sun"), 3)
        code = f"words = {words}\nprint(len(words))\nprint(words[{(i := choose.number(0, 2))}])".replace(
            "'", '"'
        )
        out = f"3\n{words[i]}"
    return f"```python\n{code}\n```\n\nOutput:\n{out}"
