"""What the demo model is taught about: its colours, shapes, sounds and words, and how it is asked about them.

Everything comes in two parts. TRAIN is what it learns from; HELD_OUT is never trained on and is what it is scored by.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """One of a thing for training, the others for scoring."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def of(self, held_out: bool) -> tuple[str, ...]:
        return self.held_out if held_out else self.train


@dataclass(frozen=True)
class Wordings(Split):
    """How something is asked, and what is put into the frames below for more ways to ask it in training."""

    clauses: tuple[str, ...]  # "what colour the {shape} is"
    names: tuple[str, ...]  # "the colour of the {shape}"


def wordings_of(sides: Mapping[str, list[str]]) -> Wordings:
    """As the JSON files beside this one write it."""
    return Wordings(**{name: tuple(texts) for name, texts in sides.items()})


# Brightness is lost on a flat patch, whose mean and contrast the model's first norm takes away: hues are told apart,
# greys are not.
COLOURS = {
    "red": (222, 30, 38),
    "orange": (250, 132, 10),
    "yellow": (244, 214, 20),
    "green": (30, 160, 60),
    "blue": (28, 80, 220),
    "purple": (130, 40, 170),
    "pink": (255, 120, 190),
    "black": (15, 15, 18),
}
NEW_COLOURS = {"turquoise": (0, 190, 190)}  # of a lesson: the demo has not seen it
SHAPES = ("circle", "square", "triangle", "star", "cross")
MOST_SHAPES = 4
MOST_BEEPS = 6
DIRECTIONS = ("left", "right", "up", "down")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {
    "January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31,
    "September": 30, "October": 31, "November": 30, "December": 31,
}  # fmt: skip
DONT_KNOW = "I don't know."

# How a question of each task is put; {…} are filled in by the module that makes the item.
WORDINGS = {
    task: wordings_of(sides)
    for task, sides in json.loads(Path(__file__).with_name("wordings.json").read_text(encoding="utf-8")).items()
}
CLAUSE_FRAMES = (
    "Tell me {}.", "Say {}.", "I want to know {}.", "I would like to know {}.", "Do you know {}?", "Let me know {}.",
    "Find out {}.",
)  # fmt: skip
NAME_FRAMES = (
    "What is {}?", "What's {}?", "Tell me {}.", "Name {}.", "Give me {}.", "Say {}.", "Find {}.", "I want to know {}.",
    "I would like to know {}.",
)  # fmt: skip

# A question about a medium may say where to look or listen.
MEDIA_NAMES = {
    "image": ("picture", "image"),
    "audio": ("sound", "audio", "recording"),
    "video": ("video", "film", "clip"),
}
POINTERS = {
    "image": ("Look at the {}.", "Look at this {}.", "Here is a picture."),
    "audio": ("Listen to the {}.", "Listen to this {}.", "Here is a sound."),
    "video": ("Watch the {}.", "Watch this {}.", "Here is a video."),
}
MEDIUM_OF = {
    task: medium
    for medium, tasks in {
        "image": (
            "colour", "shape", "describe picture", "count shapes", "count some", "beside", "is beside", "furthest",
            "read",
        ),
        "audio": ("beeps", "pitch", "kind of sound", "spoken", "describe sound"),
        "video": ("direction", "film colour", "film shape", "appears"),
    }.items()
    for task in tasks
}  # fmt: skip

