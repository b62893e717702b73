"""Plain English for pretraining, and questions with short answers for fine-tuning, from templates and a small world.

Each `Topic` can *tell* (sentences, no questions put to a reader) and *ask* (one `Question`). Both draw on the same
facts, so that whoever has read what is told needs to learn only how questions are put and answered. Everything here
was written for this repository; the same seed gives the same text on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

HELD_OUT = 0.15  # the share of a topic's facts that only test rows ask for

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown")
SHAPES = ("circle", "square", "star", "cube", "ring", "cross", "heart")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
NAMES = {  # and the pronoun that a story goes on with
    **dict.fromkeys(("Mira", "Ana", "Lucy", "Nora", "Ruth", "Kate"), "She"),
    **dict.fromkeys(("Tom", "Ben", "Omar", "Leo", "Hugo", "Paul"), "He"),
}
GOODS = ("kite", "lamp", "cake", "drum", "book", "coat", "bell", "clock")
SPOTS = ("market", "garden", "school", "mill", "farm", "beach", "castle")
VISITS = ("The day was warm.", "It was raining.", "The street was quiet.", "The wind was cold.", "It was early.")

WORDS = (
    *("apple", "arm", "ball", "bean", "bird", "bread", "chair", "cloud", "desk", "door", "ear", "egg", "fish", "fork"),
    *("gate", "glass", "hand", "hill", "ice", "ink", "jam", "jar", "king", "knee", "lake", "lemon", "milk", "moon"),
    *("nail", "nut", "oak", "oil", "paper", "pear", "queen", "quilt", "rain", "rose", "salt", "ship", "table", "tree"),
    *("uncle", "vase", "wall", "water", "wheel", "yard"),
)


@dataclass(frozen=True)
class Animal:
    """What is told about one kind of animal."""

    name: str
    young: str
    sound: str
    home: str
    cover: str
    food: str
    legs: int


ANIMALS = (
    Animal("cow", "calf", "moos", "barn", "hair", "grass", 4),
    Animal("horse", "foal", "neighs", "stable", "hair", "oats", 4),
    Animal("donkey", "foal", "brays", "stable", "hair", "hay", 4),
    Animal("sheep", "lamb", "bleats", "fold", "wool", "grass", 4),
    Animal("goat", "kid", "bleats", "shed", "hair", "leaves", 4),
    Animal("pig", "piglet", "grunts", "sty", "bristles", "roots", 4),
    Animal("dog", "puppy", "barks", "kennel", "fur", "meat", 4),
    Animal("cat", "kitten", "mews", "house", "fur", "mice", 4),
    Animal("mouse", "pup", "squeaks", "hole", "fur", "seeds", 4),
    Animal("rabbit", "kit", "squeals", "burrow", "fur", "clover", 4),
    Animal("lion", "cub", "roars", "savanna", "fur", "meat", 4),
    Animal("wolf", "pup", "howls", "den", "fur", "meat", 4),
    Animal("bear", "cub", "growls", "cave", "fur", "berries", 4),
    Animal("fox", "cub", "yelps", "den", "fur", "mice", 4),
    Animal("deer", "fawn", "bellows", "forest", "hair", "leaves", 4),
    Animal("elephant", "calf", "trumpets", "savanna", "hide", "leaves", 4),
    Animal("monkey", "infant", "chatters", "jungle", "fur", "fruit", 4),
    Animal("frog", "tadpole", "croaks", "pond", "skin", "flies", 4),
    Animal("crocodile", "hatchling", "snaps", "swamp", "scales", "meat", 4),
    Animal("hen", "chick", "clucks", "coop", "feathers", "grain", 2),
    Animal("duck", "duckling", "quacks", "pond", "feathers", "weeds", 2),
    Animal("goose", "gosling", "honks", "yard", "feathers", "grass", 2),
    Animal("swan", "cygnet", "hisses", "lake", "feathers", "weeds", 2),
    Animal("owl", "owlet", "hoots", "forest", "feathers", "mice", 2),
    Animal("eagle", "eaglet", "screams", "mountains", "feathers", "fish", 2),
    Animal("crow", "chick", "caws", "nest", "feathers", "worms", 2),
    Animal("pigeon", "squab", "coos", "loft", "feathers", "seeds", 2),
    Animal("turkey", "poult", "gobbles", "yard", "feathers", "grain", 2),
    Animal("bee", "larva", "buzzes", "hive", "hair", "nectar", 6),
    Animal("cricket", "nymph", "chirps", "meadow", "shell", "leaves", 6),
    Animal("snake", "hatchling", "hisses", "desert", "scales", "mice", 0),
)


@dataclass(frozen=True)
class Town:
    """An invented town."""

    name: str
    country: str
    river: str
    ware: str
    side: str


def _towns() -> tuple[Town, ...]:
    """Make forty-eight towns, each with properties drawn for it; they are the same whatever the seed of the text."""
    starts = ("Tar", "Bel", "Mor", "Vin", "Kel", "Dun")
    ends = ("by", "ford", "wick", "mouth", "ton", "stead", "holm", "dale")
    countries = ("Ardia", "Belmark", "Corvia", "Dolland", "Estria", "Fenmark")
    rivers = ("Ash", "Brine", "Cole", "Dart", "Elm", "Frome", "Glen")
    wares = ("glass", "wool", "paper", "cheese", "ships", "clocks", "bread", "silk")
    sides = ("north", "south", "east", "west", "middle")
    draw = Random("towns")
    return tuple(
        Town(start + end, draw.choice(countries), draw.choice(rivers), draw.choice(wares), draw.choice(sides))
        for start, end in itertools.product(starts, ends)
    )


TOWNS = _towns()

PLURALS = {
    **{
        word: f"{word}s" for word in ("apple", "ball", "bean", "bird", "chair", "cloud", "door", "egg", "field", "hand")
    },
    **{
        word: f"{word}s"
        for word in ("hill", "king", "lake", "lemon", "nail", "onion", "queen", "river", "road", "tree")
    },
    **{
        word: f"{word}es"
        for word in ("box", "bus", "brush", "church", "dish", "fox", "glass", "match", "tomato", "wish")
    },
    **{"baby": "babies", "berry": "berries", "city": "cities", "fly": "flies", "lady": "ladies", "pony": "ponies"},
    **{"calf": "calves", "half": "halves", "knife": "knives", "leaf": "leaves", "loaf": "loaves", "wolf": "wolves"},
    **{"child": "children", "foot": "feet", "goose": "geese", "man": "men", "mouse": "mice", "ox": "oxen"},
    **{"tooth": "teeth", "woman": "women", "sheep": "sheep", "fish": "fish"},
}
PASTS = {
    **{word: f"{word}ed" for word in ("ask", "call", "climb", "cook", "help", "jump", "look", "open", "paint", "play")},
    **{
        word: f"{word}ed" for word in ("pull", "push", "talk", "wait", "walk", "wash", "watch", "work", "clean", "fill")
    },
    **{"begin": "began", "break": "broke", "bring": "brought", "build": "built", "buy": "bought", "catch": "caught"},
    **{"come": "came", "dig": "dug", "drink": "drank", "eat": "ate", "fall": "fell", "find": "found", "fly": "flew"},
    **{"give": "gave", "go": "went", "grow": "grew", "hear": "heard", "keep": "kept", "know": "knew", "leave": "left"},
    **{"lose": "lost", "make": "made", "ride": "rode", "run": "ran", "see": "saw", "sell": "sold", "sing": "sang"},
    **{"sleep": "slept", "speak": "spoke", "swim": "swam", "take": "took", "teach": "taught", "think": "thought"},
}
_PAIRS = (
    *(("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("high", "low"), ("dark", "bright")),
    *(("wet", "dry"), ("hard", "soft"), ("long", "short"), ("rich", "poor"), ("full", "empty"), ("early", "late")),
    *(("open", "shut"), ("clean", "dirty"), ("strong", "weak"), ("thick", "thin"), ("near", "far"), ("loud", "quiet")),
    *(("happy", "sad"), ("wide", "narrow"), ("heavy", "light"), ("sweet", "sour"), ("deep", "shallow")),
    *(("good", "bad"), ("sharp", "blunt"), ("smooth", "rough"), ("up", "down"), ("left", "right"), ("day", "night")),
    *(("summer", "winter"), ("war", "peace"), ("first", "last"), ("begin", "end"), ("buy", "sell"), ("push", "pull")),
)
OPPOSITES = {**dict(_PAIRS), **{second: first for first, second in _PAIRS}}


@dataclass(frozen=True)
class Question:
    """An instruction, what it is about, and its answer.

    Attributes:
        fact: what has to be known or worked out; questions that differ only in their wording have the same.
        instruction: what to do.
        input: what to do it with, or nothing.
        output: the answer, a few words.
    """

    fact: str
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Topic:
    """A category of text.

    Attributes:
        name: the value of the column ``category``.
        tell: writes a few sentences, given a source of chance.
        ask: puts one question, given a source of chance.
    """

    name: str
    tell: Callable[[Random], str]
    ask: Callable[[Random], Question]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listed(items: list[str] | tuple[str, ...]) -> str:
    """Write ``a, b and c``."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def _about(subject: str, fact: str, wording: str, output: str) -> Question:
    """Name the subject in the instruction where the wording has a place for it, and in the input otherwise."""
    return Question(fact, wording.format(subject), "" if "{}" in wording else subject, output)


