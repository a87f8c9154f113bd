"""Attention against its formulas in float64."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma4.config import AttentionConfig
from mlx_gemma4.model import attention as attention_module
from mlx_gemma4.model.attention import RoPE, attend
from mlx_gemma4.model.cache import ROUND, Arrays
from mlx_gemma4.model.mask import Mask
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor

Loaded = tuple[Model, Processor]


def error(found: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(found) - expected).max() / np.abs(expected).max())


# --- RoPE --------------------------------------------------------------------------------------


def rotated(x: np.ndarray, first: int, theta: float, head_dim: int) -> np.ndarray:
    """x [H, L, dims] from position `first` on: dims i and i + dims / 2 turn as a pair."""
    half = x.shape[-1] // 2
    out = x.astype(np.float64)
    for place in range(x.shape[1]):
        for i in range(half):
            angle = (first + place) * theta ** (-2 * i / head_dim)
            a, b = x[:, place, i].astype(np.float64), x[:, place, i + half].astype(np.float64)
            out[:, place, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, place, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def rope(head_dim: int, theta: float, turning: int, window: int | None) -> RoPE:
    return RoPE(AttentionConfig(head_dim, 1, rope_theta=theta, rotated_dims=turning, window=window))


@pytest.mark.parametrize("first", [0, 1, 700])
@pytest.mark.parametrize(
    ("head_dim", "theta", "turning", "window"),
    [(256, 1e4, 256, 1024), (16, 1e4, 16, 16), (512, 1e6, 128, None), (32, 1e6, 8, None), (24, 1e6, 24, None)],
    ids=["sliding", "sliding, tiny", "full", "full, tiny", "full, whole heads"],
)
def test_rope_turns_pairs_over_the_halves(
    head_dim: int, theta: float, turning: int, window: int | None, first: int
) -> None:
    """Of full layers those in front, with the periods of the whole head; what is behind stays as it is."""
    x = np.random.default_rng(0).standard_normal((2, 5, head_dim)).astype(np.float32)
    found = rope(head_dim, theta, turning, window)(mx.array(x)[None], mx.array(first))[0]
    expected = np.concatenate([rotated(x[..., :turning], first, theta, head_dim), x[..., turning:]], axis=-1)
    # an angle is a float32, so at position 700 it is known to 3e-5
    assert error(found, expected) < (1e-5 if first < 10 else 1e-4)
    assert np.array_equal(np.array(found)[..., turning:], x[..., turning:])


def test_rope_of_full_layers_turns_a_quarter_of_the_dims() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 512)).astype(np.float32)
    found = np.array(rope(512, 1e6, 128, None)(mx.array(x)[None], mx.array(100_000)))[0]
    # the slowest of the pairs turns by 1e5 * 1e6 ** (-126 / 512), many times around
    assert (np.abs(found - x).max(axis=1)[0, :128] > 1e-3).all()


def test_keys_turn_alone_as_they_do_in_whole_heads() -> None:
    """A full layer's cache holds of keys what turns."""
    x = mx.random.normal((2, 3, 4, 32), key=mx.random.key(0))
    turn = rope(32, 1e6, 8, None)
    for offset in (5, mx.array(5), mx.array([5, 9])):
        assert mx.array_equal(turn(x[..., :8], offset), turn(x, offset)[..., :8])


def test_rows_turn_from_offsets_of_their_own() -> None:
    x = mx.random.normal((3, 2, 4, 32), key=mx.random.key(0))
    for turn in (rope(32, 1e4, 32, 16), rope(32, 1e6, 8, None)):
        together = turn(x, mx.array([0, 7, 300]))
        for row, offset in enumerate((0, 7, 300)):
            assert mx.allclose(together[row], turn(x[row : row + 1], offset)[0], atol=1e-6)


def test_checkpoints_shapes_say_which_dims_turn(tiny: Loaded) -> None:
    sliding, full = (tiny[0].config.text.attention[kind] for kind in ("sliding_attention", "full_attention"))
    assert (sliding.head_dim, sliding.rotated_dims, sliding.rope_theta) == (16, 16, 1e4)
    assert (full.head_dim, full.rotated_dims, full.rope_theta) == (32, 8, 1e6)


def test_scores_depend_on_distance_alone() -> None:
    q, k = (mx.random.normal((1, 1, 1, 32), key=mx.random.key(n)) for n in range(2))
    for turn in (rope(32, 1e4, 32, 16), rope(32, 1e6, 8, None)):
        near, far = ((turn(q, mx.array(at + 9)) @ turn(k, mx.array(at)).swapaxes(-1, -2)).item() for at in (0, 300))
        assert near == pytest.approx(far, abs=1e-4)


# --- attention ---------------------------------------------------------------------------------


