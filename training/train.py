"""Train the demo's target model: `python -m training.train FOLDER`; start it again to go on."""

import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import typer
from mlx.utils import tree_map_with_path

from mlx_gemma4.config import read_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor, load_processor
from mlx_gemma4.tune.network import outputs
from mlx_gemma4.tune.rows import Passage, Row
from mlx_gemma4.tune.state import merge, save, trees_of
from mlx_gemma4.tune.step import Processes, slopes, update
from mlx_gemma4.weights.load import parameters
from training.checkpoint import write_files
from training.items import Item
from training.material import Material, load_material
from training.mixture import item
from training.rows import of_hints, passage, rows
from training.start import initialise

ROW, LONG_ROW = 256, 512  # tokens
LOOKING = 800  # first steps, in which media stand alone and their soft tokens are taught: three times as many of them
LOOKING_ROWS = {"image": 4, "audio": 2, "text": 4}  # rows of ROW tokens in a step of one process
ROWS = {"image": 3, "audio": 1, "both": 2, "text": 4}  # and afterwards
QUESTIONS = {"video": 4}  # about one medium, 2 about all others: what there is to see is learnt from many media
WARM_UP = 60  # steps
HINT_LAYERS = 4  # of six: what soft tokens say after these, the last two can still carry to where it is asked for
BITS, GROUP = 4, 64  # of the checkpoint as shipped
LONG_SHARE = 0.2  # of the films in the loss, against 1 of all others


class Source:
    """Batches, each made from the seed and its own number alone."""

    def __init__(self, processor: Processor, material: Material, seed: str):
        self.processor, self.material, self.seed = processor, material, seed
        self.rng = random.Random(seed)

    def item(self, kind: str) -> Item:
        return item(self.rng, kind, self.material)

    def passage(self, item: Item, room: int) -> Passage:
        return passage(self.processor, item, self.rng, room)

    def row(self, kind: str, length: int, number: int) -> list[Passage]:
        """Passages of one kind until the row is nearly full, as they are in the step of this number."""
        row: list[Passage] = []
        room, misses = length, 0
        while True:
            item = self.item(kind)
            if item.media:
                most = QUESTIONS.get(kind, 2) if number >= LOOKING else 0
                asked = self.rng.sample(item.questions, min(len(item.questions), most))
                item = replace(item, questions=tuple(asked))
            one = self.passage(item, room)
            if len(one) <= room:
                row.append(one)
                room -= len(one)
            else:
                misses += 1
            if row and (room < 40 or misses == (4 if kind == "text" else 1)):  # a text may be shorter; media are not
                return row

    def step(self, number: int) -> list[Row]:
        self.rng = random.Random(f"{self.seed} {number}")
        kinds = LOOKING_ROWS if number < LOOKING else ROWS
        members = [one for kind, count in kinds.items() for _ in range(count) for one in self.row(kind, ROW, number)]
        short = rows(self.processor, members, LONG_ROW)
        films = rows(self.processor, self.row("video", LONG_ROW, number), LONG_ROW)
        share = LONG_SHARE * sum(one.weights.sum() for one in short) / sum(one.weights.sum() for one in films)
        return [*short, *(replace(one, weights=one.weights * np.float32(share)) for one in films)]


class Workers:
    """Processes that make the batches ahead, for a device that is faster than one of them."""

    def __init__(self, count: int, folder: Path, seed: str):
        self.pool = get_context("spawn").Pool(count, set_source, (folder, seed))
        self.ahead = 3 * count

    def steps(self, start: int, end: int) -> Iterator[list[Row]]:
        waiting: deque[AsyncResult[list[Row]]] = deque()
        for number in range(start, end):
            waiting.append(self.pool.apply_async(step_of_source, (number,)))
            if len(waiting) == self.ahead:
                yield waiting.popleft().get()
        for result in waiting:
            yield result.get()


source_here: Source  # of a worker


def set_source(folder: Path, seed: str) -> None:
    global source_here
    source_here = make_source(folder, seed)


def step_of_source(number: int) -> list[Row]:
    return source_here.step(number)


def make_source(folder: Path, seed: str) -> Source:
    return Source(load_processor(folder, read_config(folder)), load_material(folder, False), seed)


