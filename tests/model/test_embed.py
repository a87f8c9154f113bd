"""Soft tokens and token embeddings against the formulas, in float64."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from toy_checkpoint import OTHER, TINY, Shape, tensors

from mlx_gemma4.config import TextConfig
from mlx_gemma4.model.decoder import Decoder
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt, SoftTokens

Loaded = tuple[Model, Processor]
PIXELS = 48 * 48 * 3


def weights_of(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in tensors(shape, seed).items()}


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def rms_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def expected_pictures(weights: dict[str, np.ndarray], pixels: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Patches [n, 6912] of 0 … 255 at positions [n, 2] -> soft tokens [n, hidden], by section 2 of the reference."""

    def named(name: str) -> np.ndarray:
        return weights[f"model.vision_embedder.{name}"]

    x = layer_norm(pixels / 255, named("patch_ln1.weight"), named("patch_ln1.bias"))
    x = x @ named("patch_dense.weight").T + named("patch_dense.bias")
    x = layer_norm(x, named("patch_ln2.weight"), named("patch_ln2.bias"))
    table = named("pos_embedding")
    x = x + table[positions[:, 0], 0] + table[positions[:, 1], 1]
    x = layer_norm(x, named("pos_norm.weight"), named("pos_norm.bias"))
    return rms_norm(x) @ weights["model.embed_vision.embedding_projection.weight"].T


def expected_sounds(weights: dict[str, np.ndarray], samples: np.ndarray) -> np.ndarray:
    return rms_norm(samples.astype(np.float64)) @ weights["model.embed_audio.embedding_projection.weight"].T


def error(found: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(found) - expected).max() / np.abs(expected).max())


def soft_tokens(model: Model, run: SoftTokens) -> mx.array:
    return model.soft_tokens(run, 0, len(run))


def patches(kind: str, n: int) -> np.ndarray:
    """Pixels [n, 6912]: noise, or a picture with hardly any contrast, bright or dark."""
    rng = np.random.default_rng(5)
    low, high = {"noise": (0, 256), "bright and flat": (253, 255), "dark and flat": (2, 4), "grey": (127, 130)}[kind]
    return rng.integers(low, high, (n, PIXELS), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["noise", "bright and flat", "dark and flat", "grey"])
def test_pictures_of_any_contrast_are_embedded_precisely(tiny: Loaded, other: Loaded, kind: str) -> None:
    for (model, _), weights in ((tiny, weights_of(TINY, 0)), (other, weights_of(OTHER, 1))):
        pixels = patches(kind, 9)
        positions = np.random.default_rng(6).integers(0, 1120, (9, 2), dtype=np.int32)
        found = soft_tokens(model, SoftTokens("image", 0, pixels, positions))
        assert error(found, expected_pictures(weights, pixels, positions)) < 1e-5


def test_one_pixel_of_a_flat_picture_counts(tiny: Loaded) -> None:
    """No contrast at all is what LayerNorm's epsilon is for; a single pixel is hardly more."""
    pixels = np.full((3, PIXELS), 200, np.uint8)
    pixels[1, 100] = 201
    pixels[2, 100] = 255
    positions = np.zeros((3, 2), np.int32)
    expected = expected_pictures(weights_of(TINY, 0), pixels, positions)
    assert error(soft_tokens(tiny[0], SoftTokens("image", 0, pixels, positions)), expected) < 1e-5
    assert np.abs(expected[1] - expected[0]).max() > 1e-4  # so that the line above says something


def test_columns_and_rows_have_tables_of_their_own(tiny: Loaded) -> None:
    pixels = np.repeat(patches("noise", 1), 3, axis=0)
    positions = np.array([[3, 8], [8, 3], [0, 1119]], np.int32)
    found = soft_tokens(tiny[0], SoftTokens("image", 0, pixels, positions))
    assert error(found, expected_pictures(weights_of(TINY, 0), pixels, positions)) < 1e-5
    assert np.abs(np.array(found[0] - found[1])).max() > 0.1


@pytest.mark.parametrize("loudness", [1.0, 1e-2, 1e-4])
def test_sounds_are_normed_and_projected(tiny: Loaded, loudness: float) -> None:
    samples = (np.random.default_rng(7).uniform(-1, 1, (6, 640)) * loudness).astype(np.float32)
    found = soft_tokens(tiny[0], SoftTokens("audio", 0, samples))
    assert error(found, expected_sounds(weights_of(TINY, 0), samples)) < 1e-5


def test_silence_is_no_division_by_zero(tiny: Loaded) -> None:
    found = soft_tokens(tiny[0], SoftTokens("audio", 0, np.zeros((2, 640), np.float32)))
    assert not np.array(found).any()


def test_soft_tokens_take_their_places_unscaled_and_tokens_are_scaled(tiny: Loaded) -> None:
    model, _ = tiny
    weights = weights_of(TINY, 0)
    samples = np.random.default_rng(8).uniform(-1, 1, (3, 640)).astype(np.float32)
    pixels, positions = patches("noise", 4), np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.int32)
    prompt = Prompt(list(range(110, 122)), (SoftTokens("audio", 1, samples), SoftTokens("image", 6, pixels, positions)))
    expected = weights["model.language_model.embed_tokens.weight"][110:122] * TINY.hidden**0.5
    expected[1:4] = expected_sounds(weights, samples)
    expected[6:10] = expected_pictures(weights, pixels, positions)
    assert error(model.embed(prompt, 0, 12)[0], expected) < 1e-5
    for start, end in ((0, 3), (2, 8), (3, 4), (7, 9), (9, 12)):  # also where a run is cut
        assert error(model.embed(prompt, start, end)[0], expected[start:end]) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "scale"), [(mx.bfloat16, 62.0), (mx.float32, np.float32(3840**0.5))], ids=["bfloat16", "float32"]
)
def test_tokens_are_scaled_by_the_root_of_hidden_in_their_own_type(tiny: Loaded, dtype: mx.Dtype, scale: float) -> None:
    config: TextConfig = replace(tiny[0].config.text, hidden_size=3840, vocab_size=16, layer_types=())
    decoder = Decoder(config, dtype)
    decoder.set_dtype(dtype)
    token_ids = mx.array([[3, 0, 15, 3]])
    found = decoder.embed(token_ids)
    assert found.dtype == dtype
    assert found.shape == (1, 4, 3840)
    rows = decoder.embed_tokens.weight[token_ids].astype(mx.float32)
    assert mx.array_equal(found, (rows * scale).astype(dtype))
