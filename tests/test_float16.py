"""float16 whatever the weights are: as close as bfloat16, and finite where its range is passed."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import WIDE, write_planted
from golden_cases import CHECKPOINTS, LAYOUTS, layout
from mlx import nn
from mlx.utils import tree_map
from rounds import GREEDY, Rounds, make_sampler
from toy_checkpoint import OTHER, TINY, Shape, tensors, write_checkpoint, write_drafter

from mlx_gemma4 import Prompt, weights
from mlx_gemma4.arrange import arrange
from mlx_gemma4.float16 import float16_is_safe
from mlx_gemma4.model import Model
from mlx_gemma4.prompt import SoftTokens
from mlx_gemma4.weights import find_drafter, load_values, open_checkpoint

Edit = Callable[[Model], None]
TYPES = (mx.float32, mx.bfloat16, mx.float16)


def loaded(folder: Path, edit: Edit | None = None) -> Model:
    """As `load` makes it, before it is arranged."""
    checkpoint = open_checkpoint(folder, find_drafter(folder, folder, "auto"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "arrange", lambda _: None)
        for _ in load_values(checkpoint):
            pass
    if edit is not None:
        edit(checkpoint.model)
    return checkpoint.model


def in_type(folder: Path, dtype: mx.Dtype, edit: Edit | None = None) -> Model:
    """All that floats in one type, cast tensor by tensor, as a checkpoint in bfloat16 has it: so none is nearer to it."""
    model = loaded(folder, edit)

    def cast(x: mx.array) -> mx.array:
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        x = x.astype(mx.bfloat16).astype(mx.float32)
        # as the loader has it, norms that float16 has no room for stay as they are
        return x if dtype == mx.float16 and x.ndim == 1 and mx.abs(x).max().item() > 65504 else x.astype(dtype)

    model.update(tree_map(cast, model.parameters()))
    arrange(model)
    return model


def prompts(shape: Shape) -> dict[str, Prompt]:
    found = {}
    for name in LAYOUTS:
        ids, media = layout(name, shape)
        found[name] = Prompt(ids, tuple(SoftTokens(run.kind, run.start, run.values, run.positions) for run in media))
    return found


def errors(folder: Path, shape: Shape, names: list[str], edit: Edit | None = None) -> dict[str, list[float]]:
    """By prompt, how far the logits of bfloat16 and float16 are from those of float32, of these logits' spread."""
    found: dict[str, list[np.ndarray]] = {}
    for dtype in TYPES:
        model = in_type(folder, dtype, edit)
        for name in names:
            found.setdefault(name, []).append(np.array(model.logits(prompts(shape)[name]))[0])
    return {
        name: [float(np.sqrt(np.mean((other - exact) ** 2) / np.mean(exact**2))) for other in others]
        for name, (exact, *others) in found.items()
    }