def _written(rng: Random, task: str, answer: str) -> str:
    """Tell that somebody was asked something and wrote the answer, on a line of its own."""
    return f"{rng.choice(tuple(NAMES))} is asked {task} and writes:\n{answer}\n"


def _paragraph(sentences: list[str], between: str = " ") -> str:
    """Join sentences, of which some end their line themselves."""
    return between.join(sentences).replace("\n ", "\n").replace("\n\n", "\n").strip()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# Arithmetic


def _sum(rng: Random) -> tuple[str, int, int, int]:
    operation = rng.choice(("plus", "plus", "minus", "minus", "times"))
    if operation == "plus":
        first, second = rng.randint(0, 10), rng.randint(0, 10)
        return operation, first, second, first + second
    if operation == "minus":
        first = rng.randint(0, 12)
        second = rng.randint(0, first)
        return operation, first, second, first - second
    first, second = rng.randint(0, 5), rng.randint(0, 5)
    return operation, first, second, first * second


def _tell_arithmetic(rng: Random) -> str:
    def one() -> str:
        operation, first, second, result = _sum(rng)
        forms = {
            "plus": (f"{_capital(rng.choice(tuple(NAMES)))} adds {first} and {second} and gets {result}.",),
            "minus": (f"Take {second} from {first}, and {result} is left.", f"{first} less {second} is {result}."),
            "times": (f"Multiply {first} by {second} and you get {result}.",),
        }
        plain = f"{first} {operation} {second} is {result}."
        return rng.choice(
            (plain, plain, *forms[operation], _written(rng, f"for {first} {operation} {second}", str(result)))
        )

    return _paragraph([one() for _ in range(rng.randint(4, 8))])