def expected_attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> np.ndarray:
    """Head by head; query head h belongs to key/value head h // group. mask [B or 1, L, S]."""
    queries, keys, values = (np.array(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            own = np.array(mask)[min(b, mask.shape[0] - 1)]
            scores = np.where(own, queries[b, h] @ keys[b, h // group].T, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, h] = weights / weights.sum(axis=-1, keepdims=True) @ values[b, h // group]
    return out


def attention_inputs(
    batch: int, group: int, kv_heads: int, length: int, slots: int, head_dim: int, seed: int, own_masks: bool = True
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """q, k, v and a random mask, for each row of the batch or one for all, in which every query sees a key."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, group * kv_heads, length, head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, slots, head_dim)).astype(np.float32)
    mask = rng.random((batch if own_masks else 1, length, slots)) < rng.uniform(0.05, 1)
    for own in mask:
        own[np.arange(length), rng.integers(0, slots, length)] = True
    return mx.array(q), mx.array(k), mx.array(v), mx.array(mask)


def kept(k: mx.array, v: mx.array, is_full: bool) -> tuple[Arrays, mx.array, mx.array]:
    """What a layer keeps of keys and values, and these themselves, of which full layers share what does not turn."""
    if not is_full:
        return (k, v), k, v
    cut = k.shape[-1] // 4 * 2
    keys = mx.concatenate([k[..., :cut], v[..., cut:]], axis=-1)
    return (keys, v[..., :cut]), keys, v


def turned_of(entries: Arrays, is_full: bool) -> int | None:
    return entries[1].shape[-1] if is_full else None


def part_of(mask: mx.array) -> Mask:
    return lambda first, last: mask[:, first:last]


shapes = {
    "batch": st.integers(1, 3),
    "group": st.integers(1, 6),
    "kv_heads": st.integers(1, 3),
    "length": st.integers(1, 20),
    "slots": st.integers(1, 40),
    "head_dim": st.sampled_from([4, 16, 64, 80]),
    "seed": st.integers(0, 2**32 - 1),
    "own_masks": st.booleans(),
}


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "sliding"])
@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_attention_is_the_formula(is_full: bool, **sizes: int) -> None:
    q, k, v, mask = attention_inputs(**sizes)
    entries, keys, values = kept(k, v, is_full)
    assert (
        error(attend(q, entries, part_of(mask), turned_of(entries, is_full)), expected_attention(q, keys, values, mask))
        < 1e-5
    )


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "sliding"])
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 25), **shapes)
def test_attention_in_passes_is_attention_in_one(is_full: bool, rows: int, **sizes: int) -> None:
    q, k, v, mask = attention_inputs(**sizes)
    entries, _, _ = kept(k, v, is_full)
    whole = np.array(attend(q, entries, part_of(mask), turned_of(entries, is_full)))
    asked: list[tuple[int, int]] = []

    def watched(first: int, last: int) -> mx.array:
        asked.append((first, last))
        return mask[:, first:last]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "ROUND", 1)
        for most in (rows * q.shape[0] * q.shape[1] * k.shape[2] * 4, 1):  # 1: less than a row, so row by row
            asked.clear()
            patch.setattr(attention_module, "MAX_SCORE_BYTES", most)
            assert error(attend(q, entries, watched, turned_of(entries, is_full)), whole) < 1e-5
            assert max(last - first for first, last in asked) <= (rows if most > 1 else 1)
            assert [place for first, last in asked for place in range(first, last)] == [*range(q.shape[2])]


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "sliding"])
def test_a_round_reads_the_keys_once_however_many_there_are(is_full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "MAX_SCORE_BYTES", 1)
    q, k, v, mask = attention_inputs(2, 2, 1, ROUND, 30, 8, 0)
    asked: list[tuple[int, int]] = []

    def watched(first: int, last: int) -> mx.array:
        asked.append((first, last))
        return mask[:, first:last]

    attend(q, kept(k, v, is_full)[0], watched, turned_of(kept(k, v, is_full)[0], is_full))
    assert asked == [(0, ROUND)]


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "sliding"])
def test_scores_of_few_passes_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch, is_full: bool) -> None:
    limit = 4 * 2**20
    monkeypatch.setattr(attention_module, "MAX_SCORE_BYTES", limit)
    q, k = mx.zeros((1, 16, 256, 4)), mx.zeros((1, 1, 4096, 4))
    mask = mx.ones((1, 256, 4096), mx.bool_)
    entries, _, _ = kept(k, k + 1, is_full)
    mx.eval(q, entries, mask)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend(q, entries, part_of(mask), turned_of(entries, is_full)))
    # scores, masked scores and weights of two passes at most; all scores once are 16 times the limit
    assert mx.get_peak_memory() - before < 10 * limit


def test_softmax_of_bf16_scores_is_precise() -> None:
    """A thousand equal scores: summed in bf16, they would stop to count at 256."""
    q, k = mx.zeros((1, 2, 1, 4), mx.bfloat16), mx.zeros((1, 1, 1000, 4), mx.bfloat16)
    v = mx.ones((1, 1, 1000, 4), mx.bfloat16)
    for is_full in (True, False):
        found = attend(
            q,
            kept(k, v, is_full)[0],
            part_of(mx.ones((1, 1, 1000), mx.bool_)),
            turned_of(kept(k, v, is_full)[0], is_full),
        )
        assert found.dtype == mx.bfloat16
        assert np.array(found.astype(mx.float32)) == pytest.approx(1, rel=1e-2)
