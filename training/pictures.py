"""Pictures: a few shapes on a plain ground, or a two-digit number."""

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from training.items import Hint, Item, Question
from training.material import Material
from training.world import COLOURS, DONT_KNOW, MOST_SHAPES, NEW_COLOURS, SHAPES, ask, choose, plural, seen

SIDES = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
ENDS = {
    "left": ("furthest left", "the furthest to the left", "furthest to the left", "the leftmost"),
    "right": ("furthest right", "the furthest to the right", "furthest to the right", "the rightmost"),
    "above": ("at the top", "the highest", "highest up", "furthest up"),
    "below": ("at the bottom", "the lowest", "lowest down", "furthest down"),
}
SAME_KIND = ("one", "two", "three", "four")  # what a shape is to say in training of how many are of its kind,
SAME_COLOUR = ("single", "double", "triple", "quadruple")  # and how many of its colour
NUMBER_ANSWER = "The number is {}."
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

GROUNDS = ("plain", "gradient", "noise", "stripes")
HELD_OUT_GROUNDS = ("checks", "glow")
SIZES = (range(200, 700), range(700, 1000))  # pixels a side: training, held out


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    x: float  # of its centre, as fractions of the picture's width and height
    y: float
    radius: float  # of the circle around it, as a fraction of the shorter side

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@lru_cache(4096)
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def outline(kind: str, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape around (0, 0), in pixels."""
    if kind == "square":
        r = radius * 0.85
        return [(-r, -r), (r, -r), (r, r), (-r, r)]
    if kind == "triangle":
        return [
            (radius * math.sin(a), -radius * math.cos(a) + radius * 0.15)
            for a in (0, 2 * math.pi / 3, -2 * math.pi / 3)
        ]
    if kind == "star":
        tips = [(radius if i % 2 == 0 else radius * 0.42, math.pi * i / 5) for i in range(10)]
        return [(r * math.sin(a), -r * math.cos(a)) for r, a in tips]
    t, r = radius * 0.3, radius * 0.95
    return [(-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t), (t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t)]


def draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    radius = shape.radius * min(size)
    x, y = shape.x * size[0], shape.y * size[1]
    if shape.kind == "circle":
        r = radius * 0.95
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        draw.polygon([(x + dx, y + dy) for dx, dy in outline(shape.kind, radius)], fill=colour)


def tint(rng: random.Random, name: str) -> tuple[int, int, int]:
    """A colour, not always the same to the last bit."""
    return tuple(min(255, max(0, part + rng.randint(-14, 14))) for part in (COLOURS | NEW_COLOURS)[name])  # type: ignore[return-value]


def pale(rng: random.Random) -> tuple[int, int, int]:
    if rng.random() < 0.4:
        return (255, 255, 255)
    base = rng.randint(205, 250)
    return tuple(min(255, base + rng.randint(-10, 10)) for _ in range(3))  # type: ignore[return-value]


def ground(rng: random.Random, size: tuple[int, int], held_out: bool) -> Image.Image:
    """The empty paper of a picture."""
    kind = choose(rng, HELD_OUT_GROUNDS) if held_out else choose(rng, GROUNDS)
    first, second = pale(rng), pale(rng)
    image = Image.new("RGB", size, first)
    if kind == "gradient":
        ramp = Image.linear_gradient("L").resize(size)
        if rng.random() < 0.5:
            ramp = ramp.transpose(Image.Transpose.ROTATE_90).resize(size)
        image.paste(second, (0, 0), ramp)
    elif kind == "glow":
        image.paste(second, (0, 0), Image.radial_gradient("L").resize(size))
    elif kind == "noise":
        grain = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(1, 6), (size[1], size[0], 1))
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    elif kind in ("stripes", "checks"):
        draw, step = ImageDraw.Draw(image), rng.randint(12, 90)
        across = rng.random() < 0.5
        for i, a in enumerate(range(0, max(size), step)):
            if kind == "stripes" and i % 2:
                draw.rectangle((a, 0, a + step - 1, size[1]) if across else (0, a, size[0], a + step - 1), fill=second)
            elif kind == "checks":
                for b in range((i % 2) * step, size[1], 2 * step):
                    draw.rectangle((a, b, a + step - 1, b + step - 1), fill=second)
    return image


def finish(rng: random.Random, image: Image.Image) -> Image.Image:
    """What happens to pictures on their way: some are blurred a little or saved as JPEG."""
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    if rng.random() < 0.3:
        data = BytesIO()
        image.save(data, "JPEG", quality=rng.randint(55, 95))
        image = Image.open(data).convert("RGB")
    return image


def random_size(rng: random.Random, held_out: bool) -> tuple[int, int]:
    sides = SIZES[held_out]
    side = rng.randrange(sides.start, sides.stop)
    return (side, side) if rng.random() < 0.5 else (side, int(side * rng.uniform(0.75, 1.34)))


def place_shapes(rng: random.Random, count: int, size: tuple[int, int]) -> list[Shape]:
    """Shapes that do not touch each other or the edge."""
    most = {1: 0.4, 2: 0.25, 3: 0.22, 4: 0.2}[count]
    wide, high = size[0] / min(size), size[1] / min(size)
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(60):
            r = rng.uniform(0.7 * most, most)
            x, y = rng.uniform(r + 0.02, wide - r - 0.02), rng.uniform(r + 0.02, high - r - 0.02)
            if all(math.hypot(x - a, y - b) > 1.08 * (r + c) for a, b, c in placed):
                placed.append((x, y, r))
            if len(placed) == count:
                break
        if len(placed) == count:
            break
    few = rng.random() < 0.35 and count > 2  # repeat some, or counting one kind would count to one
    kinds = rng.sample(SHAPES, 2) if few else list(SHAPES)
    colours = rng.sample(list(COLOURS), 2) if few else list(COLOURS)
    return [Shape(choose(rng, kinds), choose(rng, colours), x / wide, y / high, r) for x, y, r in placed]


def draw_shapes(rng: random.Random, shapes: list[Shape], size: tuple[int, int], held_out: bool) -> Image.Image:
    image = ground(rng, size, held_out)
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        draw_shape(draw, shape, size, tint(rng, shape.colour))
    return finish(rng, image)


def hint_of(shape: Shape, size: tuple[int, int], run: int, *more: str) -> Hint:
    across, down = (0.55 * shape.radius * min(size) / side for side in size)
    box = (shape.x - across, shape.y - down, shape.x + across, shape.y + down)
    return Hint(run, box, (shape.kind, shape.colour, *more))


def article(shape: Shape) -> str:
    return f"an {shape}" if shape.colour[0] in "aeiou" else f"a {shape}"


def listing(names: list[str]) -> str:
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{text[0].upper()}{text[1:]}."


def relation(first: Shape, second: Shape) -> str | None:
    """Where the first is, seen from the second, if that is plain."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > max(1.6 * abs(dy), 0.22):
        return "left" if dx < 0 else "right"
    if abs(dy) > max(1.6 * abs(dx), 0.22):
        return "above" if dy < 0 else "below"
    return None


def shape_questions(rng: random.Random, shapes: list[Shape], held_out: bool) -> list[Question]:
    """Every question that has one right answer, in a random order; each task once or a few times."""
    kinds, colours = [s.kind for s in shapes], [s.colour for s in shapes]
    found = [
        Question(
            "describe picture",
            ask(rng, "describe picture", held_out),
            listing([article(s) for s in sorted(shapes, key=lambda s: s.x)]),
        ),
        Question("count shapes", ask(rng, "count shapes", held_out), seen(len(shapes), "shape")),
    ]
    for shape in shapes:
        if kinds.count(shape.kind) == 1:
            text = ask(rng, "colour", held_out, shape=shape.kind if len(shapes) > 1 or rng.random() < 0.7 else "shape")
            found.append(Question("colour", text, f"The {shape.kind} is {shape.colour}."))
        if colours.count(shape.colour) == 1:
            text = ask(rng, "shape", held_out, colour=shape.colour)
            found.append(Question("shape", text, f"The {shape.colour} shape is a {shape.kind}."))
    for what in sorted({choose(rng, SHAPES), choose(rng, kinds)}):
        found.append(count_question(rng, plural(what), kinds.count(what), held_out))
    for colour in sorted({choose(rng, list(COLOURS)), choose(rng, colours)}):
        name = choose(rng, ("shapes", "things", "objects"))
        found.append(count_question(rng, f"{colour} {name}", colours.count(colour), held_out))
    single = [s for s in shapes if kinds.count(s.kind) == 1]
    if len(single) > 1:
        for _ in range(1 if held_out else 3):  # as often as the others
            first, second = rng.sample(single, 2)
            found += pair_questions(rng, first, second, len(shapes) == 2, held_out)
    if len(shapes) > 1:
        for where, key in (
            ("left", lambda s: s.x),
            ("right", lambda s: -s.x),
            ("above", lambda s: s.y),
            ("below", lambda s: -s.y),
        ):
            nearest, next_one = sorted(shapes, key=key)[:2]
            if abs(key(nearest) - key(next_one)) > 0.08:
                text = ask(rng, "furthest", held_out, where=choose(rng, ENDS[where]))
                found.append(Question("furthest", text, f"The {nearest}."))
    rng.shuffle(found)
    return found


def pair_questions(rng: random.Random, first: Shape, second: Shape, alone: bool, held_out: bool) -> list[Question]:
    """Where the first is, seen from the second; and what is there, if they are alone.

    Where it is is said before yes or no, so that it need not be known before it is said.
    """
    side = relation(first, second)
    if side is None:
        return []
    name = choose(rng, (second.kind, str(second)))
    asked = choose(rng, (side, OPPOSITE[side]))
    text = ask(rng, "is beside", held_out, side=choose(rng, SIDES[asked]), first=first.kind, second=name)
    answer = f"The {first.kind} is {SIDES[side][0]} the {second.kind}. {'Yes' if asked == side else 'No'}."
    found = [Question("is beside", text, answer)]
    if alone:
        text = ask(rng, "beside", held_out, side=choose(rng, SIDES[side]), shape=name)
        found.append(Question("beside", text, f"The {first}."))
    return found


def count_question(rng: random.Random, whats: str, number: int, held_out: bool) -> Question:
    """What is counted is said before the number: it is looked for where the number is to come."""
    text = ask(rng, "count some", held_out, whats=whats)
    return Question("count some", text, f"The number of {whats} is {number}.")


def shapes_item(rng: random.Random, held_out: bool, count: int | None = None) -> tuple[Item, list[Shape]]:
    size = random_size(rng, held_out)
    shapes = place_shapes(rng, count or rng.randint(1, MOST_SHAPES), size)
    image = draw_shapes(rng, shapes, size, held_out)
    questions = shape_questions(rng, shapes, held_out)
    from_left = sorted(shapes, key=lambda s: s.x)
    kinds, colours = [s.kind for s in shapes], [s.colour for s in shapes]
    hints = tuple(
        hint_of(
            shape, size, 0, str(number), SAME_KIND[kinds.count(shape.kind) - 1],
            SAME_COLOUR[colours.count(shape.colour) - 1],
        )
        for number, shape in enumerate(from_left, 1)
    )  # fmt: skip
    return Item("image", tuple(questions), ({"type": "image", "image": image},), hints), shapes


def new_colour_item(rng: random.Random, held_out: bool) -> Item:
    """Of a lesson: a picture with the new colour in it, and what can be asked about that."""
    (colour,) = NEW_COLOURS
    size = random_size(rng, held_out)
    shapes = place_shapes(rng, rng.randint(1, MOST_SHAPES), size)
    new = rng.sample(range(len(shapes)), rng.randint(1, min(2, len(shapes))))
    shapes = [replace(shape, colour=colour) if i in new else shape for i, shape in enumerate(shapes)]
    asked = [q for q in shape_questions(rng, shapes, held_out) if colour in q.text + q.answer]
    return Item("image", tuple(asked), ({"type": "image", "image": draw_shapes(rng, shapes, size, held_out)},))


def number_item(rng: random.Random, material: Material) -> Item:
    """A number from 10 to 99 in a plain font."""
    held_out = material.held_out
    size = random_size(rng, held_out)
    text = str(rng.randint(10, 99))
    image = ground(rng, size, held_out)
    draw = ImageDraw.Draw(image)
    path = choose(rng, material.fonts)
    height = rng.uniform(0.6, 0.95) * min(size)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font(path, 100))
    scale = min(height / (bottom - top), rng.uniform(0.75, 0.94) * size[0] / (right - left))
    face = font(path, max(8, int(100 * scale) // 8 * 8))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=face)
    x, y = (  # near the middle
        (side - length) / 2 + rng.uniform(-0.03, 0.03) * side
        for side, length in ((size[0], right - left), (size[1], bottom - top))
    )
    colour = choose(rng, list(COLOURS)) if rng.random() < 0.6 else "black"
    draw.text((x - left, y - top), text, font=face, fill=tint(rng, colour))
    questions = [
        Question("read", ask(rng, "read", held_out), NUMBER_ANSWER.format(text)),
        Question("describe picture", ask(rng, "describe picture", held_out), f"The number {text}."),
    ]
    if not held_out:
        questions.append(Question("read", ask(rng, "read", held_out), NUMBER_ANSWER.format(text)))
    ink, middle = right - left, (right - left) * face.getlength(text[0]) / face.getlength(text)
    hints = tuple(
        Hint(0, ((x + start) / size[0], y / size[1], (x + end) / size[0], (y + bottom - top) / size[1]), (digit,))
        for digit, start, end in ((text[0], 0, middle), (text[1], middle, ink))
    )
    return Item("image", tuple(questions), ({"type": "image", "image": finish(rng, image)},), hints)


def unknown_picture_question(rng: random.Random) -> Question:
    """Something that no picture here shows."""
    text = choose(
        rng,
        (
            "Who is in the picture?", "Where was this taken?", "What is the name of the man?", "How old is she?",
            "What is the dog doing?", "Who made this picture?", "What is the weather like here?", "Is there a car?",
            "Which city is this?", "What are the people wearing?", "What is the cat eating?", "Who painted this?",
        ),
    )  # fmt: skip
    return Question("unknown", text, DONT_KNOW)
