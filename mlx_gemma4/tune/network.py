"""The model on whole rows, with gradients: the package's own modules as the checkpoint has them, without caches."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx

from mlx_gemma4.config import FULL, SLIDING
from mlx_gemma4.model.attention import QueryAttention, SelfAttention
from mlx_gemma4.model.decoder import Layer, geglu
from mlx_gemma4.model.model import Model
from mlx_gemma4.tune.rows import Row

Turns = tuple[mx.array, mx.array]  # cosines and sines, [B, 1, T, hd]
Keys = tuple[mx.array, mx.array]  # keys and values, [B, KV, T, hd]


def turns_of(layers: list[Layer], positions: mx.array) -> dict[str, Turns]:
    """What RoPE turns by at positions [B, T], by kind of layer: they need not follow each other."""
    found: dict[str, Turns] = {}
    for layer in layers:
        if layer.kind not in found:
            half = layer.self_attn.head_dim // 2
            turning = 1 / layer.self_attn.rope.periods
            still = mx.zeros((half - len(turning),))  # of full layers RoPE knows those that turn alone
            angles = positions[:, None, :, None] * mx.concatenate([turning, still])
            both = mx.concatenate([angles, angles], axis=-1)
            found[layer.kind] = (mx.cos(both), mx.sin(both))
    return found


def turn(x: mx.array, turns: Turns) -> mx.array:
    """RoPE: x [B, H, T, hd]."""
    one, other = mx.split(x, 2, axis=-1)
    cos, sin = turns
    return (x * cos + mx.concatenate([-other, one], axis=-1) * sin).astype(x.dtype)


def queries(own: QueryAttention, x: mx.array, turns: Turns) -> mx.array:
    """[B, T, D] -> [B, H, T, hd]."""
    return turn(own.q_norm(own.heads(own.q_proj(x))).swapaxes(1, 2), turns)


def attend(own: QueryAttention, q: mx.array, keys: Keys, mask: mx.array) -> mx.array:
    """q [B, H, T, hd], mask [B, 1, T, S] bool -> [B, T, D]. A query sees one key at least."""
    out = mx.fast.scaled_dot_product_attention(q, *keys, scale=1.0, mask=mask)
    return own.o_proj(out.swapaxes(1, 2).flatten(2))


def self_attention(own: SelfAttention, x: mx.array, turns: Turns, mask: mx.array) -> tuple[mx.array, Keys]:
    k = own.heads(own.k_proj(x))
    v = k if own.is_full else own.heads(own.v_proj(x))
    keys = turn(own.k_norm(k).swapaxes(1, 2), turns), mx.fast.rms_norm(v, None, own.eps).swapaxes(1, 2)
    return attend(own, queries(own, x, turns), keys, mask), keys


def after_attention(layer: Layer, h: mx.array, out: mx.array) -> mx.array:
    """The rest of a layer once its attention has given `out`."""
    h = h + layer.post_attention_layernorm(out)
    x = layer.pre_feedforward_layernorm(h)
    out = layer.mlp.down_proj(geglu(layer.mlp.gate_proj(x), layer.mlp.up_proj(x)))
    return (h + layer.post_feedforward_layernorm(out)) * layer.layer_scalar


def embed(model: Model, row: Row) -> mx.array:
    """Tokens and media -> [1, T, D]."""
    h = model.language_model.embed(mx.array(row.ids)[None])
    media: list[mx.array] = []
    if len(row.patches):
        media.append(model.embed_vision(model.vision_embedder(mx.array(row.patches), mx.array(row.patch_positions))))
    if len(row.frames):
        media.append(model.embed_audio(mx.array(row.frames).astype(h.dtype)))
    if not media:
        return h
    rows = mx.concatenate([mx.zeros((1, h.shape[-1]), h.dtype), *media])
    soft = mx.array(row.soft)[None]
    return mx.where((soft > 0)[..., None], rows[soft].astype(h.dtype), h)


def outputs(model: Model, row: Row, checkpoint: bool) -> Iterator[tuple[mx.array, str, Keys]]:
    """Of each layer: the hidden states after it, [1, T, D], its kind, and its keys and values.

    checkpoint: keep of each layer its input alone, and compute it once more for its gradient.
    """
    decoder = model.language_model
    h = embed(model, row)
    turns = turns_of(decoder.layers, mx.array(row.positions)[None])
    masks = {FULL: mx.array(row.full)[None, None], SLIDING: mx.array(row.sliding)[None, None]}
    for layer in decoder.layers:
        run = mx.checkpoint(run_layer(layer)) if checkpoint else run_layer(layer)
        h, *keys = run(layer.trainable_parameters(), h, *turns[layer.kind], masks[layer.kind])
        yield h, layer.kind, cast(Keys, tuple(keys))


def hidden_states(model: Model, row: Row, checkpoint: bool) -> tuple[mx.array, dict[str, Keys]]:
    """After the final norm, [1, T, D]; keys and values of the last layer of each kind, which a drafter reads."""
    found = list(outputs(model, row, checkpoint))
    return model.language_model.norm(found[-1][0]), {kind: keys for _, kind, keys in found}


def learnt_states(model: Model, row: Row, checkpoint: bool) -> mx.array:
    """[N, D]: what the learnt tokens are told from."""
    return hidden_states(model, row, checkpoint)[0][0][mx.array(row.places)]


def run_layer(layer: Layer) -> Callable[..., tuple[mx.array, ...]]:
    def run(weights: Any, h: mx.array, cos: mx.array, sin: mx.array, mask: mx.array) -> tuple[mx.array, ...]:
        layer.update(weights)
        out, keys = self_attention(cast(SelfAttention, layer.self_attn), layer.input_layernorm(h), (cos, sin), mask)
        return after_attention(layer, h, out), *keys

    return run