def _ask_arithmetic(rng: Random) -> Question:
    operation, first, second, result = _sum(rng)
    forms = {
        "plus": ("Add the two numbers.", f"{first} and {second}", f"Add {first} and {second}."),
        "minus": (
            "Take the second number from the first.",
            f"{first} and {second}",
            f"Take {second} from {first}.",
        ),
        "times": ("Multiply the two numbers.", f"{first} and {second}", f"Multiply {first} by {second}."),
    }
    instruction, given, short = forms[operation]
    wording = rng.choice(
        (
            (f"What is {first} {operation} {second}?", ""),
            (f"Work out {first} {operation} {second}.", ""),
            ("Work out the result.", f"{first} {operation} {second}"),
            (instruction, given),
            (short, ""),
        )
    )
    return Question(f"{first} {operation} {second}", *wording, str(result))


# Sorting


def _items(rng: Random) -> tuple[str, list[str], list[str]]:
    """Draw words or numbers and sort them."""
    count = rng.randint(2, 3)
    if rng.random() < 0.6:
        words = rng.sample(WORDS, count)
        return "words", words, sorted(words)
    numbers = rng.sample(range(1, 30), count)
    return "numbers", [str(number) for number in numbers], [str(number) for number in sorted(numbers)]


def _tell_sorting(rng: Random) -> str:
    def one() -> str:
        kind, items, ordered = _items(rng)
        name = rng.choice(tuple(NAMES))
        forms = [f"{name} sorts the {kind} {_listed(items)}. The list is now {', '.join(ordered)}."]
        if kind == "words":
            forms += [
                f"By the alphabet, the words {', '.join(items)} come in this order: {', '.join(ordered)}.",
                f"In the alphabet, {ordered[0]} comes before {ordered[1]}, and {ordered[1]} comes after {ordered[0]}.",
            ]
        else:
            forms += [
                f"From the smallest to the largest, {', '.join(items)} become {', '.join(ordered)}.",
                f"Of {_listed(items)}, the smallest is {ordered[0]}, and the largest is {ordered[-1]}.",
                f"{ordered[0]} is smaller than {ordered[1]}, and {ordered[1]} is larger than {ordered[0]}.",
            ]
        forms.append(f"Here are the {kind}:\n{', '.join(items)}\nSorted, they are:\n{', '.join(ordered)}\n")
        first, last = ("first", "last") if kind == "words" else ("smallest", "largest")
        forms.append(_written(rng, f"which of {_listed(items)} is the {first}", ordered[0]))
        forms.append(_written(rng, f"which of {_listed(items)} is the {last}", ordered[-1]))
        return rng.choice(forms)

    return _paragraph([one() for _ in range(rng.randint(2, 4))])