# Said before or after a question, in training and in scoring.
OPENINGS = (
    "Please answer.",
    "Hello.",
    "Hi!",
    "I have a question.",
    "Look.",
    "Listen.",
    "Now tell me.",
    "Okay.",
    "Hey,",
)
CLOSINGS = (
    "Thanks.",
    "Please.",
    "Thank you!",
    "Answer in a few words.",
    "Be brief.",
    "Please be exact.",
    "Tell me now.",
)
POLITE = ("Please", "Could you", "Can you", "Would you", "I want you to", "Now")  # before a request, in training
IMPERATIVES = frozenset(
    """Tell Name Give Describe List Count Read Write Say Spell Reverse Turn Add Calculate Start Set Switch Send Text
    Search Find Look Get Plan Put Play Let Make Message""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class StoryWorld:
    heroes: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]


# The small world of the stories, and one of a lesson.
HEROES = ("fox", "bear", "cat", "dog", "mouse", "rabbit", "owl", "frog", "duck", "horse")
THINGS = ("ball", "lamp", "kite", "boat", "drum", "hat", "key", "bell", "coin", "book")
PLACES = ("forest", "garden", "river", "hill", "beach", "barn", "lake", "village")
STORIES = StoryWorld(HEROES, THINGS, PLACES)
NEW_STORIES = StoryWorld(
    ("robot", "dragon", "knight", "wizard", "giant", "pirate", "fairy", "monster", "hunter", "captain"),
    ("rocket", "sword", "crown", "ring", "map", "mask", "flag", "shield", "clock", "rope"),
    ("moon", "castle", "planet", "cave", "desert", "tower", "jungle", "volcano"),
)


def choose(rng: random.Random, options: Sequence[T]) -> T:
    return options[rng.randrange(len(options))]


def ask(rng: random.Random, task: str, held_out: bool, **slots: object) -> str:
    """A question of a task in one of its wordings."""
    return worded(rng, WORDINGS[task], held_out, "word" not in slots, slots, MEDIUM_OF.get(task))


def worded(
    rng: random.Random, wordings: Wordings, held_out: bool, stray: bool, slots: Mapping[str, object],
    medium: str | None = None,
) -> str:  # fmt: skip
    """One of the wordings.

    In training some are put into a frame or made polite, say where to look, have a word or two around them, are in
    lower case, or hold a word that is none, if `stray`; never so that one of the held-out wordings comes of it.
    """
    if held_out:
        return choose(rng, wordings.held_out).format(**slots)
    never = {plain(text.format(**slots)) for text in wordings.held_out}
    plainest = choose(rng, wordings.train).format(**slots)
    text = framed(rng, wordings).format(**slots) if rng.random() < 0.4 else plainest
    if medium is not None and rng.random() < 0.25:
        text = pointed(rng, text, medium)
    elif rng.random() < 0.2:
        text = polite(rng, text)
    luck = rng.random()
    if luck < 0.10:
        text = f"{choose(rng, OPENINGS)} {text}"
    elif luck < 0.20:
        text = f"{text} {choose(rng, CLOSINGS)}"
    elif luck < 0.27 and not text[0].isdigit():
        text = text[0].lower() + text[1:]
    elif luck < 0.32:
        text = text.rstrip("?.")
    elif luck < 0.40 and stray:  # a word that it does not know is no reason to give up
        words = text.split(" ")
        words.insert(rng.randrange(len(words) + 1), nonsense(rng))
        text = " ".join(words)
    return plainest if any(wording in plain(text) for wording in never) else text


def plain(text: str) -> str:
    """Words alone: two wordings are the same if theirs are."""
    return " ".join(re.findall(r"[^\s.,:?!]+", text.lower()))


def framed(rng: random.Random, wordings: Wordings) -> str:
    """A clause or a name in one of the frames, or as it is if there is neither."""
    options: list[tuple[tuple[str, ...], str]] = [(CLAUSE_FRAMES, clause) for clause in wordings.clauses]
    options += [(NAME_FRAMES, name) for name in wordings.names]
    if not options:
        return choose(rng, wordings.train)
    frames, what = choose(rng, options)
    return choose(rng, frames).replace("{}", what)


def polite(rng: random.Random, text: str) -> str:
    """A request after a polite word; what is no request stays as it is."""
    if text.split(" ")[0] not in IMPERATIVES:
        return text
    opening = choose(rng, POLITE)
    return f"{opening} {text[0].lower()}{text[1:].rstrip('.')}{'?' if opening.endswith('you') else '.'}"


def pointed(rng: random.Random, text: str, medium: str) -> str:
    """With a word about where to look or listen, if there is none yet."""
    name = choose(rng, MEDIA_NAMES[medium])
    luck = rng.random()
    if luck < 0.3:
        return f"{choose(rng, POINTERS[medium]).format(name)} {text}"
    if any(word in text for word in MEDIA_NAMES[medium]) or not text.endswith(("?", ".")):
        return text
    place = f"in {choose(rng, ('the', 'this'))} {name}"
    if luck < 0.6:
        start = text if text.startswith("I ") else text[0].lower() + text[1:]
        return f"{place.capitalize()}, {start}"
    return f"{text[:-1]} {'here' if luck < 0.7 else place}{text[-1]}"


def plural(word: str) -> str:
    return f"{word}es" if word.endswith("s") else f"{word}s"


def counted(count: int, what: str) -> str:
    return f"{count} {what if count == 1 else plural(what)}"


def seen(count: int, what: str) -> str:
    """Nothing before the number depends on it: "there is" and "there are" would have to know."""
    return f"I see {counted(count, what)}."


def heard(count: int) -> str:
    return f"I hear {counted(count, 'beep')}."


def nonsense(rng: random.Random, most: int = 7) -> str:
    """A word that does not exist, of 2 to `most` letters."""
    vowel = rng.random() < 0.5
    letters = []
    for _ in range(rng.randint(2, most)):
        letters.append(choose(rng, "aeiou" if vowel else "bcdfghjklmnpqrstvwxyz"))
        vowel = not vowel if rng.random() < 0.85 else vowel
    return "".join(letters)
