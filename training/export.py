"""A finished run → the checkpoint in the package: `python -m training.export FOLDER`, then the package's converter."""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import mlx.core as mx
import typer

from mlx_gemma4.convert.card import CARD
from mlx_gemma4.tune.state import flat, trees_of
from mlx_gemma4.weights.load import DEMO
from training.card import model_card
from training.checkpoint import write_files


def write_checkpoint(run: Path, folder: Path, state: str) -> None:
    """The run's weights in full precision, under the published names, with all files beside them."""
    write_files(folder)
    for root, name, part in ((folder, state, "model"), (folder / "drafter", "drafter-state", "drafter")):
        tree = trees_of(run / f"{name}.safetensors")[0][part]
        arrays = {published(key): value for key, value in flat(tree)}
        mx.save_safetensors(str(root / "model.safetensors"), arrays, {"format": "pt"})


def published(name: str) -> str:
    """The name in a published checkpoint: all but the drafter's two projections are in `model.`."""
    return name if name.startswith(("pre_projection.", "post_projection.")) else f"model.{name}"


def main(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    to: Annotated[Path, typer.Option(help="The new checkpoint; replaced if it is there.")] = DEMO,
    state: Annotated[str, typer.Option(help="The run's file.")] = "state",
) -> None:
    if to.exists() and not (to / "config.json").exists():
        raise ValueError(f"{to} is no checkpoint to replace; expected one, or a new folder")
    with TemporaryDirectory() as scratch:
        full = Path(scratch) / "full"
        write_checkpoint(run, full, state)
        new = Path(scratch) / "new"
        convert = [sys.executable, "-m", "mlx_gemma4.convert", "--hf-path", str(full), "--mlx-path", str(new)]
        subprocess.run(convert, check=True)
        (new / CARD).write_text(model_card(), encoding="utf-8")
        if to.exists():
            shutil.rmtree(to)
        shutil.move(new, to)


if __name__ == "__main__":
    typer.run(main)