def _ask_sorting(rng: Random) -> Question:
    kind, items, ordered = _items(rng)
    given = ", ".join(items)
    if kind == "words":
        wordings = (
            ("Sort the words by the alphabet.", ", ".join(ordered)),
            ("Put these words in the order of the alphabet.", ", ".join(ordered)),
            ("Which of these words comes first in the alphabet?", ordered[0]),
            ("Which of these words comes last in the alphabet?", ordered[-1]),
        )
    else:
        wordings = (
            ("Sort the numbers, the smallest first.", ", ".join(ordered)),
            ("Put these numbers in order, from the smallest to the largest.", ", ".join(ordered)),
            ("Which of these numbers is the smallest?", ordered[0]),
            ("Which of these numbers is the largest?", ordered[-1]),
        )
    instruction, output = rng.choice(wordings)
    return Question(", ".join(ordered), instruction, given, output)


# Spelling


def _tell_spelling(rng: Random) -> str:
    def one() -> str:
        word = rng.choice(WORDS)
        return rng.choice(
            (
                f"The word {word} is spelled {'-'.join(word)}.",
                f"The word {word} begins with {word[0]} and ends with {word[-1]}.",
                f"The first letter of {word} is {word[0]}, and the last letter is {word[-1]}.",
                f"The word {word} has {len(word)} letters: {'-'.join(word)}.",
                f"Backwards, {word} is spelled {'-'.join(reversed(word))}.",
                f"Kate writes the word {word} in capital letters: {word.upper()}.",
                f"{word}\n{'-'.join(word)}\n{'-'.join(reversed(word))}\n",
                _written(rng, f"how {word} is spelled", "-".join(word)),
                _written(rng, f"how {word} is spelled backwards", "-".join(reversed(word))),
                _written(rng, f"for the first letter of {word}", word[0]),
                _written(rng, f"for the last letter of {word}", word[-1]),
                _written(rng, f"how many letters {word} has", str(len(word))),
                _written(rng, f"for {word} in capital letters", word.upper()),
            )
        )

    return _paragraph([one() for _ in range(rng.randint(3, 6))])


def _ask_spelling(rng: Random) -> Question:
    word = rng.choice(WORDS)
    task, wordings, output = rng.choice(
        (
            ("spell", ("Spell the word.", "How is the word {} spelled?"), "-".join(word)),
            ("back", ("Spell the word backwards.", "Spell {} backwards."), "-".join(reversed(word))),
            ("first", ("What is the first letter of the word?", "With which letter does {} begin?"), word[0]),
            ("last", ("What is the last letter of the word?", "With which letter does {} end?"), word[-1]),
            ("count", ("How many letters has the word?", "How many letters has {}?"), str(len(word))),
            ("capital", ("Write the word in capital letters.", "Write {} in capital letters."), word.upper()),
        )
    )
    return _about(word, f"{task} {word}", rng.choice(wordings), output)


# Grammar


