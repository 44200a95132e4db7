"""Who and what the texts are about: characters whose names, kinds and pronouns agree."""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.train_fables.grammar import Chooser

GIRLS = (
    "Anna Bella Clara Daisy Ella Flora Grace Hazel Iris Ivy Juno Kitty Lily Lucy Luna Maya Mia "
    "Molly Nell Nora Olive Penny Poppy Rosa Ruby Sally Tess Tilly Vera Zoe Dora Greta Hilda "
    "Ida Mabel Marta Pearl Sofia Wren"
).split()
BOYS = (
    "Adam Alfie Barney Ben Bruno Charlie Cole Dan Eli Felix Finn Fred George Gus Hugo Jack Jasper "
    "Jonas Leo Louis Max Milo Ned Noah Oliver Oscar Otto Pip Ralph Rufus Sam Simon Theo Toby Tom "
    "Victor Walter Archie Basil"
).split()

# noun, home, foods, tags
_ANIMALS = """
mouse|hole in the wall|cheese,crumbs|small young
rabbit|burrow|carrots,clover|small young quick
squirrel|hollow tree|nuts,acorns|small young climber
hedgehog|pile of leaves|mushrooms,berries|small young slow
frog|muddy pond|flies|small young swimmer
mole|tunnel|roots|small young digger
sparrow|nest|seeds,crumbs|small bird
robin|nest|berries,seeds|small bird
snail|shady garden|lettuce leaves|small slow
turtle|quiet pond|lettuce leaves,berries|small slow swimmer
kitten|warm basket|milk,fish|small young climber
lamb|soft green field|clover,grass|small young
chick|henhouse|seeds,corn|small young bird
fox|den|berries,fish|middle quick digger
badger|den|roots,mushrooms|middle digger
otter|house by the river|fish|middle swimmer
beaver|wooden lodge|bark,roots|middle swimmer
cat|cosy house|milk,fish|middle climber
dog|wooden kennel|bones,bread|middle quick digger
hen|henhouse|corn,seeds|middle bird
goose|barnyard|corn,grass|middle bird
duck|nest in the reeds|corn,bread|middle bird swimmer
crow|tall pine tree|corn,nuts|middle bird
owl|hollow oak tree|berries,seeds|middle bird
heron|nest by the lake|fish|middle bird
goat|rocky hill|grass,apples|middle climber
pig|muddy yard|apples,acorns|middle
sheep|green field|grass,clover|middle
donkey|old stable|hay,carrots|big slow
pony|red barn|hay,apples|big quick
deer|shady wood|leaves,berries|big quick
bear|warm cave|honey,berries|big climber
wolf|dark cave|bones,fish|big quick
ox|old barn|hay,grass|big slow
horse|stable|hay,carrots|big quick
lion|rocky cave|meat|big quick
"""
_PEOPLE = """
girl|little house|bread,apples|f young watcher
boy|little house|bread,plums|m young watcher
princess|tall castle|cake,cherries|f young
prince|tall castle|cake,pears|m young
shepherd|hut on the hill|cheese,bread|fm watcher
farmer|farmhouse|bread,soup|fm
baker|bakery|bread,cake|fm
miller|windmill|bread,porridge|fm
weaver|cottage|soup,bread|fm
potter|workshop|soup,cheese|fm
fisherman|hut by the sea|fish,soup|m
tailor|little shop|soup,porridge|fm
shoemaker|little shop|porridge,cheese|fm
gardener|cottage with roses|apples,pears|fm
painter|attic room|bread,cheese|fm
old woman|cottage in the woods|porridge,soup|f
old man|cottage by the road|porridge,bread|m
woodcutter|hut in the forest|bread,cheese|fm
"""


@dataclass(frozen=True)
class Kind:
    """A sort of character."""

    noun: str
    home: str
    foods: tuple[str, ...]
    tags: frozenset[str]

    @property
    def is_animal(self) -> bool:
        return "animal" in self.tags


def _kinds() -> tuple[Kind, ...]:
    kinds: list[Kind] = []
    for table, tag in ((_ANIMALS, "animal"), (_PEOPLE, "human")):
        for line in table.strip().splitlines():
            noun, home, foods, tags = line.split("|")
            sort = {*tags.split(), tag}
            if tag == "human" and "young" not in sort:
                sort.add("grown")
            kinds.append(Kind(noun, home, tuple(foods.split(",")), frozenset(sort)))
    return tuple(kinds)


KINDS = _kinds()
NATURES = (
    "little young small clever kind shy brave merry quiet curious cheerful gentle friendly busy "
    "careful"
).split()


