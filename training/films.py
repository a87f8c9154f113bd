"""Films: one shape that comes into the picture and moves, or stays where it is."""

import random

from PIL import Image, ImageDraw

from mlx_gemma4.media.video import timestamp
from training.items import Hint, Item, Question
from training.pictures import Shape, draw_shape, ground, hint_of, random_size, tint
from training.world import COLOURS, DIRECTIONS, SHAPES, ask, choose

FRAMES = 6  # of a video, as the demo's processor_config.json says


def film_item(rng: random.Random, held_out: bool) -> Item:
    """Six frames, one each second: the shape appears in one of the first four and moves until the end, or rests."""
    size = random_size(rng, held_out)
    kind, colour = choose(rng, SHAPES), choose(rng, list(COLOURS))
    way = choose(rng, (*DIRECTIONS, "")) or None
    first = rng.choice((0, 0, 1, 2, 3))
    radius = rng.uniform(0.11, 0.24)
    shown = FRAMES - first
    step = rng.uniform(0.4, 0.66) / (shown - 1)
    wide, high = size[0] / min(size), size[1] / min(size)
    x, y = (
        rng.uniform(radius / wide + 0.01, 1 - radius / wide - 0.01),
        rng.uniform(radius / high + 0.01, 1 - radius / high - 0.01),
    )
    dx = {"left": -step, "right": step}.get(way or "", 0.0)
    dy = {"up": -step, "down": step}.get(way or "", 0.0)
    travel = step * (shown - 1)
    room = 1 - travel - 0.15
    if dx:
        x = rng.uniform(0.08, 0.08 + max(room, 0.05)) + (travel if dx < 0 else 0)
    if dy:
        y = rng.uniform(0.08, 0.08 + max(room, 0.05)) + (travel if dy < 0 else 0)
    paper, ink = ground(rng, size, held_out), tint(rng, colour)
    frames, hints = [], list[Hint]()
    for number in range(FRAMES):
        frame = paper.copy()
        if number >= first:
            moved = number - first
            shape = Shape(kind, colour, x + dx * moved, y + dy * moved, radius)
            draw_shape(ImageDraw.Draw(frame), shape, size, ink)
            hints.append(hint_of(shape, size, number, *((way or "not",) if moved else ())))
        frames.append(frame)
    direction = Question(
        "direction", ask(rng, "direction", held_out, shape=kind), f"It moves {way}." if way else "It does not move."
    )
    questions = [
        direction,
        Question("film colour", ask(rng, "film colour", held_out, shape=kind), f"It is {colour}."),
        Question("film shape", ask(rng, "film shape", held_out), f"It is a {kind}."),
        Question("appears", ask(rng, "appears", held_out, shape=kind), f"It appears at {timestamp(first)}."),
    ]
    rng.shuffle(questions)
    part = {"type": "video", "video": frames, "fps": 1.0}
    return Item("video", tuple(questions), (part,), tuple(hints))


def save_film(frames: list[Image.Image], path: str) -> None:
    """Frames as an MP4 of one a second; sides made even, as the codec wants them."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.resize((stream.width, stream.height)))))
        container.mux(stream.encode())