def _tell_grammar(rng: Random) -> str:
    def one() -> str:
        kind = rng.choice(("plural", "past", "opposite"))
        if kind == "plural":
            word = rng.choice(tuple(PLURALS))
            many = PLURALS[word]
            return rng.choice(
                (
                    f"The plural of {word} is {many}.",
                    f"Here is one {word}, and there are {rng.choice(NUMBER_WORDS[2:])} {many}.",
                    f"One {word}, many {many}.",
                    _written(rng, f"for the plural of {word}", many),
                )
            )
        if kind == "past":
            verb = rng.choice(tuple(PASTS))
            past = PASTS[verb]
            return rng.choice(
                (
                    f"The past of {verb} is {past}.",
                    f"Today they {verb}, and yesterday they {past}.",
                    f"We {verb} now. We {past} last year.",
                    _written(rng, f"for the past of {verb}", past),
                )
            )
        word = rng.choice(tuple(OPPOSITES))
        other = OPPOSITES[word]
        return rng.choice(
            (
                f"The opposite of {word} is {other}.",
                f"Something that is not {word} may be {other}.",
                f"{_capital(word)} and {other} are opposites.",
                _written(rng, f"for the opposite of {word}", other),
            )
        )

    return _paragraph([one() for _ in range(rng.randint(4, 8))], rng.choice((" ", "\n")))


def _ask_grammar(rng: Random) -> Question:
    kind, table, wordings = rng.choice(
        (
            ("plural", PLURALS, ("What is the plural of {}?", "Give the plural of the noun.", "One {}, many what?")),
            ("past", PASTS, ("What is the past of {}?", "Put the verb in the past.", "Give the past of {}.")),
            ("opposite", OPPOSITES, ("What is the opposite of {}?", "Give the opposite.", "Name the opposite of {}.")),
        )
    )
    word = rng.choice(tuple(table))
    return _about(word, f"{kind} {word}", rng.choice(wordings), table[word])


# Shapes


def _scene(rng: Random) -> list[tuple[str, str]]:
    count = rng.randint(2, 3)
    return list(zip(rng.sample(COLOURS, count), rng.sample(SHAPES, count), strict=True))


def _described(scene: list[tuple[str, str]]) -> str:
    return _listed([_with_article(f"{colour} {shape}") for colour, shape in scene])


def _tell_shapes(rng: Random) -> str:
    scene = _scene(rng)
    name = rng.choice(tuple(NAMES))
    start = rng.choice(
        (
            f"{name} draws {_described(scene)}.",
            f"On the table there are {_described(scene)}.",
            f"{_capital(_described(scene))}\n",
        )
    )
    sentences = []
    for colour, shape in rng.sample(scene, 2):
        sentences.append(
            rng.choice(
                (
                    f"The {shape} is {colour}.",
                    f"The colour of the {shape} is {colour}.",
                    f"The {colour} shape is the {shape}.",
                    f"What is {colour} is the {shape}.",
                    _written(rng, f"what colour the {shape} is", colour),
                    _written(rng, f"which shape is {colour}", shape),
                )
            )
        )
    count = NUMBER_WORDS[len(scene)]
    sentences += [
        rng.choice((f"There are {count} shapes.", _written(rng, "how many shapes there are", count))),
        f"The first shape is the {scene[0][1]}, and the last is the {scene[-1][1]}.",
        rng.choice(
            (
                _written(rng, "which shape comes first", scene[0][1]),
                _written(rng, "which shape comes last", scene[-1][1]),
            )
        ),
    ]
    return _paragraph([start, *rng.sample(sentences, rng.randint(2, 4))])


def _ask_shapes(rng: Random) -> Question:
    scene = _scene(rng)
    colour, shape = rng.choice(scene)
    instruction, output = rng.choice(
        (
            (f"What colour is the {shape}?", colour),
            (f"Name the colour of the {shape}.", colour),
            (f"Which shape is {colour}?", shape),
            (f"Name the {colour} shape.", shape),
            ("How many shapes are there?", NUMBER_WORDS[len(scene)]),
            ("Which shape comes first?", scene[0][1]),
            ("Which shape comes last?", scene[-1][1]),
        )
    )
    return Question(_described(scene), instruction, _capital(_described(scene)), output)


# Animals


