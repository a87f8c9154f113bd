"""What is trained on, and how much of each."""

import random
from dataclasses import replace

from training.films import film_item
from training.items import Item, Question
from training.material import RATE, Material
from training.pictures import number_item, shapes_item, unknown_picture_question
from training.sounds import (
    DIGIT_ANSWER,
    beeps,
    beeps_item,
    digit_item,
    record,
    spoken,
    still_item,
    tone_item,
)
from training.texts import story_item, text_item, unknown_item
from training.tools import tool_item
from training.world import MOST_BEEPS, MOST_SHAPES, ask, counted, heard, seen

SEEING = (("shapes", 0.5), ("number", 0.5))
HEARING = (("digit", 0.42), ("beeps", 0.25), ("tone", 0.22), ("still", 0.11))
READING = (("text", 0.62), ("tool", 0.16), ("story", 0.14), ("unknown", 0.08))


def drawn(rng: random.Random, shares: tuple[tuple[str, float], ...]) -> str:
    return rng.choices([name for name, _ in shares], [share for _, share in shares])[0]


def image_item(rng: random.Random, material: Material) -> Item:
    if drawn(rng, SEEING) == "number":
        return number_item(rng, material)
    item = shapes_item(rng, material.held_out)[0]
    if not material.held_out and rng.random() < 0.1:
        item = replace(item, questions=(unknown_picture_question(rng), *item.questions))
    return item


def audio_item(rng: random.Random, material: Material) -> Item:
    kind = drawn(rng, HEARING)
    if kind == "digit":
        return digit_item(rng, material)
    return {"beeps": beeps_item, "tone": tone_item, "still": still_item}[kind](rng, material.held_out)


def both_item(rng: random.Random, material: Material) -> Item:
    """A picture of shapes and a sound of beeps or a spoken digit, and questions about both.

    Whether two numbers are the same is said after them, so that it need not be known before they are.
    """
    shapes, held_out = rng.randint(1, MOST_SHAPES), material.held_out
    same = rng.random() < 0.5
    says = "Yes." if same else "No."
    shown = seen(shapes, "shape").rstrip(".")
    picture, _ = shapes_item(rng, held_out, shapes)
    if rng.random() < 0.6:
        count = shapes if same else rng.choice([n for n in range(1, MOST_BEEPS + 1) if n != shapes])
        samples, hints = beeps(rng, count, held_out)
        samples = record(rng, samples)
        both = f"{shown} and hear {counted(count, 'beep')}."
        questions = [
            Question("both counts", ask(rng, "both counts", held_out), both),
            Question("same counts", ask(rng, "same counts", held_out), f"{both} {says}"),
        ]
        alone = [Question("beeps", ask(rng, "beeps", held_out), heard(count))]
    else:
        digit = shapes if same else rng.choice([n for n in range(10) if n != shapes])
        samples, hints = spoken(rng, digit, material)
        questions = [
            Question("same number", ask(rng, "same number", held_out), f"{shown} and hear the digit {digit}. {says}")
        ]
        alone = [Question("spoken", ask(rng, "spoken", held_out), DIGIT_ANSWER.format(digit))]
    if not held_out:
        alone.append(Question("count shapes", ask(rng, "count shapes", held_out), seen(shapes, "shape")))
        questions += [*alone, *picture.questions[:2]]
    sound = {"type": "audio", "audio": (samples, RATE)}
    in_sound = (replace(hint, run=1) for hint in hints)
    return Item("both", tuple(questions), (*picture.media, sound), (*picture.hints, *in_sound))


def text_like_item(rng: random.Random, held_out: bool) -> Item:
    kind = drawn(rng, READING)
    if kind == "unknown":
        return unknown_item(rng)
    return {"text": text_item, "tool": tool_item, "story": story_item}[kind](rng, held_out)


def item(rng: random.Random, kind: str, material: Material) -> Item:
    """One of a kind: "image", "audio", "both", "video" or "text", which stands for all without media."""
    if kind in ("video", "text"):
        return {"video": film_item, "text": text_like_item}[kind](rng, material.held_out)
    return {"image": image_item, "audio": audio_item, "both": both_item}[kind](rng, material)
