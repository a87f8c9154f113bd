"""How much of the held-out items a run in training gets right: `python -m training.check FOLDER`.

A greedy reply is right if each of its tokens is the likeliest after the right ones before it, so one pass over an
item with its answer tells. `benchmarks/demo.py` is the real thing: it generates, with the checkpoint as shipped.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import numpy as np
import typer

from mlx_gemma4.config import read_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.tune.state import trees_of
from training.forward import hidden_states, learnt_logits
from training.material import load_material
from training.rows import Batch, batch
from training.train import FRAME, LONG_ROW, PATCH, ROW, Source


def right_answers(model: Model, one: Batch) -> np.ndarray:
    """For each token of an answer whether it is the likeliest, bool."""
    hidden, early, _ = hidden_states(model, one)
    likeliest = np.array(mx.argmax(learnt_logits(model, hidden, early, one), axis=-1))
    return (likeliest == one.targets)[one.answers]


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
            length = LONG_ROW if kind == "video" else 2 * ROW
            one = source.passage(item, length)
            if len(one) > length:
                continue
            hits = right_answers(model, batch([[one]], length, PATCH, FRAME))
            at = 0
            for question, segment in zip(item.questions, one.segments, strict=False):
                count = len(segment.ids) - segment.answer
                asked[f"{kind}: {question.task}"] += 1
                right[f"{kind}: {question.task}"] += int(hits[at : at + count].all())
                at += count
    print(f"step {about['step']}")
    for name, count in sorted(asked.items()):
        print(f"{name:28} {right[name]:4} of {count:4}  {100 * right[name] / count:5.1f} %")


if __name__ == "__main__":
    typer.run(main)
