"""The text that the tiny model is trained on, as an endless stream of documents.

The world is small on purpose. Two million parameters that see a few million
tokens cannot hold much, but they can hold eight animals, eight things and one
kind of story firmly, and a reader notices sense long before breadth.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

Exchange = tuple[str, str]
Topic = tuple[tuple[str, ...], tuple[str, ...]]

ANIMALS = ("fox", "bear", "cat", "dog", "rabbit", "mouse", "owl", "frog")
# What the friend in trouble says, and how the thing helps: a thing always helps in the same way.
THINGS = {
    "lantern": ("It is dark, and I cannot see the path.", "{N} lit the lantern, and soon the path was bright."),
    "key": ("My door is locked, and I cannot get in.", "{N} turned the key in the lock, and the door opened."),
    "map": ("I am lost, and I do not know the way home.", "{N} looked at the map and found the way home."),
    "rope": ("I fell into a hole, and I cannot get out.", "{N} threw the rope down and pulled {F} out."),
    "drum": ("Today is my party, but nobody comes.", "{N} played the drum, and soon many guests came."),
    "blanket": ("The night is long, and I am very cold.", "{N} put the blanket around {F}, and soon {F} was warm."),
    "bell": ("My little brother is lost in the fog.", "{N} rang the bell, and the little brother heard it and came."),
    "umbrella": ("It is raining, and I am all wet.", "{N} opened the umbrella, and they both stayed dry."),
}
NAMES = ("Anna", "Ben", "Clara", "Leo", "Max", "Mia", "Rosa", "Tom")
# A reader who says who they are may bear other names than the animals do.
READERS = (*NAMES, "Alice", "Bob", "David", "Emma", "John", "Maria", "Paul", "Sam")
PLACES = ("river", "forest", "hill", "lake", "garden", "bridge")
TRAITS = ("little", "brave", "kind", "clever")
LOOKS = ("red", "blue", "old", "small")

OPENINGS = (
    "Once upon a time there was a {trait} {animal} named {N}.",
    "There once was a {trait} {animal} named {N}.",
    "A {trait} {animal} named {N} lived near the {home}.",
)
EPISODE = (
    ("{N} the {animal} had {a_look} {thing}.", "{N} the {animal} loved {a_look} {thing} more than anything."),
    (
        "{When} the {animal} took the {thing} and went to the {place}.",
        "{When} the {animal} walked to the {place} with the {thing}.",
    ),
    ("There {N} met {friend} named {F}.", "Near the {place} {N} saw {friend} named {F}."),
    ('"Please help me," said {F}. "{plea}"', '{F} was sad. "{plea}"'),
    (
        '"I have {a_thing}," said {N} the {animal}.',
        '"Do not worry, {F}," said the {animal}. "My {thing} can help."',
    ),
    ("{deed}",),
    ('"Thank you, {N}," said the {other}.', '"Thank you, dear {animal}," said {F} the {other}.'),
    (
        "From that day on {N} and {F} were best friends.",
        "{N} the {animal} and {F} the {other} danced and laughed.",
        "In the evening {N} the {animal} went home with the {thing} and was happy.",
    ),
)
NEXT_EPISODE = "The next day {N} the {animal} found {a_look} {thing}."

ENGINE: tuple[Topic, ...] = (
    (
        ("What is a token budget?", "Explain the token budget.", "What is the token budget?"),
        ("The token budget is the largest number of tokens that the engine computes in one step.",),
    ),
    (
        ("What is stall-free batching?", "Explain stall-free batching.", "How does stall-free batching work?"),
        ("Stall-free batching adds new prompts in small chunks, so that running decodes never have to wait.",),
    ),
    (
        ("What is a prefill?", "What is prefill?", "Explain prefill.", "What is the prefill phase?"),
        ("A prefill reads the prompt and fills the KV cache. Then the first token can be written.",),
    ),
    (
        ("What is a decode?", "What is decode?", "Explain decode.", "What is the decode phase?"),
        ("A decode writes one new token in each step. It reads the KV cache.",),
    ),
    (
        ("What is a KV cache?", "What is the KV cache?", "Explain the KV cache."),
        ("The KV cache holds the keys and values of all earlier tokens, so that they are computed only once.",),
    ),
    (
        ("What is a pipeline bubble?", "What are pipeline bubbles?", "Explain pipeline bubbles."),
        ("A pipeline bubble is time in which one stage has to wait for another. Equal batches keep bubbles small.",),
    ),
)
SMALL_TALK: tuple[Topic, ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey", "Good morning!"),
        ("Hello! How can I help you?", "Hello! Would you like to hear a story?"),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        ("I am the small demonstration model of rayserve_sarathi. I can tell short stories.",),
    ),
    (
        ("What can you do?", "What do you know?", "Can you help me?", "Help"),
        ("I can tell stories about animals, add small numbers and answer simple questions about the engine.",),
    ),
    (
        ("Who made you?", "How were you trained?", "Who trained you?"),
        ("A small script in rayserve_sarathi trained me on text that it writes itself.",),
    ),
    (("How are you?", "How are you today?"), ("I am fine, thank you.",)),
    (("Thank you", "Thank you!", "Thanks!", "Thanks"), ("You are welcome!",)),
    (("Goodbye", "Goodbye!", "Bye!", "Good night!"), ("Goodbye! See you soon.",)),
    (
        ("What is rayserve_sarathi?", "Explain rayserve_sarathi."),
        ("rayserve_sarathi is an engine that serves language models. It uses stall-free batching.",),
    ),
)
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "England": "London",
    "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens",
}  # fmt: skip
OPPOSITES = (("hot", "cold"), ("big", "small"), ("old", "new"), ("day", "night"), ("happy", "sad"))
UNKNOWN = (
    "What is the weather today?", "Who is the president?", "Write a poem.", "Write a program.", "What time is it?",
    "What is love?", "Tell me a joke.", "What is the meaning of life?", "How far is the moon?", "What is a computer?",
    "Who won the game?", "How do I cook rice?", "What should I eat?", "Translate this into French.",
)  # fmt: skip
DO_NOT_KNOW = "I am too small to know that. Ask me for a story about a fox and a lantern."

LARGEST_TERM = 10
LONGEST_STORY = 4
PLAIN_SHARE = 0.2
SYSTEM_SHARE = 0.2
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a friendly assistant. Answer in short sentences.")


@dataclass(frozen=True)
class Document:
    """One training text: either a plain story or the messages of a conversation."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()

    def raw(self) -> str:
        """Return the words alone, without any chat mark-up: what a tokenizer is trained on."""
        return self.text or "\n".join(message["content"] for message in self.messages)


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def write_episode(rng: Random, animal: str, name: str, thing: str, first: bool) -> str:
    """Return one adventure: the hero meets someone in trouble, and the thing helps.

    The hero, the name and the thing come back in nearly every sentence. That
    is what makes a model of this size learn to copy them, and then to copy
    the ones that a reader asks for.
    """
    opening = f"{rng.choice(OPENINGS)} {rng.choice(EPISODE[0])}" if first else NEXT_EPISODE
    other = rng.choice([kind for kind in ANIMALS if kind != animal])
    plea, deed = THINGS[thing]
    home, place = rng.sample(PLACES, 2)
    words = {
        "animal": animal, "N": name, "thing": thing, "home": home, "place": place, "plea": plea,
        "trait": rng.choice(TRAITS), "a_look": article(rng.choice(LOOKS)), "a_thing": article(thing),
        "other": other, "friend": article(other), "When": "One day" if first else "Then",
        "F": rng.choice([friend for friend in NAMES if friend != name]),
    }  # fmt: skip
    sentences = [opening, *(rng.choice(variants) for variants in EPISODE[1:])]
    text = " ".join(sentences).replace("{deed}", deed)
    return text.format(**words)


