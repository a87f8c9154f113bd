"""The command `mlx_gemma4.tune`: an adapter from a folder of examples."""

import importlib.util
import logging
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer

from mlx_gemma4 import flags
from mlx_gemma4.config import computing_type, expanded
from mlx_gemma4.errors import shown
from mlx_gemma4.flags import above_0, number, option, switch, whole
from mlx_gemma4.model.model import Model
from mlx_gemma4.planner import memory_limit
from mlx_gemma4.prompt.processor import Processor, load_processor
from mlx_gemma4.terminal import Bar, SizeBar, run, size_text
from mlx_gemma4.tune.answers import answers
from mlx_gemma4.tune.data import Example, read_split
from mlx_gemma4.tune.plan import TuningPlan, check_plan
from mlx_gemma4.tune.run import Data, News, Rows, Run, read_data
from mlx_gemma4.tune.settings import Adapter, Settings
from mlx_gemma4.tune.step import Processes
from mlx_gemma4.weights.adapter import WEIGHTS, read_weights, write_peft
from mlx_gemma4.weights.load import (
    DEFAULT_MODEL,
    Checkpoint,
    find_drafter,
    find_folder,
    load,
    logger,
    open_checkpoint,
    read_values,
)
from mlx_gemma4.weights.peers import together

TEXT_RATE, MEDIA_RATE = 1e-4, 5e-5
EPOCHS = 3
MOST_EXAMPLES = 4096  # of an update: finding which of them share a row takes the square of their number
MEASURED = 100  # examples that drafts are measured on


