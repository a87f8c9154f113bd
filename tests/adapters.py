"""Adapters of look-alikes, made at random, and what they add by hand."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from golden_cases import layout
from toy_checkpoint import Shape, tensors

from mlx_gemma4 import Prompt, load
from mlx_gemma4.convert.job import make_job, open_target, write_model
from mlx_gemma4.convert.recipes import Recipe
from mlx_gemma4.prompt.prompt import SoftTokens

# Groups of 64 divide every matrix; full layers' heads have blocks of 8 that move, which cut groups.
EVEN = Shape(hidden=128, mlp=192, heads=4, kv_heads=2, head_dim=32, global_head_dim=64)
ALL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
       "mlp.up_proj", "mlp.down_proj")  # fmt: skip
MEDIA = ("embed_vision.embedding_projection", "embed_audio.embedding_projection")
LAYERS = 6
Weights = dict[str, np.ndarray]


def matrices(shape: Shape) -> Weights:
    """By path, as the checkpoint has them."""
    return {
        name.removeprefix("model.").removesuffix(".weight"): value
        for name, value in tensors(shape, 0).items()
        if name.endswith("proj.weight") or name.endswith("projection.weight")
    }


def random_adapter(
    shape: Shape,
    chosen: tuple[str, ...] = ALL + MEDIA,
    layers: int = LAYERS,
    rank: int = 3,
    dora: bool = False,
    lengths: float = 2.0,
    seed: int = 7,
) -> dict[str, mx.array]:
    """mlx-lm's parts by path, of the last `layers`; what they add is about as large as the matrices."""
    rng, found = np.random.default_rng(seed), {}
    for path, value in matrices(shape).items():
        part = path.split(".", 3)
        if (part[-1] if "layers" in path else path) not in chosen:
            continue
        if "layers" in path and int(part[2]) < LAYERS - layers:
            continue
        rows, columns = value.shape
        found[f"{path}.lora_a"] = rng.standard_normal((columns, rank)) * columns**-0.5
        found[f"{path}.lora_b"] = rng.standard_normal((rank, rows)) * 0.3
        if dora:
            found[f"{path}.m"] = np.linalg.norm(value, axis=1) * rng.uniform(1 / lengths, lengths, rows)
    return {name: mx.array(value.astype(np.float32)) for name, value in found.items()}


def added_by_hand(base: Weights, adapter: Mapping[str, mx.array], scale: float) -> Weights:
    """W + scale (A B)ᵀ, for DoRA with rows of the lengths m, in float64."""
    found = {}
    for path, value in base.items():
        whole = value.astype(np.float64)
        if f"{path}.lora_a" in adapter:
            a, b = (np.array(adapter[f"{path}.{part}"], np.float64) for part in ("lora_a", "lora_b"))
            whole = whole + scale * (a @ b).T
        if f"{path}.m" in adapter:
            length = np.array(adapter[f"{path}.m"], np.float64) / np.linalg.norm(whole, axis=1)
            whole = whole * length[:, None]
        found[path] = whole
    return found


def with_matrices(folder: Path, source: Path, values: Weights) -> Path:
    """A copy of a float32 checkpoint with other matrices."""
    shutil.copytree(source, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    for path, value in values.items():
        weights[f"model.{path}.weight"] = mx.array(value.astype(np.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def prompts() -> list[Prompt]:
    """Text past the window, and all media."""
    found = []
    for name in ("text_of_four_windows", "sound_then_image_then_frames"):
        ids, media = layout(name, EVEN)
        found.append(Prompt(ids, tuple(SoftTokens(run.kind, run.start, run.values, run.positions) for run in media)))
    return found


def logits(*arguments: Any, **options: Any) -> list[np.ndarray]:
    model, _ = load(*arguments, **options)
    return [np.array(model.logits(prompt))[0] for prompt in prompts()]


def distance(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference of logits, of their spread."""
    return max(
        float(np.abs(one - other).max() / np.abs(other).std()) for one, other in zip(found, expected, strict=True)
    )


def converted(folder: Path, source: Path, recipe: Recipe) -> Path:
    """A conversion, with the values in which its matrices are computed."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(source / "drafter", folder / "drafter", dirs_exist_ok=True)
    for _ in write_model(make_job(open_target(source), recipe, None), folder):
        pass
    return folder