@dataclass(frozen=True)
class Character:
    """One of a text's people or animals, as templates name it."""

    name: str
    kind: Kind
    is_female: bool
    nature: str

    def __str__(self) -> str:
        return self.name

    he = property(lambda self: "she" if self.is_female else "he")
    him = property(lambda self: "her" if self.is_female else "him")
    his = property(lambda self: "her" if self.is_female else "his")
    himself = property(lambda self: "herself" if self.is_female else "himself")
    noun = property(lambda self: self.kind.noun)
    the = property(lambda self: f"the {self.kind.noun}")
    a = property(lambda self: f"a/an {self.kind.noun}")
    home = property(lambda self: self.kind.home)
    food = property(lambda self: self.kind.foods[0])
    a_plain = property(lambda self: f"a/an {self.kind.noun}")

    @property
    def intro(self) -> str:
        """`a little fox named Pip`; old people are not also young."""
        return f"{self.intro_short} [named|called|named] {self.name}"

    @property
    def intro_short(self) -> str:
        """`a little fox`."""
        nature = f"{self.nature} " if not self.noun.startswith("old") else ""
        return f"a/an {nature}{self.noun}"

    @property
    def went(self) -> str:
        tags = self.kind.tags
        if "bird" in tags:
            return "[flew|flew|fluttered]"
        if "slow" in tags:
            return "[walked slowly|walked|plodded]"
        if "small" in tags and "animal" in tags:
            return "[ran|hopped|hurried]"
        return "[walked|ran|hurried]"


@dataclass(frozen=True)
class Thing:
    """Something to have, lose, find or eat; plural ones take plural words."""

    noun: str
    is_plural: bool

    def __str__(self) -> str:
        return self.noun

    a = property(lambda self: f"some {self.noun}" if self.is_plural else f"a/an {self.noun}")
    the = property(lambda self: f"the {self.noun}")
    it = property(lambda self: "them" if self.is_plural else "it")
    they = property(lambda self: "they" if self.is_plural else "it")
    was = property(lambda self: "were" if self.is_plural else "was")
    is_ = property(lambda self: "are" if self.is_plural else "is")
    one = property(lambda self: "ones" if self.is_plural else "one")
    this = property(lambda self: "these" if self.is_plural else "this")


def _things(text: str) -> tuple[Thing, ...]:
    return tuple(Thing(w.strip("+"), w.endswith("+")) for w in text.strip().split(", "))


TREASURES = _things(
    "red scarf, silver bell, wooden whistle, blue kite, little drum, golden key, straw hat, "
    "warm blanket, brass lamp, new boots+, story book, copper pot, toy boat, wool mittens+, "
    "glass bead, round mirror, paper lantern, walking stick, yellow umbrella, music box, "
    "silver spoon, leather bag, green coat, tin cup, small flute, feather pen"
)
MEALS = _things(
    "loaf of bread, basket of berries, pot of honey, bowl of soup, bag of nuts, apple pie, "
    "round cheese, ripe plums+, sweet cherries+, warm porridge, red apples+, little cakes+, "
    "honey cake, bunch of grapes, jar of jam, roasted chestnuts+, yellow pears+, pumpkin pie"
)
FINDS = _things(
    "big red ball, shiny shell, golden feather, ripe melon, bag of sweets, honey cake, "
    "silver coin, blue ribbon, ripe plums+, wooden boat, sweet pear, round cheese"
)
SEASONS = ("spring", "summer", "autumn", "winter")
SETTINGS = (
    "a quiet forest, a green valley, a small village by the sea, a wide meadow, "
    "a town with narrow streets, a land of hills and rivers, an old garden, a mountain village, "
    "a wood full of birds, a far country, a little village, a deep forest"
).split(", ")
SPOTS = (
    "under the old oak tree, behind the mill, in the tall grass, beside the pond, on the bridge, "
    "near the well, inside the barn, by the garden gate, on top of the hill, "
    "at the edge of the wood, among the reeds, next to the haystack, under a wooden bench, "
    "behind a big rock, near the stone wall, beside the path"
).split(", ")

BARRIERS = "rock, stone, log, tree trunk".split(", ")
VESSELS = "pot, bowl, box, jug, basket, kettle".split(", ")
SKILLS = (
    "dance, skate, swim, juggle, whistle, play the flute, ride a bicycle, paint, sing, "
    "walk on stilts, bake bread, tell stories"
).split(", ")


def make_character(choose: Chooser, tags: str = "", others: Sequence[Character] = ()) -> Character:
    """Return someone who has the tags, of another name and kind than the others."""
    needed = set(tags.split())
    taken = {other.kind for other in others}
    kinds = [k for k in KINDS if needed <= k.tags and k not in taken]
    kind = choose.pick(kinds)
    is_female = choose.pick(
        (True,) if "f" in kind.tags else (False,) if "m" in kind.tags else (True, False)
    )
    names = [n for n in (GIRLS if is_female else BOYS) if n not in {o.name for o in others}]
    fitting = [n for n in names if choose.allows(n, kind.noun)]
    return Character(choose.pick(fitting or names), kind, is_female, choose.pick(NATURES))
