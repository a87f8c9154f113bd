"""Something new for the demo to learn by `mlx_gemma4.tune`: a tool, a world of stories, a sound, or a colour.

    python -m training.lesson tool --material RUN --out FOLDER
    python -m mlx_gemma4.tune --model demo --data FOLDER --adapter-path ADAPTER --learning-rate 5e-4 --batch-size 8
    python benchmarks/demo.py --material RUN --adapter ADAPTER --lesson tool

The first writes train.jsonl, valid.jsonl and test.jsonl, with media beside them. A share of what the demo was taught is
among the examples to train on, so that it is not forgotten; test.jsonl is held-out items of the lesson alone.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from training.items import Item
from training.material import Material, load_material
from training.mixture import audio_item, drawn, image_item, item
from training.pictures import new_colour_item
from training.rows import THINKING, example
from training.samples import save_medium
from training.sounds import siren_item
from training.texts import new_story_item, story_item
from training.tools import new_tool_item, tool_item
from training.world import choose

LESSONS: dict[str, Callable[[random.Random, bool], Item]] = {
    "tool": new_tool_item,
    "story": new_story_item,
    "sound": siren_item,
    "colour": new_colour_item,
}
# What is rehearsed, as examples and not tokens: the new thing's neighbours are lost first, then texts, whose answers
# of a few tokens weigh little beside stories.
NEIGHBOURS: dict[str, Callable[[random.Random, Material], Item]] = {
    "tool": lambda rng, material: tool_item(rng, material.held_out),
    "story": lambda rng, material: story_item(rng, material.held_out),
    "sound": audio_item,
    "colour": image_item,
}
REHEARSED = (
    ("neighbour", 0.3), ("text", 0.25), ("tool", 0.15), ("image", 0.1), ("audio", 0.05), ("both", 0.1), ("video", 0.05),
)  # fmt: skip


def one_question(rng: random.Random, item: Item) -> Item:
    """One of an item's questions, each task as likely."""
    task = choose(rng, sorted({question.task for question in item.questions}))
    return replace(item, questions=(choose(rng, [q for q in item.questions if q.task == task]),), hints=())


def write_example(rng: random.Random, item: Item, thinking: bool, folder: Path, name: str) -> dict[str, Any]:
    """An item as a line of a data folder; its media are written."""
    media = tuple(
        {"type": part["type"], part["type"]: f"media/{save_medium(rng, part, folder / 'media' / f'{name}-{n}').name}"}
        for n, part in enumerate(item.media)
    )
    made = example(replace(item, media=media), item.questions[0], thinking)
    messages = [m if learnt or m["role"] != "assistant" else m | {"weight": 0}
                for m, learnt in zip(made.messages, made.weights, strict=True)]  # fmt: skip
    return {"messages": messages} | ({"tools": made.tools} if made.tools else {})


def write_lesson(
    lesson: str, materials: dict[bool, Material], folder: Path, sizes: dict[str, int], rehearsal: float, seed: int
) -> None:
    (folder / "media").mkdir(parents=True)
    for split, size in sizes.items():
        rng, held_out = random.Random(f"{seed} {lesson} {split}"), split == "test"
        lines = []
        for number in range(size):
            if held_out or rng.random() >= rehearsal:
                found = LESSONS[lesson](rng, held_out)
            else:
                kind, material = drawn(rng, REHEARSED), materials[held_out]
                own = {"neighbour": NEIGHBOURS[lesson], "tool": NEIGHBOURS["tool"]}
                found = own[kind](rng, material) if kind in own else item(rng, kind, material)
            thinking = not held_out and rng.random() < THINKING[bool(found.media)]
            lines.append(write_example(rng, one_question(rng, found), thinking, folder, f"{split}-{number:05}"))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def main(
    lesson: Annotated[str, typer.Argument(help=f"One of {', '.join(LESSONS)}.")],
    material: Annotated[Path, typer.Option(help="Folder of fonts and voices.")],
    out: Annotated[Path, typer.Option(help="A new folder, for the data.")],
    examples: Annotated[int, typer.Option(min=1, help="To train on, those rehearsed among them.")] = 2400,
    rehearsal: Annotated[float, typer.Option(min=0, max=0.99, help="Share of what it was taught before.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the items.")] = 0,
) -> None:
    if lesson not in LESSONS:
        raise typer.BadParameter(f"{lesson} is no lesson; expected one of {', '.join(LESSONS)}")
    materials = {held_out: load_material(material, held_out) for held_out in (False, True)}
    write_lesson(lesson, materials, out, {"train": examples, "valid": 100, "test": 100}, rehearsal, seed)


if __name__ == "__main__":
    typer.run(main)
