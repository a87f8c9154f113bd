"""The decoder's parts against their formulas in float64."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.model.decoder import Decoder, geglu
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor

Loaded = tuple[Model, Processor]


def error(found: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(found) - expected).max() / np.abs(expected).max())


def test_mlp_gate_is_the_tanh_form_of_gelu() -> None:
    gate, up = (np.random.default_rng(n).standard_normal((7, 33)).astype(np.float32) * 3 for n in range(2))
    wide = gate.astype(np.float64)
    gelu = 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    assert error(geglu(mx.array(gate), mx.array(up)), gelu * up) < 1e-6
    assert geglu(mx.array(gate).astype(mx.bfloat16), mx.array(up).astype(mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [30.0, 0.5, None])
def test_head_gives_capped_logits_in_float32(tiny: Loaded, cap: float | None, dtype: mx.Dtype) -> None:
    config = replace(tiny[0].config.text, layer_types=(), final_logit_softcapping=cap)
    decoder = Decoder(config, dtype)
    decoder.embed_tokens.weight = mx.random.normal(decoder.embed_tokens.weight.shape, key=mx.random.key(0))
    decoder.set_dtype(dtype)
    hidden = mx.random.normal((1, 3, config.hidden_size), key=mx.random.key(1)).astype(dtype)
    logits = decoder.head(hidden)
    assert logits.dtype == mx.float32
    assert logits.shape == (1, 3, config.vocab_size)
    table, wide = (np.array(x.astype(mx.float32), np.float64) for x in (decoder.embed_tokens.weight, hidden))
    expected = wide @ table.T
    assert np.abs(expected).max() > 20  # so that the cap matters
    if cap is not None:
        expected = cap * np.tanh(expected / cap)
    assert error(logits, expected) < (1e-5 if dtype == mx.float32 else 1e-2)