def _tell_animals(rng: Random) -> str:
    animal = rng.choice(ANIMALS)
    name = _with_article(animal.name)
    legs = NUMBER_WORDS[animal.legs] if animal.legs else "no"
    young = _with_article(animal.young)
    forms = (
        (f"The young of {name} is called {young}.", f"A young {animal.name} is called {young}."),
        (f"{_capital(name)} {animal.sound}.", f"When {name} calls, it {animal.sound}."),
        (f"{_capital(name)} lives in the {animal.home}.", f"The home of {name} is the {animal.home}."),
        (f"The body of {name} is covered with {animal.cover}.", f"{_capital(name)} has {animal.cover}."),
        (f"{_capital(name)} eats {animal.food}.", f"The food of {name} is {animal.food}."),
        (f"{_capital(name)} has {legs} legs.", f"There are {legs} legs on {name}."),
    )
    asked = (
        (f"what a young {animal.name} is called", animal.young),
        (f"what {name} does when it calls", animal.sound),
        (f"where {name} lives", animal.home),
        (f"what covers {name}", animal.cover),
        (f"what {name} eats", animal.food),
        (f"how many legs {name} has", NUMBER_WORDS[animal.legs] if animal.legs else "none"),
    )
    sentences = [rng.choice((*told, _written(rng, *task))) for told, task in zip(forms, asked, strict=True)]
    return _paragraph(rng.sample(sentences, rng.randint(3, 6)), rng.choice((" ", "\n")))


def _ask_animals(rng: Random) -> Question:
    animal = rng.choice(ANIMALS)
    legs = NUMBER_WORDS[animal.legs] if animal.legs else "none"
    key, wordings, output = rng.choice(
        (
            ("young", ("What is a young {} called?", "Name the young of the {}.", "Name its young."), animal.young),
            (
                "sound",
                ("What does the {} do when it calls?", "Name the call of the {}.", "Name its call."),
                animal.sound,
            ),
            ("home", ("Where does the {} live?", "Name the home of the {}.", "Where does it live?"), animal.home),
            (
                "cover",
                ("What covers the body of the {}?", "What is the {} covered with?", "What covers it?"),
                animal.cover,
            ),
            ("food", ("What does the {} eat?", "Name the food of the {}.", "What does it eat?"), animal.food),
            ("legs", ("How many legs has the {}?", "Count the legs of the {}.", "How many legs has it?"), legs),
        )
    )
    return _about(animal.name, f"{key} {animal.name}", rng.choice(wordings), output)


# Places


def _tell_places(rng: Random) -> str:
    town = rng.choice(TOWNS)
    name = town.name
    forms = (
        (f"{name} is a town in {town.country}.", f"The town of {name} belongs to {town.country}."),
        (f"{name} lies on the river {town.river}.", f"The river {town.river} flows through {name}."),
        (f"{name} is known for its {town.ware}.", f"The people of {name} make {town.ware}."),
        (f"{name} is in the {town.side} of the country.", f"To reach {name}, go to the {town.side}."),
    )
    asked = (
        (f"in which country {name} is", town.country),
        (f"on which river {name} lies", town.river),
        (f"what {name} is known for", town.ware),
        (f"in which part of the country {name} is", town.side),
    )
    sentences = [rng.choice((*told, _written(rng, *task))) for told, task in zip(forms, asked, strict=True)]
    return _paragraph(rng.sample(sentences, rng.randint(2, 4)), rng.choice((" ", "\n")))


def _ask_places(rng: Random) -> Question:
    town = rng.choice(TOWNS)
    key, wordings, output = rng.choice(
        (
            (
                "country",
                ("In which country is {}?", "Name the country of {}.", "In which country is it?"),
                town.country,
            ),
            ("river", ("On which river does {} lie?", "Name the river of {}.", "On which river is it?"), town.river),
            ("ware", ("What is {} known for?", "What do people make in {}?", "What is it known for?"), town.ware),
            ("side", ("In which part of its country is {}?", "In which part of the country is it?"), town.side),
        )
    )
    return _about(town.name, f"{key} {town.name}", rng.choice(wordings), output)


# Stories


@dataclass(frozen=True)
class _Story:
    text: str
    hero: str
    friend: str
    spot: str
    colour: str
    thing: str


def _story(rng: Random) -> _Story:
    hero, friend = rng.sample(tuple(NAMES), 2)
    spot, colour, thing = rng.choice(SPOTS), rng.choice(COLOURS), rng.choice(GOODS)
    pronoun = NAMES[hero]
    weather = rng.choice((f" {rng.choice(VISITS)}", ""))
    found = rng.choice((f"{pronoun} found a {colour} {thing} there.", f"There {hero} found a {colour} {thing}."))
    given = rng.choice(
        (f"Later {hero} gave the {thing} to {friend}.", f"{pronoun} met {friend} and gave {friend} the {thing}.")
    )
    text = f"{hero} went to the {spot}.{weather} {found} {given}"
    return _Story(text, hero, friend, spot, colour, thing)


