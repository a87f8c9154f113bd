"""A run: examples in an order that the seed decides, validation, what is kept of it, and going on where it stopped."""

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_gemma4.errors import TooLongError
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.messages import Part
from mlx_gemma4.prompt.processor import Loaded, Processor, optional_json
from mlx_gemma4.tune.data import Example
from mlx_gemma4.tune.network import learnt_states
from mlx_gemma4.tune.rows import Passage, Row, branches, capacity, packed, passages, row
from mlx_gemma4.tune.settings import Settings
from mlx_gemma4.tune.state import flat, merge, save, trees_of
from mlx_gemma4.tune.step import Processes, Seen, measure, rate_at, slopes, update
from mlx_gemma4.weights.adapter import CONFIG, WEIGHTS, write_adapter
from mlx_gemma4.weights.writing import write_text

STATE, CURVE = "state.safetensors", "loss.csv"
LOOKED = 20_000  # examples: half a second
COLUMNS = (
    "iteration", "train_loss", "valid_loss", "learning_rate", "learnt_tokens", "tokens_per_second", "peak_memory",
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """One file's examples as passages, media not kept."""

    passages: list[list[Passage]]  # of each example
    dropped: int  # too long

    @property
    def media(self) -> set[str]:
        """Which projections its media go through."""
        kinds = {run.kind for own in self.passages for one in own for run in one.runs}
        return {"audio" if kind == "audio" else "image" for kind in kinds}

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for own in self.passages:
            for one in own:
                found.update(one.ids.tobytes() + one.places.tobytes() + one.targets.tobytes() + b"|")
        return found.hexdigest()


def read_data(
    processor: Processor,
    examples: Sequence[Example],
    max_seq_length: int,
    drop_long: bool,
    image_budget: int | None,
    show: Callable[[int, int], None],
) -> Data:
    """ValueError with file and line for the first example that cannot be learnt."""
    found: list[list[Passage]] = []
    dropped = 0
    for number, example in enumerate(examples, 1):
        try:
            own, media = branches(processor, example, image_budget)
        except TooLongError:
            if not drop_long:
                raise
            dropped += 1
        else:
            if drop_long and max(len(branch.ids) for branch in own) > max_seq_length:
                dropped += 1
            else:
                found.append(passages(example.where, own, media, max_seq_length))
        show(number, len(examples))
    if not found:
        raise ValueError(f"all {dropped} examples are longer than {max_seq_length}; expected a larger --max-seq-length")
    return Data(found, dropped)


class Rows:
    """Examples as rows, their media read when they are wanted."""

    def __init__(self, processor: Processor, settings: Settings, data: Data):
        self.processor, self.data = processor, data
        self.budget = processor.image_budget(settings.image_budget)
        self.window = processor.config.text.sliding_window
        lengths = [len(one) for own in data.passages for one in own]
        self.room = capacity(lengths, settings.max_seq_length)

    def groups(self, examples: Sequence[int]) -> list[list[Passage]]:
        members = [one for index in examples for one in self.data.passages[index]]
        return [[members[index] for index in own] for own in packed([len(one) for one in members], self.room)]

    def of(self, examples: Sequence[int]) -> Iterator[Row]:
        for members in self.groups(examples):
            yield row(members, self.window, self.read)

    def longest(self, examples: Sequence[int]) -> int:
        return max(sum(map(len, members)) for members in self.groups(examples))

    def read(self, part: Part) -> list[Loaded]:
        return self.processor.read(part, self.budget)


class Schedule:
    """The examples of each update of all processes: every one once, in a new order, before any comes again.

    The update with the longest row comes first, so that memory does not grow later.
    """

    def __init__(self, rows: Rows, settings: Settings, size: int):
        self.seed, self.count = settings.seed, len(rows.data.passages)
        each = settings.batch_size * size
        self.needed, self.step = settings.iters * each, each * settings.grad_accumulation_steps
        self.first = self.longest(rows)

    def __len__(self) -> int:
        return -(-self.needed // self.step)

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> list[int]:
        number = {0: self.first, self.first: 0}.get(number, number)
        found: list[int] = self.order(number * self.step, (number + 1) * self.step).tolist()
        return found

    def order(self, first: int, end: int) -> np.ndarray:
        """The examples at these places of all, [n]."""
        end = min(end, self.needed)
        rounds = range(first // self.count, -(-end // self.count))
        order = np.concatenate([np.random.default_rng([self.seed, n]).permutation(self.count) for n in rounds])
        start = rounds.start * self.count
        return order[first - start : end - start]

    def longest(self, rows: Rows) -> int:
        """The update with the longest row: that of the longest example if it has a row of its own, for then none is
        longer; of short ones, which share rows, the longest of as many as are soon looked at."""
        order = self.order(0, max(self.count, LOOKED) + self.step)
        lengths = np.array([max(map(len, own)) for own in rows.data.passages])
        updates = {int(lengths[order].argmax()) // self.step, *range(-(-min(LOOKED, len(order)) // self.step))}
        return max(sorted(updates), key=lambda n: rows.longest(order[n * self.step : (n + 1) * self.step].tolist()))


@dataclass
class Progress:
    """Where a run is; with the weights and the optimizer all that going on needs."""

    updates: int = 0
    best: float = math.inf
    best_at: int = 0  # iteration
    waited: int = 0  # validations since then
    first: float | None = None  # validation loss before the first step
    curve: list[dict[str, float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class News:
    """How far a run has come, for whoever watches it."""

    iteration: int
    train_loss: float
    valid_loss: float | None
    tokens_per_second: float
    peak_memory: int


class Run:
    """Training of a model to which an adapter is attached, in a folder; goes on where the last one stopped.

    ValueError if the folder holds a run of other settings or data, or an adapter without one.
    """

    def __init__(
        self, folder: Path, model: Model, settings: Settings, train: Rows, valid: Rows | None, name: str,
        processes: Processes,
    ):  # fmt: skip
        self.folder, self.model, self.settings = folder, model, settings
        self.train, self.valid, self.name, self.processes = train, valid, name, processes
        self.optimizer = optim.Adam(settings.learning_rate, bias_correction=True)
        self.optimizer.init(model.trainable_parameters())
        self.progress = Progress()
        self.schedule = Schedule(train, settings, processes.size)
        data = [rows.data.digest for rows in (train, valid) if rows is not None]
        self.about = json.loads(
            json.dumps(asdict(settings) | {"processes": processes.size, "model": name, "data": data})
        )
        if (folder / STATE).exists():
            self.resume()
        elif (folder / WEIGHTS).exists() and not self.has_begun():
            raise ValueError(f"{folder} holds the adapter of another run; expected a new folder, for --adapter-path")
        self.check_alike()

    def check_alike(self) -> None:
        """ValueError unless all processes are at the same place of the same run: sums of others would mean nothing."""
        if not self.processes.are_alike(json.dumps([self.about, self.progress.updates])):
            raise ValueError(
                "the processes are not at the same place of the same run; expected the same data, and an "
                "--adapter-path that all see"
            )

    def has_begun(self) -> bool:
        """Whether the adapter in the folder is of this run, which ended before its first state."""
        noted = optional_json(self.folder / CONFIG)
        return all(noted.get(key) == value for key, value in self.about.items())

    def resume(self) -> None:
        trees, about = trees_of(self.folder / STATE)
        if "settings" not in about:
            raise ValueError(f"{self.folder / STATE} is no run's state; expected a new folder, for --adapter-path")
        before = json.loads(about["settings"])
        for key, value in self.about.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{self.folder} holds a run with another {key}; expected the same, or another --adapter-path"
                )
        self.model.update(trees["model"])
        self.optimizer.state = merge(self.optimizer.state, trees["optimizer"])
        self.progress = Progress(**json.loads(about["progress"]))

    def go(self) -> Iterator[News]:
        """Train to the end; gives news after each update. The best weights are then in the folder."""
        progress, settings = self.progress, self.settings
        if progress.updates == 0 and self.valid is not None and progress.first is None:
            progress.first = self.validate(0)
        while progress.updates < len(self.schedule) and not self.is_tired:
            examples = self.processes.share(self.schedule[progress.updates])
            rate = rate_at(progress.updates, len(self.schedule), settings.learning_rate, settings.warmup)
            began = time.perf_counter()
            self.optimizer.learning_rate = rate
            seen = update(self.model, self.optimizer, self.train.of(examples), self.slopes, self.processes)
            speed = seen.tokens / (time.perf_counter() - began)
            before = self.iteration
            progress.updates += 1
            is_last = progress.updates == len(self.schedule)
            is_valid = self.valid is not None and (is_last or self.passes(before, settings.steps_per_eval))
            loss = self.validate(self.iteration) if is_valid else None
            self.record(seen, loss, rate, speed)
            if is_valid or is_last or self.passes(before, settings.save_every):
                self.keep()
            yield News(self.iteration, seen.loss, loss, speed, mx.get_peak_memory())

    def slopes(self, row: Row) -> tuple[mx.array, Any]:
        return slopes(self.model, row, partial(learnt_states, self.model, checkpoint=self.settings.grad_checkpoint))

    @property
    def iteration(self) -> int:
        return min(self.settings.iters, self.progress.updates * self.settings.grad_accumulation_steps)

    @property
    def is_tired(self) -> bool:
        return 0 < self.settings.patience <= self.progress.waited

    def passes(self, before: int, every: int) -> bool:
        return self.iteration // every > before // every

    def validate(self, iteration: int) -> float:
        """The loss of the validation examples; weights that are better than any before go into the folder."""
        assert self.valid is not None
        count, progress = len(self.valid.data.passages), self.progress
        if self.settings.val_batches >= 0:
            count = min(count, self.settings.val_batches * self.settings.batch_size * self.processes.size)
        loss = self.loss_of(self.valid, count)
        if loss < progress.best:
            progress.best, progress.best_at, progress.waited = loss, iteration, 0
            self.keep_adapter()
        else:
            progress.waited += 1
        if iteration == 0:
            progress.curve.append({"iteration": 0, "valid_loss": loss})
        return loss

    def loss_of(self, rows: Rows, count: int | None = None) -> float:
        """Of the first `count` examples, or all; each process takes its share of them."""
        examples = self.processes.share(range(len(rows.data.passages))[:count])
        return measure(self.model, rows.of(examples), self.processes).loss

    def record(self, seen: Seen, valid_loss: float | None, rate: float, speed: float) -> None:
        values = (
            self.iteration, seen.loss, valid_loss, rate, int(seen.learnt), round(speed, 1), float(mx.get_peak_memory()),
        )  # fmt: skip
        self.progress.curve.append(dict(zip(COLUMNS, values, strict=True)))

    def keep(self) -> None:
        """The whole state, and the adapter where no validation chooses one."""
        if self.processes.rank:
            return
        if self.valid is None:
            self.keep_adapter()
        written = io.StringIO()
        writer = csv.DictWriter(written, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.progress.curve)
        write_text(self.folder / CURVE, written.getvalue())
        trees = {"model": self.model.trainable_parameters(), "optimizer": self.optimizer.state}
        about = {"settings": json.dumps(self.about), "progress": json.dumps(asdict(self.progress))}
        save(self.folder / STATE, trees, about)

    def keep_adapter(self) -> None:
        if self.processes.rank == 0:
            own, weights = self.settings.adapter, dict(flat(self.model.trainable_parameters()))
            write_adapter(self.folder, weights, own.fine_tune_type, own.rank, own.scale, own.num_layers, self.about)