def tune(
    data: Annotated[str, option("FOLDER", "With train.jsonl, valid.jsonl, test.jsonl; or a dataset's hub id.")],
    adapter_path: Annotated[Path, option("FOLDER", "Gets the adapter, and the run's state.")],
    model: flags.ModelName = DEFAULT_MODEL,
    fine_tune_type: Annotated[str, option("TYPE", "lora or dora.")] = "lora",
    iters: Annotated[int | None, above_0("Batches; else three times through the examples.")] = None,
    batch_size: Annotated[int, above_0("Examples of a batch, in each process.")] = 4,
    learning_rate: Annotated[float | None, number("At its peak; else 1e-4, or 5e-5 with media.")] = None,
    warmup: Annotated[int | None, whole("Updates until the peak; else a tenth of all.")] = None,
    num_layers: Annotated[int, whole("Adapt the last N layers; -1 for all.")] = -1,
    rank: Annotated[int, whole("Of each matrix's change.")] = 8,
    scale: Annotated[float, number("What the change is times.")] = 10.0,
    max_seq_length: Annotated[int, above_0("Tokens of an example, and of a row of several.")] = 2048,
    drop_long: Annotated[bool, switch("Leave longer examples out, and say how many they were.", "--drop-long")] = False,
    mask_prompt: Annotated[
        bool, switch("Only replies are learnt: always so here, but for text.", "--mask-prompt")
    ] = False,
    grad_checkpoint: Annotated[bool, typer.Option(help="Compute layers twice, to keep little of them.")] = True,
    grad_accumulation_steps: Annotated[int, above_0("Batches of an update.")] = 1,
    steps_per_eval: Annotated[int, above_0("Batches between validations.")] = 200,
    val_batches: Annotated[int, whole("Batches of a validation; -1 for all.")] = 25,
    patience: Annotated[int, whole("End after N validations that are no better.")] = 0,
    save_every: Annotated[int, above_0("Batches between savings of the whole state.")] = 100,
    resume_adapter_file: Annotated[
        Path | None, option("FILE", "Start from the weights of another run's adapter.")
    ] = None,
    train_drafter: Annotated[
        bool, switch("Then teach the drafter what the tuned model says.", "--train-drafter")
    ] = False,
    test: Annotated[bool, switch("At the end, measure test.jsonl by loss and by answers.", "--test")] = False,
    peft: Annotated[bool, switch("Write the adapter as PEFT does too, into the subfolder peft.", "--peft")] = False,
    image_budget: Annotated[int | None, whole("Most tokens an image; else the checkpoint's.")] = None,
    seed: Annotated[int, whole("Of weights and order.")] = 0,
    dtype: flags.DType = None,
    version: flags.Version = False,
    debug: flags.Debug = False,
) -> None:
    """Teach a model what the examples' assistant says; started again, a run goes on where it stopped."""
    check_extra()
    check_numbers(iters, warmup, patience, seed, val_batches, learning_rate)
    check_update(batch_size, grad_accumulation_steps)
    adapter = Adapter(fine_tune_type, num_layers, rank, scale)
    adapter_path = expanded(adapter_path)
    beginning = None if resume_adapter_file is None else expanded(resume_adapter_file)
    check_paths(data, adapter_path, beginning)
    examples = read_examples(data, test, mask_prompt)
    checkpoint, processor = open_to_train(model, dtype, train_drafter)
    adapter.check_layers(len(checkpoint.model.language_model.layers))
    sets = read_sets(processor, examples, max_seq_length, drop_long, image_budget)
    processes = Processes(together())
    if processes.rank:
        logger.setLevel(logging.ERROR)  # the first one tells the rest
    tell_dropped(sets, max_seq_length)
    media = sets["train"].media
    iters = iters or -(-EPOCHS * len(sets["train"].passages) // (batch_size * processes.size))
    if warmup is None:
        warmup = -(-iters // grad_accumulation_steps) // 10
    settings = Settings(
        adapter=adapter, iters=iters, batch_size=batch_size, grad_accumulation_steps=grad_accumulation_steps,
        learning_rate=learning_rate or (MEDIA_RATE if media else TEXT_RATE), warmup=warmup,
        max_seq_length=max_seq_length, steps_per_eval=steps_per_eval, save_every=save_every, val_batches=val_batches,
        patience=patience, grad_checkpoint=grad_checkpoint, seed=seed, image_budget=image_budget,
    )  # fmt: skip
    rows = {split: Rows(processor, settings, own) for split, own in sets.items()}
    longest = max(own.room for own in rows.values())
    needs = check_plan(checkpoint, TuningPlan(longest, rank, grad_checkpoint, num_layers, media), memory_limit())
    network = load_to_train(checkpoint, settings, media, beginning)
    training = Run(adapter_path, network, settings, rows["train"], rows.get("valid"), model, processes)
    train(training, needs)
    if peft and processes.rank == 0:
        write_peft(adapter_path / "peft", read_weights(adapter_path / WEIGHTS), fine_tune_type, rank, scale, model)
    if test or train_drafter:
        take_kept(training)
    if test:
        loss = training.loss_of(rows["test"])
    if train_drafter:
        teach_drafter(training, checkpoint)
    if test:
        del training, network, checkpoint  # room for the model as it is in use
        if processes.rank == 0:
            tuned, _ = load(model, adapter=adapter_path, dtype=dtype)
            right = list(answers(tuned, processor, examples["test"], image_budget))
            print(f"test loss {loss:.4f}; {sum(right)} of {len(right)} replies are the expected ones")


# --- options -----------------------------------------------------------------------------------


def check_extra() -> None:
    if importlib.util.find_spec("mlx_lm") is None:
        raise ValueError(
            'mlx_lm is not installed, whose LoRA layers are trained; expected pip install "mlx_gemma4[tune]"'
        )


def check_numbers(
    iters: int | None, warmup: int | None, patience: int, seed: int, val_batches: int, learning_rate: float | None
) -> None:
    for name, value in (("warmup", warmup or 0), ("patience", patience), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} is {value}; expected 0 or more")
    for name, value in (("iters", iters or 0), ("warmup", warmup or 0)):
        if value >= 2**63:
            raise ValueError(f"{name} is {shown(value)}; expected less than 2**63")
    if seed >= 2**64:
        raise ValueError(f"seed is {seed}; expected less than 2**64")
    if val_batches < 1 and val_batches != -1:
        raise ValueError(f"val_batches is {val_batches}; expected 1 or more, or -1 for all")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate:g}; expected a number above 0")


def check_update(batch_size: int, grad_accumulation_steps: int) -> None:
    if (examples := batch_size * grad_accumulation_steps) > MOST_EXAMPLES:
        raise ValueError(
            f"an update has {shown(examples)} examples, batch_size times grad_accumulation_steps; "
            f"expected at most {MOST_EXAMPLES}"
        )


def check_paths(data: str, adapter_path: Path, beginning: Path | None) -> None:
    there = next(own for own in (adapter_path, *adapter_path.absolute().parents) if own.exists() or own.is_symlink())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; expected a folder, for --adapter-path")
    is_data = adapter_path.resolve() == expanded(data).resolve()
    if is_data or (adapter_path / "config.json").exists():
        held = "the examples" if is_data else "a model"
        raise ValueError(f"{adapter_path} holds {held}; expected a new folder, for --adapter-path")
    if beginning is not None and not beginning.is_file():
        raise ValueError(f"{beginning} is no file; expected an adapter's weights, for --resume-adapter-file")


# --- what there is to learn --------------------------------------------------------------------


def read_examples(data: str, test: bool, mask_prompt: bool) -> dict[str, list[Example]]:
    """Those splits that there are; the test's is always looked through, and given where it is asked for."""
    found = {split: own for split in ("train", "valid", "test") if (own := read_split(data, split)) is not None}
    if "train" not in found:
        raise ValueError(f"{data} has no train.jsonl; expected one, with an example in each line")
    if test and "test" not in found:
        raise ValueError(f"{data} has no test.jsonl; expected one, for --test")
    if mask_prompt and any(example.text is not None for example in found["train"]):
        raise ValueError("a text has no prompt that could be masked; expected prompt and completion, or messages")
    return {split: own for split, own in found.items() if test or split != "test"}


def open_to_train(model: str, dtype: str | None, with_drafter: bool) -> tuple[Checkpoint, Processor]:
    """Looked through, nothing loaded. In float16 small gradients would be lost."""
    folder, asked = find_folder(model), computing_type(dtype)
    if asked is not None and asked == mx.float16:
        raise ValueError("dtype is float16, in which small gradients are lost; expected bfloat16 or float32")
    choice = find_drafter(model, folder, "auto" if with_drafter else None)
    if with_drafter and choice is None:
        raise ValueError(f"{model} has no drafter; expected one in its subfolder drafter/, for --train-drafter")
    checkpoint = open_checkpoint(folder, choice, asked)
    if checkpoint.config.dtype == mx.float16:
        checkpoint = open_checkpoint(folder, choice, mx.bfloat16)
    return checkpoint, load_processor(folder, checkpoint.config)


def read_sets(
    processor: Processor, found: Mapping[str, list[Example]], max_seq_length: int, drop_long: bool,
    image_budget: int | None,
) -> dict[str, Data]:  # fmt: skip
    """Each split as tokens."""
    sets: dict[str, Data] = {}
    for split, examples in found.items():
        with Bar(f"Looking through {split}") as bar:
            sets[split] = read_data(processor, examples, max_seq_length, drop_long, image_budget, bar.show)
    return sets


def tell_dropped(sets: Mapping[str, Data], max_seq_length: int) -> None:
    for split, data in sets.items():
        if data.dropped:
            count = data.dropped + len(data.passages)
            told = "%d of %d examples of %s are longer than %d tokens, left out"
            logger.warning(told, data.dropped, count, split, max_seq_length)


# --- training ----------------------------------------------------------------------------------


def load_to_train(
    checkpoint: Checkpoint, settings: Settings, media: Collection[str], beginning: Path | None
) -> Model:  # fmt: skip
    """The model with the adapter's layers, which hold the weights of the file `beginning`, if there is one."""
    # here: mlx-lm takes two seconds, and what is wrong with the request has been said without
    from mlx_gemma4.tune.adapt import attach, begin_with

    with SizeBar("Loading") as bar:
        bar.count(read_values(checkpoint), checkpoint.nbytes)
    attach(checkpoint.model, settings.adapter, media, settings.seed)
    if beginning is not None:
        begin_with(checkpoint.model, beginning, settings.adapter.scale)
    return checkpoint.model


def train(training: Run, needs: str) -> None:
    """Go to the end; the best weights are then in the folder. needs: what there is to say of the memory it takes."""
    folder = training.folder
    folder.mkdir(parents=True, exist_ok=True)
    if training.valid is None:
        logger.info("there is no valid.jsonl: the last weights are kept, not the best")
    logger.info("%s", needs)
    is_first = training.processes.rank == 0
    with Bar("Training") as bar:
        for news in training.go():
            if is_first:
                tell(bar, news, training.settings.iters)
    if is_first:
        draw(folder, training.progress.curve)
        print(summary(training))


def take_kept(training: Run) -> None:
    """The weights in the folder, which are the best: training may have gone on from there."""
    from mlx_gemma4.tune.adapt import begin_with

    training.processes.sum([mx.zeros(1)])  # until the first has written what all read
    begin_with(training.model, training.folder / WEIGHTS, training.settings.adapter.scale)


def teach_drafter(training: Run, checkpoint: Checkpoint) -> None:
    from mlx_gemma4.tune import drafter as room

    model, choice, folder = checkpoint.model, checkpoint.drafter, training.folder / "drafter"
    drafter = model.drafter
    assert drafter is not None and choice is not None  # open_to_train has looked
    measured, processes = training.valid or training.train, training.processes
    examples = processes.share(range(len(measured.data.passages))[:MEASURED])
    before = room.acceptance(model, drafter, measured.of(examples), processes)
    quantized = room.unfreeze_matrices(drafter)
    optimizer = room.optimizer_for(len(training.schedule))
    room.train_drafter(model, drafter, optimizer, training.schedule, training.train.of, processes)
    after = room.acceptance(model, drafter, measured.of(examples), processes)
    if processes.rank:
        return
    room.write_drafter(folder, choice.folder, drafter, quantized)
    print(f"{folder}: {100 * before:.1f} % of first drafts accepted before, {100 * after:.1f} % after")


# --- what is said of it ------------------------------------------------------------------------


def tell(bar: Bar, news: News, iters: int) -> None:
    bar.show(news.iteration, iters)
    text = f"loss {news.train_loss:.3f}, {news.tokens_per_second:.0f} tokens/s, {size_text(news.peak_memory)}"
    if bar.shown is not None:
        bar.shown.update(bar.shown.task_ids[0], description=text)
    if news.valid_loss is not None:
        print(f"{news.iteration} of {iters}: {text}, validation {news.valid_loss:.4f}", file=sys.stderr)


def summary(training: Run) -> str:
    folder, progress = training.folder, training.progress
    if training.valid is None:
        return f"{folder}: after {training.iteration} batches, loss {progress.curve[-1]['train_loss']:.4f}"
    return (
        f"{folder}: validation loss {progress.first:.4f} before, {progress.best:.4f} after {progress.best_at} of "
        f"{training.iteration} batches, which is kept"
    )


def draw(folder: Path, curve: list[dict[str, float | None]]) -> None:
    """A picture of the losses, where matplotlib is (extra `benchmark`)."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("train_loss", "training"), ("valid_loss", "validation")):
        points = [(line["iteration"], line[key]) for line in curve if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="batches", ylabel="nats a learnt token")
    axes.legend()
    figure.savefig(folder / "loss.svg")


def main() -> int:
    return run(tune)
