"""Models with the names and the order of their checkpoints: loaded, and not yet arranged for the passes."""

from pathlib import Path

import mlx.core as mx

from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.computing import load_value
from mlx_gemma4.weights.load import find_drafter, open_checkpoint, parameters


def stored_model(folder: Path, drafter: str | Path | None = "auto", dtype: mx.Dtype | None = None) -> Model:
    """What `load` gives before its last step; it can be quantized, compared and saved, and runs once `arrange`d."""
    checkpoint = open_checkpoint(folder, find_drafter(folder, folder, drafter), dtype)
    values = [(path, load_value(checkpoint.tensors[path], checkpoint.config)) for path in parameters(checkpoint.model)]
    checkpoint.model.load_weights(values)
    return checkpoint.model
