"""The decoder's parts against their formulas in float64."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma4 import decoder as decoder_module
from mlx_gemma4.config import AttentionConfig
from mlx_gemma4.decoder import Decoder, RoPE, attend, folded_attention, fused_attention, geglu
from mlx_gemma4.model import Model
from mlx_gemma4.processor import Processor

Loaded = tuple[Model, Processor]


def error(found: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(found) - expected).max() / np.abs(expected).max())


# --- RoPE --------------------------------------------------------------------------------------


def rotated(x: np.ndarray, first: int, theta: float, turning: int) -> np.ndarray:
    """x [H, L, hd] from position `first` on: dims i and i + hd / 2 turn as a pair, those of the first `turning` / 2."""
    half = x.shape[-1] // 2
    out = x.astype(np.float64)
    for place in range(x.shape[1]):
        for i in range(turning // 2):
            angle = (first + place) * theta ** (-2 * i / x.shape[-1])
            a, b = x[:, place, i].astype(np.float64), x[:, place, i + half].astype(np.float64)
            out[:, place, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, place, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def rope(head_dim: int, theta: float, turning: int) -> RoPE:
    return RoPE(AttentionConfig(head_dim, 1, rope_theta=theta, rotated_dims=turning, window=None))


@pytest.mark.parametrize("first", [0, 1, 700])
@pytest.mark.parametrize(
    ("head_dim", "theta", "turning"),
    [(256, 1e4, 256), (16, 1e4, 16), (512, 1e6, 128), (32, 1e6, 8)],
    ids=["sliding", "sliding, tiny", "full", "full, tiny"],
)
def test_rope_turns_pairs_over_the_halves(head_dim: int, theta: float, turning: int, first: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, head_dim)).astype(np.float32)
    found = rope(head_dim, theta, turning)(mx.array(x)[None], mx.array(first))[0]
    # an angle is a float32, so at position 700 it is known to 3e-5
    assert error(found, rotated(x, first, theta, turning)) < (1e-5 if first < 10 else 1e-4)


def test_rope_of_full_layers_turns_a_quarter_of_the_dims_and_leaves_the_rest_as_they_are() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 512)).astype(np.float32)
    found = np.array(rope(512, 1e6, 128)(mx.array(x)[None], mx.array(100_000)))[0]
    still = np.r_[64:256, 320:512]
    assert np.array_equal(found[..., still], x[..., still])
    # the slowest of the pairs turns by 1e5 * 1e6 ** (-126 / 512), many times around
    assert (np.abs(found - x).max(axis=1)[0, np.r_[0:64, 256:320]] > 1e-3).all()


def test_checkpoints_shapes_say_which_dims_turn(tiny: Loaded) -> None:
    sliding, full = (tiny[0].config.text.attention[kind] for kind in ("sliding_attention", "full_attention"))
    assert (sliding.head_dim, sliding.rotated_dims, sliding.rope_theta) == (16, 16, 1e4)
    assert (full.head_dim, full.rotated_dims, full.rope_theta) == (32, 8, 1e6)


def test_scores_depend_on_distance_alone() -> None:
    q, k = (mx.random.normal((1, 1, 1, 32), key=mx.random.key(n)) for n in range(2))
    for turn in (rope(32, 1e4, 32), rope(32, 1e6, 8)):
        near, far = ((turn(q, mx.array(at + 9)) @ turn(k, mx.array(at)).swapaxes(-1, -2)).item() for at in (0, 300))
        assert near == pytest.approx(far, abs=1e-4)


# --- attention ---------------------------------------------------------------------------------


def expected_attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> np.ndarray:
    """Head by head; query head h belongs to key/value head h // group."""
    queries, keys, values = (np.array(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = np.where(np.array(mask), queries[b, h] @ keys[b, h // group].T, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, h] = weights / weights.sum(axis=-1, keepdims=True) @ values[b, h // group]
    return out


def attention_inputs(
    batch: int, group: int, kv_heads: int, length: int, slots: int, head_dim: int, seed: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """q, k, v and a random mask in which every query sees at least one key."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, group * kv_heads, length, head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, slots, head_dim)).astype(np.float32)
    mask = rng.random((length, slots)) < rng.uniform(0.05, 1)
    mask[np.arange(length), rng.integers(0, slots, length)] = True
    return mx.array(q), mx.array(k), mx.array(v), mx.array(mask)


shapes = {
    "batch": st.integers(1, 2),
    "group": st.integers(1, 6),
    "kv_heads": st.integers(1, 3),
    "length": st.integers(1, 20),
    "slots": st.integers(1, 40),
    "head_dim": st.sampled_from([4, 16, 64, 80]),
    "seed": st.integers(0, 2**32 - 1),
}


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_folded_and_fused_attention_are_the_formula(**sizes: int) -> None:
    inputs = attention_inputs(**sizes)
    expected = expected_attention(*inputs)
    for attention in (folded_attention, fused_attention):
        assert error(attention(*inputs), expected) < 1e-5


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 25), fold=st.booleans(), **shapes)
def test_attention_in_passes_is_attention_in_one(rows: int, fold: bool, **sizes: int) -> None:
    q, k, v, mask = attention_inputs(**sizes)
    whole = attend(q, k, v, mask, fold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_module, "MAX_SCORE_BYTES", rows * q.shape[1] * k.shape[2] * 4)
        assert error(attend(q, k, v, mask, fold), np.array(whole)) < 1e-5
        patch.setattr(decoder_module, "MAX_SCORE_BYTES", 1)  # less than a row: row by row
        assert error(attend(q, k, v, mask, fold), np.array(whole)) < 1e-5


@pytest.mark.parametrize("fold", [True, False])
def test_scores_of_few_passes_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch, fold: bool) -> None:
    limit = 4 * 2**20
    monkeypatch.setattr(decoder_module, "MAX_SCORE_BYTES", limit)
    q, k = mx.zeros((1, 16, 256, 4)), mx.zeros((1, 1, 4096, 4))
    mask = mx.ones((256, 4096), mx.bool_)
    mx.eval(q, k, mask)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend(q, k, k, mask, fold))
    # scores, masked scores and weights of two passes at most; all scores once are 16 times the limit
    assert mx.get_peak_memory() - before < 10 * limit


def test_softmax_of_bf16_scores_is_precise() -> None:
    """A thousand equal scores: summed in bf16, they would stop to count at 256."""
    q, k = mx.zeros((1, 2, 1, 4), mx.bfloat16), mx.zeros((1, 1, 1000, 4), mx.bfloat16)
    v = mx.ones((1, 1, 1000, 4), mx.bfloat16)
    for fold in (True, False):
        found = attend(q, k, v, mx.ones((1, 1000), mx.bool_), fold)
        assert found.dtype == mx.bfloat16
        assert np.array(found.astype(mx.float32)) == pytest.approx(1, rel=1e-2)


# --- the rest ----------------------------------------------------------------------------------


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
