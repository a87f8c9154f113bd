"""What the demo model is taught about: its colours, shapes, sounds and words, and how it is asked about them.

Everything comes in two parts. TRAIN is what it learns from; HELD_OUT is never trained on and is what it is scored by.
"""

import json
import random
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


def split_of(sides: dict[str, list[str]]) -> Split:
    """As the JSON files beside this one write it."""
    return Split(tuple(sides["train"]), tuple(sides["held_out"]))


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
    task: split_of(sides)
    for task, sides in json.loads(Path(__file__).with_name("wordings.json").read_text(encoding="utf-8")).items()
}

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
    Search Find Look Get Plan Put Play""".split()  # noqa: SIM905
)

# The small world of the stories.
HEROES = ("fox", "bear", "cat", "dog", "mouse", "rabbit", "owl", "frog", "duck", "horse")
THINGS = ("ball", "lamp", "kite", "boat", "drum", "hat", "key", "bell", "coin", "book")
PLACES = ("forest", "garden", "river", "hill", "beach", "barn", "lake", "village")


def choose(rng: random.Random, options: Sequence[T]) -> T:
    return options[rng.randrange(len(options))]


def ask(rng: random.Random, task: str, held_out: bool, **slots: object) -> str:
    """A question of a task in one of its wordings."""
    return worded(rng, WORDINGS[task], held_out, "word" not in slots, slots)


def worded(rng: random.Random, wordings: Split, held_out: bool, stray: bool, slots: Mapping[str, object]) -> str:
    """One of the wordings; some in training are dressed up, in lower case, or hold a word that is none, if `stray`."""
    text = choose(rng, wordings.of(held_out)).format(**slots)
    if held_out:
        return text
    luck = rng.random()
    if luck < 0.10:
        text = f"{choose(rng, OPENINGS)} {text}"
    elif luck < 0.20:
        text = f"{text} {choose(rng, CLOSINGS)}"
    elif luck < 0.27 and not text[0].isdigit():
        text = text[0].lower() + text[1:]
    elif luck < 0.32:
        text = text.rstrip("?.")
    elif luck < 0.50 and text.split(" ")[0] in IMPERATIVES:
        opening = choose(rng, POLITE)
        asked = f"{opening} {text[0].lower()}{text[1:].rstrip('.')}{'?' if opening.endswith('you') else '.'}"
        if asked not in (one.format(**slots) for one in wordings.held_out):
            text = asked
    elif 0.50 < luck < 0.58 and stray:  # a word that it does not know is no reason to give up
        words = text.split(" ")
        words.insert(rng.randrange(len(words) + 1), nonsense(rng))
        text = " ".join(words)
    return text


def plural(word: str) -> str:
    return f"{word}es" if word.endswith("s") else f"{word}s"


def counted(count: int, what: str) -> str:
    return f"{count} {what if count == 1 else plural(what)}"


def there_are(count: int, what: str) -> str:
    return f"There {'is' if count == 1 else 'are'} {counted(count, what)}."


def nonsense(rng: random.Random, most: int = 7) -> str:
    """A word that does not exist, of 2 to `most` letters."""
    vowel = rng.random() < 0.5
    letters = []
    for _ in range(rng.randint(2, most)):
        letters.append(choose(rng, "aeiou" if vowel else "bcdfghjklmnpqrstvwxyz"))
        vowel = not vowel if rng.random() < 0.85 else vowel
    return "".join(letters)