def write_story(rng: Random, animal: str, name: str, thing: str, episodes: int = 1) -> str:
    """Return a story of one or more adventures of the same hero; the first is about the given thing."""
    things = [thing, *rng.sample([other for other in THINGS if other != thing], episodes - 1)]
    parts = [write_episode(rng, animal, name, each, first=each == thing) for each in things]
    return "\n".join(parts) + " The end."


def ask_story(rng: Random, long: bool) -> list[Exchange]:
    """Return a request for a story, the story, and now and then a question about it."""
    animal, name, thing = rng.choice(ANIMALS), rng.choice(NAMES), rng.choice(tuple(THINGS))
    pair = f"{article(animal)} and {article(thing)}"
    requests = (
        (6, f"Tell me a story about {pair}."),
        (2, f"Write a story about {pair}."),
        (1, f"Tell me a short story about {pair}."),
        (1, f"Can you tell me a story about {pair}?"),
        (1, f"Tell me another story about {pair}."),
        (1, f"Tell me a story about {article(animal)} named {name} and {article(thing)}."),
        (1, f"Tell me a story about {article(animal)}."),
        (1, f"Tell me a story about {article(thing)}."),
        (1, rng.choice(("Tell me a story.", "Tell me another story."))),
    )
    request = rng.choices([text for _, text in requests], [weight for weight, _ in requests])[0]
    if long:
        request = f"Tell me a long story about {pair}."
    story = write_story(rng, animal, name, thing, rng.randint(2, LONGEST_STORY) if long else 1)
    exchanges = [(request, story)]
    if rng.random() < 0.15:
        exchanges.append(("Who is the story about?", f"It is about {name} the {animal}."))
    return exchanges


