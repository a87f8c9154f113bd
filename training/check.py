"""How much of the held-out items a run in training gets right: `python -m training.check FOLDER`.

A greedy reply is right if each of its tokens is the likeliest after the right ones before it, so one pass over an
item with its answer tells. `benchmarks/demo.py` is the real thing: it generates, with the checkpoint as shipped.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import numpy as np
import typer

from mlx_gemma4.config import read_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.tune.rows import Row
from mlx_gemma4.tune.state import trees_of
from training.material import load_material
from training.rows import answers_alone, rows
from training.train import LONG_ROW, Source, states


def is_right(model: Model, one: Row) -> bool:
    """Whether each token of the answer is the likeliest."""
    likeliest = mx.argmax(model.language_model.head(states(model, False, one)[None])[0], axis=-1)
    return np.array_equal(likeliest, one.targets)


def main(
    folder: Annotated[Path, typer.Argument(help="Of the run.")],
    items: Annotated[int, typer.Option(help="Items of each kind.")] = 60,
    state: Annotated[str, typer.Option(help="The run's file.")] = "state",
    train: Annotated[bool, typer.Option("--train", help="Of the kind trained on, not held out.")] = False,
) -> None:
    config = read_config(folder)
    model = Model(config)
    trees, about = trees_of(folder / f"{state}.safetensors")
    model.update(trees["model"])
    source = Source(load_processor(folder, config), load_material(folder, not train), "check")
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for kind in ("image", "audio", "both", "video", "text"):
        for _ in range(items * (4 if kind == "text" else 2 if kind == "audio" else 1)):
            item = source.item(kind)
            for question in item.questions:
                asks = source.passage(replace(item, questions=(question,)), LONG_ROW)
                [one] = rows(source.processor, [asks], LONG_ROW)
                asked[f"{kind}: {question.task}"] += 1
                right[f"{kind}: {question.task}"] += is_right(model, answers_alone(one))
    print(f"step {about['step']}")
    for name, count in sorted(asked.items()):
        print(f"{name:28} {right[name]:4} of {count:4}  {100 * right[name] / count:5.1f} %")


if __name__ == "__main__":
    typer.run(main)
