"""Train the demo's drafter from nothing on what its target says: `python -m training.draft FOLDER`.

As the package's `tune --train-drafter` does it, on the demo's own items.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx.optimizers as optim
import typer

from mlx_gemma4.config import read_config
from mlx_gemma4.model.drafter import Drafter, read_drafter_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.tune.drafter import acceptance, train_drafter
from mlx_gemma4.tune.rows import Row
from mlx_gemma4.tune.state import save, trees_of
from mlx_gemma4.tune.step import Processes
from mlx_gemma4.weights.load import parameters
from training.rows import answers_alone, rows
from training.start import initialise_drafter
from training.train import LONG_ROW, LOOKING, ROW, Source, make_source

ROWS = {"text": 6, "image": 1, "audio": 1}
MEASURED = 20  # steps that the acceptance is measured on


def rows_of(source: Source, numbers: Sequence[int]) -> Iterator[Row]:
    for _ in numbers:
        members = [one for kind, count in ROWS.items() for _ in range(count) for one in source.row(kind, ROW, LOOKING)]
        yield from map(answers_alone, rows(source.processor, members, LONG_ROW))


def main(
    folder: Annotated[Path, typer.Argument(help="Of the target's run.")],
    steps: Annotated[int, typer.Option(help="How many, each of about four rows.")] = 1200,
    target_state: Annotated[str, typer.Option(help="The target's file.")] = "state",
) -> None:
    processes = Processes(mx.distributed.init())
    model, drafter = Model(read_config(folder)), Drafter(read_drafter_config(folder / "drafter"))
    model.update(trees_of(folder / f"{target_state}.safetensors")[0]["model"])
    model.freeze()
    initialise_drafter(drafter, 0)
    source = make_source(folder, "draft")
    optimizer = optim.Adam(2e-3, bias_correction=True)
    train_drafter(model, drafter, optimizer, [[n] for n in range(steps)], partial(rows_of, source), processes)
    accepted = acceptance(model, drafter, rows_of(source, range(MEASURED)), processes)
    print(f"{100 * accepted:.1f} % of first drafts accepted")
    save(folder / "drafter-state.safetensors", {"drafter": parameters(drafter)}, {"step": str(steps)})


if __name__ == "__main__":
    typer.run(main)