def as_quantized(model: Model) -> None:
    """Put the values in that 4 bits leave of each matrix; gradients pass as if they were the weights themselves."""

    def rounded(name: str, weight: mx.array) -> mx.array:
        if weight.ndim != 2 or not name.endswith(".weight"):
            return weight
        fixed = mx.stop_gradient(weight)
        return weight + (mx.dequantize(*mx.quantize(fixed, GROUP, BITS), group_size=GROUP, bits=BITS) - fixed)

    model.update(tree_map_with_path(rounded, model.parameters()))


def states(model: Model, quantized: bool, one: Row) -> mx.array:
    """[N, D]: what an answer is told from, and hints after fewer layers."""
    if quantized:
        as_quantized(model)
    found = [h for h, _, _ in outputs(model, one, checkpoint=False)]
    late, soon = (model.language_model.norm(h)[0][mx.array(one.places)] for h in (found[-1], found[HINT_LAYERS - 1]))
    return mx.where(mx.array(of_hints(one))[:, None], soon, late)


PROJECTION_RATE = 0.5  # of the others': a row of pixels' weights leaves the waves it starts from within a few steps


def optimizer(peak: float) -> optim.MultiOptimizer:
    """AdamW, slower for the projections of media than for all others."""

    def is_projection(name: str, value: mx.array) -> bool:
        return value.ndim == 2 and "layers." not in name and "embed_tokens" not in name

    slow, others = (
        optim.AdamW(learning_rate=rate, betas=[0.9, 0.95], weight_decay=0.0) for rate in (PROJECTION_RATE * peak, peak)
    )
    return optim.MultiOptimizer([slow, others], [is_projection])


def main(
    folder: Annotated[Path, typer.Argument(help="Holds the material; gets the run.")],
    steps: Annotated[int, typer.Option(help="Train up to this step.")] = 2500,
    decay: Annotated[int, typer.Option(help="Let the rate fall to nothing over so many last steps.")] = 0,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 0.0015,
    seed: Annotated[int, typer.Option(help="Of the weights and the data.")] = 0,
    state: Annotated[str, typer.Option(help="Name of the file that the run is kept in.")] = "state",
    quantized: Annotated[
        bool, typer.Option("--quantized", help="Compute with the weights as 4 bits hold them.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that make data; 0: none but this one.")] = 0,
    resume_from: Annotated[str | None, typer.Option(help="Start from another run's file.")] = None,
) -> None:
    processes = Processes(mx.distributed.init())
    if processes.rank == 0 and not (folder / "config.json").exists():
        write_files(folder)
    processes.sum([mx.array(1.0)])  # the others wait for the files
    config = read_config(folder)
    model = Model(config)
    initialise(model, seed)
    model.vision_embedder.patch_ln1.freeze()  # its weights are 1 and 0
    optimise = optimizer(rate)
    optimise.init(model.trainable_parameters())
    start, path = 0, folder / f"{state}.safetensors"
    found = path if path.exists() else folder / f"{resume_from}.safetensors" if resume_from else None
    if found is not None:
        trees, about = trees_of(found)
        start = int(about["step"])
        model.update(trees["model"])
        optimise.state = merge(optimise.state, trees["optimizer"])
    name = f"{seed} {processes.rank}"
    batches = (
        Workers(workers, folder, name).steps(start, steps)
        if workers
        else map(make_source(folder, name).step, range(start, steps))
    )

    told = partial(slopes, model, states=partial(states, model, quantized))
    began, seen, tokens = time.perf_counter(), 0.0, 0
    for step, made in zip(range(start, steps), batches, strict=True):
        factor = min(1.0, (step + 1) / WARM_UP, (steps - step) / decay if decay else 1.0)
        for one, scale in zip(optimise.optimizers, (PROJECTION_RATE, 1.0), strict=True):
            one.learning_rate = rate * scale * factor
        now = update(model, optimise, made, told, processes)
        seen, tokens = seen + now.loss / 50, tokens + now.tokens
        if (step + 1) % 50 == 0 and processes.rank == 0:
            taken = time.perf_counter() - began
            print(f"{step + 1} loss {seen:.3f} {tokens / taken:.0f} tokens/s {taken / 50:.2f} s/step", flush=True)
            began, seen, tokens = time.perf_counter(), 0.0, 0
        if processes.rank == 0 and ((step + 1) % 250 == 0 or step + 1 == steps):
            save(path, {"model": parameters(model), "optimizer": optimise.state}, {"step": str(step + 1)})


if __name__ == "__main__":
    typer.run(main)
