"""Conversations: somebody asks, the model answers, as the chat template writes it."""

from tools.train_fables import plain
from tools.train_fables.cast import make_character
from tools.train_fables.facts import make_fact
from tools.train_fables.grammar import Chooser
from tools.train_fables.stories import PLOTS, hero_for, make_story

END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = (END, USER, ASSISTANT, SYSTEM)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ '<|user|>' + message['content'] | trim }}
{%- elif message['role'] == 'assistant' -%}
{{ '<|assistant|>' + message['content'] | trim + '<|end|>' }}
{%- elif message['role'] == 'system' and loop.first -%}
{{ '<|system|>' + message['content'] | trim }}
{%- else -%}
{{ raise_exception('messages must be of user and assistant, after at most one of system') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""
Turn = tuple[str, str]

_ASK = "[Tell me|Please tell me|Can you tell me|Write|Write me|I would like to hear|Tell]"
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly storyteller.",
    "Answer in short and simple sentences.",
    "You are a helpful assistant who likes fables.",
    "Be kind and brief.",
)
_TALK: tuple[tuple[str, str], ...] = (
    ("[Hello|Hi|Hello there|Good morning|Hey|Good evening][!|.|]", "[Hello! What would you like to hear, a story or an answer?|Hello! I know stories, recipes and simple facts. What would you like?]"),
    ("[Who are you?|What are you?|What is your name?|Tell me about yourself.]", "I am Fables, a very small language model. I know short stories, recipes, rhymes and simple facts."),
    ("[What can you do?|How can you help me?|What do you know?]", "I can tell short stories, answer simple questions, write a recipe, a rhyme or a letter. I am very small, so please keep it simple."),
    ("[How are you?|How are you today?]", "[I am well, thank you. Would you like to hear a story?|I am fine, thank you. What can I do for you?]"),
    ("[Are you human?|Are you a person?|Are you alive?]", "No, I am a small computer program that writes text."),
    ("[Thank you!|Thanks!|Thank you very much.|Thanks a lot.]", "[You are welcome!|You are welcome. Would you like another one?]"),
    ("[Goodbye!|Bye!|Good night!|See you!]", "[Goodbye!|Goodbye! Come back soon.]"),
)  # fmt: skip
_UNKNOWN = (
    "[Who won|Who will win] the [football match|election|world cup|game last night]?",
    "What is the price of [gold|oil|a house|bitcoin|this car] [today|now|]?",
    "[Explain|What is|Tell me about] [quantum physics|the stock market|black holes|democracy|the theory of relativity|machine learning|a neural network|philosophy|DNA]",
    "[Who wrote|Who printed] [Hamlet|the first book|the Odyssey]?", "Who invented the [telephone|radio|wheel|car]?", "When was [Rome|the tower of London|this house] built?",
    "[What is the weather like today?|What time is it?|Where am I?|What is my name?|How old am I?]",
    "[Translate|Can you translate] this into [French|German|Spanish|Latin][.|?]",
    "[Write|Can you write] [an essay|a report|a web page|a poem in Latin|a long novel] about [history|economics|computers|the war|politics][.|?]",
    "[Who is|What do you think of] [the president|the king of France|Einstein|Shakespeare|Napoleon]?",
    "What is the meaning of life?", "Why is the sky blue?", "How does a computer work?",
    "[What is|Solve] [38 times 92|the square root of 7|x squared plus 3|12 divided by 5][.|?]",
)  # fmt: skip
_NO_ANSWER = (
    "I am a very small model, and I do not know that. [You can ask me for a story, a recipe or a simple fact.|Would you like to hear a story?|But I can tell you a story.]",
    "I do not know. [I am a small model and know only simple things.|Ask me for a story, a recipe or a rhyme.]",
)


def make_chat(choose: Chooser) -> str:
    """Return a conversation of one to three turns, without the last END."""
    turns: list[Turn] = [_turn(choose)]
    if choose.chance(0.15):
        turns.insert(0, _talk(choose, 0))
    while len(turns) < 3 and choose.chance(0.25):
        turns.append(_talk(choose, 5) if choose.chance(0.3) else _turn(choose))
    text = SYSTEM + choose.pick(_SYSTEMS) if choose.chance(0.12) else ""
    return text + END.join(f"{USER}{q}{ASSISTANT}{a}" for q, a in turns)


def _talk(choose: Chooser, index: int | None = None) -> Turn:
    question, answer = _TALK[index] if index is not None else choose.pick(_TALK)
    return choose.say(question), choose.say(answer)


def _turn(choose: Chooser) -> Turn:
    makers = (_story, _fact, _recipe, _how_to, _rhyme, _unknown, _talk, _letter, _weather)
    return choose.pick_weighted(makers, (9, 6, 1.5, 1, 0.6, 1.2, 1, 0.5, 0.3))(choose)


def _story(choose: Chooser) -> Turn:
    plot = choose.pick(PLOTS)
    hero = hero_for(choose, plot)
    way = choose.number(0, 5)
    who = hero.a_plain
    asked = (
        (f"{_ASK} a [story|short story|fable|fairy tale].", False),
        (f"{_ASK} a [story|fable|short story|tale] about {who}.", True),
        (f"{_ASK} a [story|fable|short story] about {who} [named|called] {hero.name}.", True),
        (f"{_ASK} a [story|fable] about {plot.topic}.", False),
        (f"{_ASK} a [story|fable] about {who} and {plot.topic}.", True),
        (f"[A story|A fable|Story] about {who}[, please|][.|]", True),
    )[way]
    question = choose.say(asked[0])
    if question.startswith(("Can ",)):
        question = question.rstrip(".") + "?"
    if choose.chance(0.15):
        question = question.rstrip(".")
    return question, make_story(choose, plot, hero if asked[1] else None, is_titled=False)


def _fact(choose: Chooser) -> Turn:
    question, answer = make_fact(choose)
    if choose.chance(0.1):
        question = "Please tell me: " + question[0].lower() + question[1:]
    elif choose.chance(0.1):
        question = question.rstrip("?")
    return question, answer


def _recipe(choose: Chooser) -> Turn:
    what = plain.dish(choose)
    name, fills, _ = what
    question = choose.say(
        "[How do I make {name} with {fill}?|Can you give me a recipe for {name} with {fill}?|Give me a recipe for {name} with {fill}.|I have {fill}. How do I make {name}?]",
        name=name, fill=fills[0],
    )  # fmt: skip
    return question, plain.make_recipe(choose, what)


def _how_to(choose: Chooser) -> Turn:
    titles = plain.how_to_titles()
    index = choose.number(0, len(titles) - 1)
    question = choose.say(
        "[How do I {t}?|How can I {t}?|Tell me how to {t}.|How do you {t}?]", t=titles[index]
    )
    return question, plain.make_how_to(choose, index)


def _rhyme(choose: Chooser) -> Turn:
    question = choose.say(
        "[Write a rhyme.|Tell me a rhyme.|Please write a short poem.|Write me a little poem.|Can you write a rhyme?]"
    )
    return question, plain.make_rhyme(choose)


def _letter(choose: Chooser) -> Turn:
    to = make_character(choose, "human")
    question = choose.say(
        "[Write a letter to|Please write a letter to|Write a short letter to] {to}.", to=to
    )
    letter = plain.make_letter(choose).split("\n", 1)[1]
    return question, f"Dear {to},\n{letter}"


def _weather(choose: Chooser) -> Turn:
    question = choose.say(
        "[Write a weather report.|Make up a weather report.|Write a weather forecast.]"
    )
    return question, plain.make_weather(choose)


def _unknown(choose: Chooser) -> Turn:
    question = choose.say(choose.pick(_UNKNOWN)).strip()
    return question, choose.say(choose.pick(_NO_ANSWER))