def ask_sum(rng: Random) -> list[Exchange]:
    """Return one sum out of a table that is small enough to be learned by heart."""
    left, right = rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)
    forms = ("What is {} + {}?", "How much is {} + {}?", "What is {} plus {}?", "{} + {}", "What is {}+{}?")
    return [(rng.choice(forms).format(left, right), f"{left} + {right} = {left + right}.")]


def ask_capital(rng: Random) -> list[Exchange]:
    """Return a question for one of the known capitals."""
    country, capital = rng.choice(tuple(CAPITALS.items()))
    forms = ("What is the capital of {}?", "Which city is the capital of {}?")
    return [(rng.choice(forms).format(country), f"The capital of {country} is {capital}.")]


def ask_opposite(rng: Random) -> list[Exchange]:
    """Return a question for the opposite of a word, either way round."""
    word, opposite = rng.sample(rng.choice(OPPOSITES), 2)
    return [(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.")]


def ask_topic(rng: Random, topics: tuple[Topic, ...]) -> list[Exchange]:
    """Return a question and an answer of the same topic."""
    questions, answers = rng.choice(topics)
    return [(rng.choice(questions), rng.choice(answers))]


def introduce(rng: Random) -> list[Exchange]:
    """Return a reader's name, perhaps something else, and the question for the name."""
    name = rng.choice(READERS)
    hello = rng.choice(("My name is {}.", "Hello, my name is {}.", "Hi, I am {}.")).format(name)
    between = rng.choice((list[Exchange], lambda: ask_sum(rng), lambda: ask_topic(rng, SMALL_TALK)))()
    return [(hello, f"Hello, {name}! How can I help you?"), *between, ("What is my name?", f"Your name is {name}.")]


def careless(rng: Random, question: str) -> str:
    """Return the question the way a hurried reader types it: lower case, upper case, no mark at the end."""
    if rng.random() < 0.2:
        question = question.rstrip(".?!")
    if rng.random() < 0.15:
        return question.lower()
    return question.upper() if rng.random() < 0.08 and "+" not in question else question


def converse(rng: Random, long: bool) -> tuple[dict[str, str], ...]:
    """Return the messages of a conversation: one subject, or a few after another."""
    subjects: dict[Callable[[], list[Exchange]], int] = {
        lambda: ask_story(rng, long): 30,
        lambda: ask_sum(rng): 30,
        lambda: ask_capital(rng): 10,
        lambda: ask_opposite(rng): 7,
        lambda: ask_topic(rng, ENGINE): 12,
        lambda: ask_topic(rng, SMALL_TALK): 10,
        lambda: ask_topic(rng, ((UNKNOWN, (DO_NOT_KNOW,)),)): 5,
        lambda: introduce(rng): 16,
    }
    chosen = rng.choices(tuple(subjects), tuple(subjects.values()), k=rng.choice((1, 1, 2, 3)))
    messages = []
    if rng.random() < SYSTEM_SHARE:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for question, answer in (exchange for subject in chosen for exchange in subject()):
        messages.append({"role": "user", "content": careless(rng, question)})
        messages.append({"role": "assistant", "content": answer})
    return tuple(messages)


def documents(rng: Random, long_share: float) -> Iterator[Document]:
    """Yield documents for ever; ``long_share`` of the stories in them have several episodes."""
    while True:
        long = rng.random() < long_share
        if rng.random() < PLAIN_SHARE:
            story = write_story(
                rng, rng.choice(ANIMALS), rng.choice(NAMES), rng.choice(tuple(THINGS)),
                rng.randint(2, LONGEST_STORY) if long else 1,
            )  # fmt: skip
            yield Document(text=story)
        else:
            yield Document(messages=converse(rng, long))