def _tell_stories(rng: Random) -> str:
    story = _story(rng)
    pronoun = NAMES[story.hero]
    ends = [
        f"So {story.friend} has the {story.thing} now.",
        f"The {story.thing} was {story.colour}.",
        f"It was {story.hero} who went to the {story.spot}.",
        f"It was {story.hero} who found the {story.thing}.",
        f"The {story.thing} was found in the {story.spot}.",
        f'"Where did you go?" asked {story.friend}. "To the {story.spot}," said {story.hero}.',
        f'"What did you find?" asked {story.friend}. "A {story.thing}," said {story.hero}.',
        f'"Who has the {story.thing} now?" {pronoun} smiled. "{story.friend}," said {story.hero}.',
        f'"What colour is the {story.thing}?" asked {story.friend}. "{_capital(story.colour)}," said {story.hero}.',
    ]
    asked = (
        (f"where {story.hero} went", story.spot),
        (f"what {story.hero} found", story.thing),
        (f"what colour the {story.thing} is", story.colour),
        (f"who found the {story.thing}", story.hero),
        (f"who has the {story.thing} now", story.friend),
    )
    ends += [_written(rng, *task) for task in asked]
    return _paragraph([story.text, *rng.sample(ends, rng.randint(2, 4))], rng.choice((" ", "\n")))


def _ask_stories(rng: Random) -> Question:
    story = _story(rng)
    instruction, output = rng.choice(
        (
            (f"Where did {story.hero} go?", story.spot),
            (f"Where was the {story.thing}?", story.spot),
            (f"What did {story.hero} find?", story.thing),
            (f"What colour is the {story.thing}?", story.colour),
            (f"Who found the {story.thing}?", story.hero),
            (f"Who has the {story.thing} now?", story.friend),
        )
    )
    return Question(story.text, instruction, story.text, output)


TOPICS = (
    Topic("animals", _tell_animals, _ask_animals),
    Topic("arithmetic", _tell_arithmetic, _ask_arithmetic),
    Topic("grammar", _tell_grammar, _ask_grammar),
    Topic("places", _tell_places, _ask_places),
    Topic("shapes", _tell_shapes, _ask_shapes),
    Topic("sorting", _tell_sorting, _ask_sorting),
    Topic("spelling", _tell_spelling, _ask_spelling),
    Topic("stories", _tell_stories, _ask_stories),
)


def documents(seed: int | str) -> Iterator[str]:
    """Write plain text without end, a few sentences on one topic at a time; never a question of the data set."""
    rng = Random(f"documents {seed}")
    while True:
        yield rng.choice(TOPICS).tell(rng)


def instructions(seed: int, train_each: int, test_each: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Draw training and test rows, of which no fact is in both.

    Args:
        seed: the same seed gives the same rows.
        train_each: training rows of each topic.
        test_each: test rows of each topic.

    Returns:
        Training and test rows, shuffled, with the keys ``instruction``, ``input``, ``output`` and ``category``.

    Raises:
        ValueError: a topic has not so many different questions.
    """
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for topic in TOPICS:
        rng = Random(f"{topic.name} {seed}")
        held_out: dict[str, bool] = {}
        wanted = {False: train_each, True: test_each}
        seen: set[tuple[str, str]] = set()
        for _ in range(100 * (train_each + test_each)):
            question = topic.ask(rng)
            asked = (question.instruction, question.input)
            is_test = held_out.setdefault(question.fact, rng.random() < HELD_OUT)
            if wanted[is_test] and asked not in seen:
                seen.add(asked)
                wanted[is_test] -= 1
                row = {"instruction": question.instruction, "input": question.input, "output": question.output}
                (test if is_test else train).append({**row, "category": topic.name})
            if not any(wanted.values()):
                break
        else:
            raise ValueError(
                f"{topic.name}: {wanted[False]} questions to train and {wanted[True]} to test could not be found"
            )
    for name, rows in (("train", train), ("test", test)):
        Random(f"{name} {seed}").shuffle(rows)
    return train, test
