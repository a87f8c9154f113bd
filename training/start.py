"""The weights that training starts from: random, with what small models take longest to find already in their form.

Pixels and samples start from smooth waves. Attention starts as trained models' is found to be (Trockman and Kolter,
"Mimetic Initialization of Self-Attention Layers", 2023): queries lean to keys like themselves, outputs to the values
they were made of; half of the heads of the first layers look one and two tokens back.
"""

import math
from typing import cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_gemma4.model.attention import SelfAttention
from mlx_gemma4.model.drafter import Drafter
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.load import parameters
from training.material import RATE

LOOKING_BACK = 2  # first layers with heads that look back
SHARP = 4  # frequencies of RoPE by which they do
LIKE_KEYS, LIKE_VALUES = 0.5, 0.7  # correlations


def initialise(model: Model, seed: int) -> None:
    """Random weights of the forms above."""
    rng = np.random.default_rng(seed)
    weights: list[tuple[str, mx.array]] = []
    layers = len(model.language_model.layers)
    for name, value in parameters(model).items():
        if name.endswith("layernorm.weight") and "post_" in name:
            new: np.ndarray = np.full(value.shape, 1 / math.sqrt(2 * layers))
        elif name == "language_model.norm.weight":
            new = np.full(value.shape, 0.25)  # or each token would expect itself, for it is its own head
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            new = np.full(value.shape, value.shape[0] ** -0.25)  # scores of variance 1, or it would look at one token
        elif "norm.weight" in name or name.endswith("layer_scalar") or name.endswith(("ln1.weight", "ln2.weight")):
            new = np.ones(value.shape)
        elif name.endswith(".bias"):
            new = np.zeros(value.shape)
        elif name.endswith("embed_tokens.weight"):
            new = randoms(rng, value.shape)
        elif name.endswith("pos_embedding"):
            new = places(value.shape[0], value.shape[-1], rng)
        elif name.endswith("patch_dense.weight"):
            new = waves_of_pixels(value.shape[0], math.isqrt(value.shape[1] // 3), rng)
        elif name.endswith("embed_vision.embedding_projection.weight"):
            new = np.eye(value.shape[0], value.shape[1])
        elif name.endswith("embed_audio.embedding_projection.weight"):
            new = waves_of_samples(value.shape[0], value.shape[1])
        else:
            new = randoms(rng, value.shape)
        weights.append((name, mx.array(new.astype(np.float32))))
    model.update(tree_unflatten(weights))
    first = model.language_model.layers[0].mlp  # gate = ± up = one channel each: gelu(x) · x is a loudness
    width = first.up_proj.weight.shape[1]
    rows = np.array(first.up_proj.weight)
    rows[:width], rows[width : 2 * width] = np.eye(width), -np.eye(width)
    first.up_proj.weight = mx.array(rows)
    gate = np.array(first.gate_proj.weight)
    gate[: 2 * width] = rows[: 2 * width]
    first.gate_proj.weight = mx.array(gate)
    down = np.array(first.down_proj.weight)
    pairs = np.repeat(np.eye(width // 2), 2, axis=1)  # a cosine and its sine, whose squares make an energy
    down[: width // 2, : 2 * width] = np.tile(pairs, 2)
    first.down_proj.weight = mx.array(down)
    common = rng.choice([-1.0, 1.0], width) * width**-0.5  # in each token's embedding; alike in all, no logit sees it
    embedding = model.language_model.embed_tokens
    embedding.weight = embedding.weight + mx.array(common.astype(np.float32))
    for number, layer in enumerate(model.language_model.layers):
        start_attention(cast(SelfAttention, layer.self_attn), common if number < LOOKING_BACK else None)


def start_attention(attention: SelfAttention, common: np.ndarray | None) -> None:
    """Queries like keys, outputs like values; with `common`, the first group's heads look 1, 2, … tokens back."""
    dims, groups, width = (
        attention.head_dim,
        attention.k_proj.weight.shape[0] // attention.head_dim,
        attention.q_proj.weight.shape[1],
    )
    per = attention.q_proj.weight.shape[0] // attention.head_dim // groups
    q = np.array(attention.q_proj.weight).reshape(groups, per, dims, width)
    k = np.array(attention.k_proj.weight).reshape(groups, 1, dims, width)
    v = k if attention.is_full else np.array(attention.v_proj.weight).reshape(groups, 1, dims, width)
    out = np.array(attention.o_proj.weight).reshape(width, groups, per, dims)
    q = LIKE_KEYS * k + math.sqrt(1 - LIKE_KEYS**2) * q
    copied = np.moveaxis(v, -1, 0) * math.sqrt(width / (attention.q_proj.weight.shape[0] // attention.head_dim * dims))
    signs = np.where(np.arange(per) % 2, -1, 1)[:, None]  # every other head takes away what it sees
    out = LIKE_VALUES * signs * copied + math.sqrt(1 - LIKE_VALUES**2) * out
    if common is not None:
        angles = 1 / np.array(attention.rope.periods[:SHARP])  # the fastest turns tell near tokens apart
        steps = np.arange(1, per + 1)[:, None] * angles
        kept, size = 0.3, math.sqrt(2 * dims / SHARP)
        k[0], q[0] = kept * k[0], kept * q[0]
        k[0, 0, :SHARP] += size * common
        q[0, :, :SHARP] += size * np.cos(steps)[..., None] * common
        q[0, :, dims // 2 : dims // 2 + SHARP] -= size * np.sin(steps)[..., None] * common
    for module, rows in ((attention.q_proj, q), (attention.k_proj, k)):
        module.weight = mx.array(rows.reshape(-1, width).astype(np.float32))
    attention.o_proj.weight = mx.array(out.reshape(width, -1).astype(np.float32))


def randoms(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape) * shape[-1] ** -0.5


def places(count: int, dims: int, rng: np.random.Generator) -> np.ndarray:
    """Columns and rows as waves of several lengths, [count, 2, dims], in random directions."""
    at = np.arange(count)[:, None]
    lengths = np.geomspace(2.5, 40, 16)
    waves = np.concatenate([np.sin(2 * np.pi * at / lengths), np.cos(2 * np.pi * at / lengths)], axis=1)
    return np.stack([waves @ rng.standard_normal((32, dims)) / math.sqrt(32) for _ in range(2)], axis=1)


def waves_of_pixels(count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """[count, side * side * 3]: the lowest two-dimensional cosines of brightness and of two colour differences."""
    colours = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]]) / np.array([[3**0.5], [2**0.5], [1.5**0.5]])
    basis = np.cos(np.pi * (np.arange(side) + 0.5) * np.arange(side)[:, None] / side)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    per = -(-count // 3)
    order = sorted((i + j, i, j) for i in range(side) for j in range(side))
    kept = [(1 if c else 0, s, i, j, c) for c in range(3) for s, i, j in order]
    brightness = [k for k in kept if k[4] == 0][: count - 2 * (per // 2)]
    rest = [k for c in (1, 2) for k in [x for x in kept if x[4] == c][: per // 2]]
    waves = [np.einsum("y,x,c->yxc", basis[i], basis[j], colours[c]).ravel() for _, _, i, j, c in brightness + rest]
    return np.stack(waves[:count])


def waves_of_samples(count: int, length: int) -> np.ndarray:
    """[count, length]: windowed cosines and sines of mel-spaced pitches from 60 Hz to 7.6 kHz."""
    mels = np.linspace(2595 * math.log10(1 + 60 / 700), 2595 * math.log10(1 + 7600 / 700), count // 2)
    pitches = 700 * (10 ** (mels / 2595) - 1)
    t = (np.arange(length) - length / 2) / RATE
    window = np.hanning(length)
    waves = [f(2 * np.pi * p * t) * window for p in pitches for f in (np.cos, np.sin)]
    waves += [np.zeros(length)] * (count - len(waves))
    scale = 2.0 / math.sqrt(length)
    return np.stack(waves) * scale


def initialise_drafter(drafter: Drafter, seed: int) -> None:
    """Random weights of the same kind."""
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in parameters(drafter).items():
        new = np.ones(value.shape) if value.ndim == 1 else randoms(rng, value.shape)
        if name.endswith("q_norm.weight"):
            new *= value.shape[0] ** -0.25
        weights.append((name, mx.array(new.astype(np.float32))))
    drafter.update(tree_unflatten(weights))
