"""Arranged for the passes, a model computes what its checkpoint says: 640 numbers a token are as good as 1,024."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from conftest import joining
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten
from toy_checkpoint import TINY, Shape, config, write_checkpoint

from mlx_gemma4 import Prompt, load
from mlx_gemma4.config import FULL, GenerationConfig, TextConfig, parse_config
from mlx_gemma4.model.arrange import arrange, arrange_layer
from mlx_gemma4.model.attention import Projections, SelfAttention
from mlx_gemma4.model.cache import Caches, empty_cache
from mlx_gemma4.model.decoder import Layer
from mlx_gemma4.model.mask import causal_mask, whole_mask
from mlx_gemma4.model.model import Model
from mlx_gemma4.weights.load import open_checkpoint, parameters

EPS = 1e-6
HIDDEN, HEADS, KV_HEADS = 64, 4, 2


def text_of(head_dim: int, turned: int) -> TextConfig:
    text = parse_config(config(Shape(hidden=HIDDEN, heads=HEADS, mlp=32)), GenerationConfig(eos_token_ids=())).text
    own = replace(text.attention[FULL], head_dim=head_dim, num_key_value_heads=KV_HEADS, rotated_dims=turned)
    return replace(text, attention=text.attention | {FULL: own})


def made_layer(text: TextConfig, kind: str = FULL, seed: int = 0, heads: int = HEADS) -> Layer:
    """As loaded: random weights, norms around 1, but for that of queries, so that scores are some units wide."""
    layer = Layer(text, kind, SelfAttention(text, kind))
    rng = np.random.default_rng(seed)
    values = []
    for path, array in tree_flatten(layer.parameters()):
        wide = 0.3 * rng.standard_normal(array.shape) / (1 if "norm" in path else 0.3 * array.shape[-1] ** 0.5)
        wide = wide + ("norm" in path)
        if "q_norm" in path:
            wide *= 4 / text.attention[kind].head_dim ** 0.5
        values.append((path, mx.array(wide.astype(np.float32))))
    layer.load_weights(values)
    return layer


def plain(module: nn.Module) -> np.ndarray:
    """A matrix as numbers, [rows, columns] float64."""
    weight = module.weight
    if isinstance(module, nn.QuantizedLinear):
        weight = mx.dequantize(
            weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode, dtype=mx.float32
        )
    return np.array(weight.astype(mx.float32), np.float64)


def normed(x: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight


def turned_halves(x: np.ndarray, theta: float, turned: int) -> np.ndarray:
    """[heads, L, hd] from position 0 on: dims i and i + hd / 2 turn as a pair, those of the first `turned` / 2."""
    half, out = x.shape[-1] // 2, x.copy()
    for i in range(turned // 2):
        angle = np.arange(x.shape[1]) * theta ** (-2 * i / x.shape[-1])
        a, b = x[..., i], x[..., i + half]
        out[..., i], out[..., i + half] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


class TwoTensors:
    """Attention as the checkpoint has it, whole keys and values, in float64."""

    def __init__(self, own: SelfAttention, text: TextConfig):
        self.q, self.k, self.o = plain(own.q_proj), plain(own.k_proj), plain(own.o_proj)
        norms = own.q_norm.weight, own.k_norm.weight
        self.q_norm, self.k_norm = (np.array(weight.astype(mx.float32), np.float64) for weight in norms)
        self.shape = text.attention[FULL]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[L, hidden] -> [L, hidden], causal."""
        hd, theta, turned = self.shape.head_dim, self.shape.rope_theta, self.shape.rotated_dims
        q, k = (np.swapaxes((x @ part.T).reshape(len(x), -1, hd), 0, 1) for part in (self.q, self.k))  # [heads, L, hd]
        v = normed(k)
        q, k = (
            turned_halves(normed(q, self.q_norm), theta, turned),
            turned_halves(normed(k, self.k_norm), theta, turned),
        )
        group = len(q) // len(k)
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        scores = np.where(np.tri(len(x), dtype=bool), q @ k.swapaxes(1, 2), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = weights / weights.sum(axis=-1, keepdims=True) @ v
        return np.swapaxes(out, 0, 1).reshape(len(x), -1) @ self.o.T


def run(own: SelfAttention, text: TextConfig, x: mx.array, read: int) -> np.ndarray:
    """x [L, hidden]: `read` rows as a prompt, in two chunks, the rest as rounds of at most three. [L, hidden]."""
    caches = Caches([empty_cache(text.attention[FULL], x.dtype, len(x) + 3)], [FULL])
    cache, parts, start = caches.layers[0], [], 0
    while start < len(x):
        in_round = start >= read
        end = min(start + 3, len(x)) if in_round else max(read // 2, 1) if not start else read
        offset: Any = mx.array([start]) if in_round else start
        queries, keys = mx.arange(start, end)[None], cache.positions(offset, end - start)
        mask = whole_mask(queries, keys, None) if in_round else causal_mask(queries, keys)
        parts.append(own(x[None, start:end], offset, mask, cache)[0])
        start = end
    return np.array(mx.concatenate(parts).astype(mx.float32), np.float64)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# Heads whose moving blocks are odd, one, or the whole half; where all turns, and where a pair does.
HEADS_AND_TURNED = [(32, 8), (512, 128), (64, 64), (20, 10), (80, 20), (36, 6), (24, 2), (4, 2), (48, 36), (14, 6)]


@pytest.mark.parametrize(("head_dim", "turned"), HEADS_AND_TURNED)
def test_what_is_kept_gives_what_whole_keys_and_values_give(head_dim: int, turned: int) -> None:
    text = text_of(head_dim, turned)
    x = np.random.default_rng(1).standard_normal((23, HIDDEN)).astype(np.float32)
    for seed in range(3):
        layer = made_layer(text, seed=seed)
        expected = TwoTensors(cast(SelfAttention, layer.self_attn), text)(x.astype(np.float64))
        arrange_layer(layer)
        own = cast(SelfAttention, layer.self_attn)
        assert relative(run(own, text, mx.array(x), 14), expected) < 2e-6
        assert own._order is None  # no quantization group is cut


QUANTIZATIONS = [
    {"group_size": 32, "bits": 4, "mode": "affine"},
    {"group_size": 64, "bits": 4, "mode": "affine"},
    {"group_size": 128, "bits": 4, "mode": "affine"},
    {"group_size": 32, "bits": 3, "mode": "affine"},
    {"group_size": 64, "bits": 5, "mode": "affine"},
    {"group_size": 64, "bits": 6, "mode": "affine"},
    {"group_size": 64, "bits": 8, "mode": "affine"},
    {"group_size": 32, "bits": 2, "mode": "affine"},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda own: "{mode} {bits} {group_size}".format(**own))
@pytest.mark.parametrize(("head_dim", "turned"), [(512, 128), (256, 64), (128, 128), (64, 16)])
def test_quantized_matrices_stay_as_they_are_in_another_order(
    quantization: dict[str, Any], head_dim: int, turned: int
) -> None:
    """Where blocks that move cut quantization groups, attention's output is put in order instead."""
    text = text_of(head_dim, turned)
    layer = made_layer(text)
    for name in ("q_proj", "k_proj"):  # [.., 64]: no groups of 128
        own = {"group_size": 32, "bits": 4, "mode": "affine"} if quantization["group_size"] > 64 else quantization
        layer.self_attn[name] = layer.self_attn[name].to_quantized(**own)
    layer.self_attn.o_proj = layer.self_attn.o_proj.to_quantized(**quantization)
    before = layer.self_attn.o_proj.weight
    x = np.random.default_rng(1).standard_normal((12, HIDDEN)).astype(np.float32)
    expected = TwoTensors(cast(SelfAttention, layer.self_attn), text)(x.astype(np.float64))
    arrange_layer(layer)
    own_attention = cast(SelfAttention, layer.self_attn)
    assert relative(run(own_attention, text, mx.array(x), 7), expected) < 3e-6
    is_cut = bool(min(turned // 2, head_dim // 2) % quantization["group_size"])
    assert (own_attention._order is not None) == is_cut
    assert mx.array_equal(own_attention.o_proj.weight, before) == (is_cut or turned == head_dim)
    assert "_order" not in dict(tree_flatten(own_attention.parameters()))


def test_bf16_is_no_further_from_the_truth_than_with_whole_keys_and_values() -> None:
    """Of the shape of the 12B's full layers, but for the number of heads; the means of several."""
    text = text_of(512, 128)
    found, before = [], []
    for seed in range(16):
        layer = made_layer(text, seed=seed)
        layer.set_dtype(mx.bfloat16)
        own = cast(SelfAttention, layer.self_attn)
        x = mx.random.normal((60, HIDDEN), key=mx.random.key(seed)).astype(mx.bfloat16)
        expected = TwoTensors(own, text)(np.array(x.astype(mx.float32), np.float64))
        before.append(np.sqrt(((two_tensors_in_mlx(own, x, text) - expected) ** 2).mean()))
        arrange_layer(layer)
        found.append(np.sqrt(((run(own, text, x, 40) - expected) ** 2).mean()))
    assert np.mean(found) <= 1.03 * np.mean(before)  # scores come in two parts, each rounded: 1.5 ± .7 % of several


def two_tensors_in_mlx(own: SelfAttention, x: mx.array, text: TextConfig) -> np.ndarray:
    """With MLX's own operations in x's type, as other engines do it."""
    shape = text.attention[FULL]
    half, turned = shape.head_dim // 2, shape.rotated_dims // 2
    periods = mx.concatenate(
        [shape.rope_theta ** (mx.arange(0, 2 * turned, 2) / shape.head_dim), mx.full((half - turned,), mx.inf)]
    )

    def heads(y: mx.array) -> mx.array:
        return mx.unflatten(y, -1, (-1, shape.head_dim)).swapaxes(0, 1)[None]

    def rope(y: mx.array) -> mx.array:
        return mx.fast.rope(y, shape.head_dim, traditional=False, base=None, scale=1.0, offset=0, freqs=periods)

    k = heads(own.k_proj(x))
    q, v = rope(own.q_norm(heads(own.q_proj(x)))), mx.fast.rms_norm(k, None, EPS)
    k = rope(own.k_norm(k))
    mask = mx.tri(len(x), dtype=mx.int32).astype(mx.bool_)
    q = q.reshape(1, KV_HEADS, -1, len(x), shape.head_dim)
    scores = mx.where(mask, q @ k[:, :, None].swapaxes(-1, -2), mx.finfo(x.dtype).min)
    out = mx.softmax(scores, axis=-1, precise=True) @ v[:, :, None]
    out = out.flatten(1, 2)[0].swapaxes(0, 1).flatten(1)
    return np.array(own.o_proj(out).astype(mx.float32), np.float64)


# --- joined matrices -----------------------------------------------------------------------------


def linear(rows: int, seed: int, quantization: dict[str, Any] | None = None, dtype: mx.Dtype = mx.float32) -> nn.Module:
    module = nn.Linear(64, rows, bias=False)
    module.weight = mx.random.normal((rows, 64), key=mx.random.key(seed)).astype(dtype)
    return module if quantization is None else module.to_quantized(**quantization)


AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
KINDS: list[Callable[[int, int], nn.Module]] = [
    lambda rows, seed: linear(rows, seed),
    lambda rows, seed: linear(rows, seed, dtype=mx.bfloat16),
    lambda rows, seed: linear(rows, seed, AFFINE),
    lambda rows, seed: linear(rows, seed, AFFINE | {"bits": 8}),
    lambda rows, seed: linear(rows, seed, AFFINE | {"group_size": 64}),
    lambda rows, seed: linear(rows, seed, AFFINE, mx.bfloat16),  # bf16 scales
    lambda rows, seed: linear(rows, seed, AFFINE | {"mode": "mxfp4"}),
    lambda rows, seed: linear(rows, seed, AFFINE | {"mode": "mxfp8", "bits": 8}),
]


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=4),
    rows=st.lists(st.sampled_from([8, 16, 24, 40]), min_size=4, max_size=4),
)
def test_matrices_that_are_alike_are_joined_and_others_are_not(kinds: list[int], rows: list[int]) -> None:
    modules = [KINDS[kind](count, seed) for seed, (kind, count) in enumerate(zip(kinds, rows, strict=False))]
    x = mx.random.normal((2, 3, 64), key=mx.random.key(9))
    expected = [module(x) for module in modules]
    with joining():
        joined = Projections(modules)
    found = joined(x)
    assert len(joined.joined) == 1 + sum(one != other for one, other in pairwise(kinds))
    for one, own in zip(found, expected, strict=True):
        assert one.shape == own.shape and one.dtype == own.dtype
        assert mx.allclose(one, own, rtol=1e-5, atol=1e-5 if own.dtype == mx.float32 else 0.1)


@pytest.mark.skipif(mx.default_device().type == mx.gpu, reason="joins them")
def test_a_cpu_leaves_those_of_float32_apart(tiny: tuple[Model, Any]) -> None:
    assert len(tiny[0].language_model.layers[0].mlp.inputs.joined) == 2


def test_a_model_of_mixed_recipes_is_what_it_is_unarranged(tmp_path: Path) -> None:
    """Half of a checkpoint's matrices have other bits: its logits are those of the same numbers unquantized."""
    folder = write_checkpoint(tmp_path / "whole", TINY)
    reference = load(folder, None)[0]
    prompt = Prompt([2, *range(150, 170)])
    model = unarranged(folder)
    settings_of = {"q_proj": AFFINE, "k_proj": AFFINE | {"bits": 8}, "gate_proj": AFFINE | {"bits": 3}}
    for layer in model.language_model.layers:
        for part, names in ((layer.self_attn, ("q_proj", "k_proj")), (layer.mlp, ("gate_proj",))):
            for name in names:
                part[name] = part[name].to_quantized(**settings_of[name])
    rounded = unarranged(folder)
    for layer, source in zip(rounded.language_model.layers, model.language_model.layers, strict=True):
        for part, own, names in (
            (layer.self_attn, source.self_attn, ("q_proj", "k_proj")),
            (layer.mlp, source.mlp, ("gate_proj",)),
        ):
            for name in names:
                part[name].weight = mx.array(plain(own[name]).astype(np.float32))
    arrange(model)
    with joining():
        arrange(rounded)
    assert [len(layer.self_attn.inputs.joined) for layer in model.language_model.layers][:1] == [3]
    assert {len(layer.mlp.inputs.joined) for layer in model.language_model.layers} == {2}
    assert {len(layer.mlp.inputs.joined) for layer in rounded.language_model.layers} == {1}
    found, expected = np.array(model.logits(prompt)), np.array(rounded.logits(prompt))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(found - np.array(reference.logits(prompt))).max() > 1e-3


def unarranged(folder: Path) -> Model:
    """A model as its checkpoint has it."""
    checkpoint = open_checkpoint(folder, None)
    model = checkpoint.model
    model.load_weights([(path, checkpoint.tensors[path].read()) for path in parameters(model)])
    return model
