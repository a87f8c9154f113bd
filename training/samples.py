"""Held-out items as files that a person could have made: some for the tests, and one of each kind beside the model.

`python -m training.samples RUN`, after the export.
"""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import soundfile
import soxr
import typer

from mlx_gemma4.weights.load import DEMO
from training.films import film_item, save_film
from training.items import Item
from training.material import Material, load_material
from training.mixture import both_item, image_item
from training.pictures import number_item, shapes_item
from training.sounds import beeps_item, digit_item, still_item, tone_item
from training.world import MOST_SHAPES

ROOT = Path(__file__).parents[1]
TEST_ITEMS = ROOT / "tests" / "demo"
RATES = (16000, 22050, 44100, 48000)  # Hz
SEED = 2026


def items(rng: random.Random, material: Material) -> list[Item]:
    """A few dozen, of every kind."""
    found = [image_item(rng, material) for _ in range(8)]
    found += [make(rng, True) for make in (beeps_item, tone_item, still_item) for _ in range(2)]
    found += [digit_item(rng, material) for _ in range(4)]
    found += [film_item(rng, True) for _ in range(4)]
    return found + [both_item(rng, material) for _ in range(4)]


def save_medium(rng: random.Random, part: dict[str, Any], path: Path) -> Path:
    """A part of a message as a file: PNG or JPEG, WAV or MP3 of any usual rate, MP4."""
    if part["type"] == "image":
        path = path.with_suffix(rng.choice((".png", ".jpg")))
        part["image"].save(path, quality=90)
    elif part["type"] == "audio":
        path = path.with_suffix(rng.choice((".wav", ".mp3")))
        samples, rate = part["audio"]
        new = rng.choice(RATES)
        soundfile.write(path, soxr.resample(samples, rate, new), new)
    else:
        path = path.with_suffix(".mp4")
        save_film(part["video"], str(path))
    return path


def write_items(folder: Path, rng: random.Random, found: Sequence[Item]) -> None:
    """One file for each medium, and items.jsonl: {"media": {type: name}, "question", "answer"}."""
    lines = []
    for number, item in enumerate(found):
        media = {}
        for part in item.media:
            media[part["type"]] = save_medium(rng, part, folder / f"{number:02}-{item.group}").name
        question = rng.choice(item.questions)
        lines.append({"media": media, "question": question.text, "answer": question.answer})
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def samples(rng: random.Random, material: Material) -> dict[str, Item]:
    """What lies beside the model, by the names of the files."""
    return {
        "shapes": shapes_item(rng, True, MOST_SHAPES)[0],
        "number": number_item(rng, material),
        "beeps": beeps_item(rng, True),
        "digit": digit_item(rng, material),
        "film": film_item(rng, True),
    }


def emptied(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def main(run: Annotated[Path, typer.Argument(help="The folder of the material.")]) -> None:
    rng, material = random.Random(SEED), load_material(run, held_out=True)
    write_items(emptied(TEST_ITEMS), rng, items(rng, material))
    beside = emptied(DEMO / "samples")
    for name, item in samples(rng, material).items():
        save_medium(rng, item.media[0], beside / name)


if __name__ == "__main__":
    typer.run(main)
