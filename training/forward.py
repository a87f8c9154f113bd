"""The model as it is trained: many rows at once, no caches, gradients; the package's own modules and weights."""

import math
from typing import cast

import mlx.core as mx

from mlx_gemma4.config import FULL, SLIDING
from mlx_gemma4.decoder import Layer, SelfAttention
from mlx_gemma4.model import Model
from training.rows import Batch

# MLX's own exp takes 12 ns an element on a CPU, which would be most of a step; compiled, this takes 2. No mx.maximum:
# it looks for NaN, and with a branch inside compiled loops are not made of vector instructions.
LOG2_E = 1.4426950408889634


def exp(x: mx.array) -> mx.array:
    """e to the x to six digits, for x from -87 to 87; without gradient."""
    y = x * LOG2_E
    shifted = y + 12582912.0  # its low bits are the whole part of y
    f = y - (shifted - 12582912.0)
    power = 1 + f * (0.6931472 + f * (0.2402265 + f * (0.0555041 + f * (0.009618129 + f * 0.0013333558))))
    return power * mx.view((mx.view(shifted, mx.int32) << 23) + (127 << 23), mx.float32)


def exp_or_zero(x: mx.array) -> mx.array:
    """e to the x, and 0 below -30: denormal numbers, which come of smaller ones, are slow."""
    seen = x > -30.0
    return mx.where(seen, exp(mx.where(seen, x, 0.0)), 0.0)


@mx.custom_function
def softmax(scores: mx.array) -> mx.array:
    weights = exp_or_zero(scores - mx.max(scores, axis=-1, keepdims=True))
    return weights * (1 / mx.sum(weights, axis=-1, keepdims=True))


@softmax.vjp
def softmax_vjp(scores: mx.array, cotangent: mx.array, weights: mx.array) -> mx.array:
    product = weights * cotangent
    return product - weights * mx.sum(product, axis=-1, keepdims=True)


def gelu_gate(x: mx.array) -> mx.array:
    """1 / (1 + e^-2u), which is (1 + tanh(u)) / 2."""
    v = -2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    v = mx.where(v < 30.0, v, 30.0)
    return 1 / (1 + exp(mx.where(v > -30.0, v, -30.0)))


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    return x * gelu_gate(x)


@gelu.vjp
def gelu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    s = gelu_gate(x)
    return cotangent * (s + x * s * (1 - s) * (2 * math.sqrt(2 / math.pi)) * (1 + 3 * 0.044715 * x * x))


def turn(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """RoPE at any positions: x [B, H, T, hd]; cos, sin [B, 1, T, hd / 2]."""
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def self_attention(
    attention: SelfAttention, x: mx.array, turns: tuple[mx.array, mx.array], mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Attention without a cache; also its keys and values, [B, KV, T, hd], which a drafter reads."""
    rows, length, _ = x.shape
    dims = attention.head_dim

    def heads(y: mx.array, count: int) -> mx.array:
        return y.reshape(rows, length, count, dims)

    q = attention.q_norm(heads(attention.q_proj(x), attention.heads)).swapaxes(1, 2)
    keys = heads(attention.k_proj(x), attention.kv_heads)
    values = keys if attention.is_full else heads(attention.v_proj(x), attention.kv_heads)
    k = turn(attention.k_norm(keys).swapaxes(1, 2), *turns)
    v = mx.fast.rms_norm(values, None, attention.eps).swapaxes(1, 2)
    return attention.o_proj(attend(turn(q, *turns), k, v, mask)), k, v


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """q [B, H, L, hd], k, v [B, KV, S, hd], mask [B, L, S] to add -> [B, L, H * hd]."""
    rows, heads, length, dims = q.shape
    groups, slots = k.shape[1], k.shape[2]
    folded = q.reshape(rows, groups, -1, dims)  # the query heads of a key/value head are rows of one product
    scores = (folded @ k.swapaxes(-1, -2)).reshape(rows, heads, length, slots) + mask[:, None]
    weights = cast(mx.array, softmax(scores)).reshape(rows, groups, -1, slots)
    return (weights @ v).reshape(rows, heads, length, dims).swapaxes(1, 2).flatten(2)


def mlp(layer: Layer, x: mx.array) -> mx.array:
    return layer.mlp.down_proj(cast(mx.array, gelu(layer.mlp.gate_proj(x))) * layer.mlp.up_proj(x))


def after_attention(layer: Layer, h: mx.array, out: mx.array) -> mx.array:
    """The rest of a layer once its attention has given `out`."""
    h = h + layer.post_attention_layernorm(out)
    h = h + layer.post_feedforward_layernorm(mlp(layer, layer.pre_feedforward_layernorm(h)))
    return h * layer.layer_scalar


def embed(model: Model, batch: Batch) -> mx.array:
    """Tokens and media → [B, T, hidden]."""
    h = model.language_model.embed(mx.array(batch.ids))
    parts = []
    if len(batch.pixels):
        parts.append(model.embed_vision(model.vision_embedder(mx.array(batch.pixels), mx.array(batch.places))))
    if len(batch.frames):
        parts.append(model.embed_audio(mx.array(batch.frames)))
    if not parts:
        return h
    media = mx.concatenate([mx.zeros((1, h.shape[-1])), *parts])
    soft = mx.array(batch.soft)
    return mx.where((soft > 0)[..., None], media[soft], h)


def turns_of(model: Model, positions: mx.array) -> dict[str, tuple[mx.array, mx.array]]:
    found = {}
    for layer in model.language_model.layers:
        if layer.kind not in found:
            angles = positions[:, None, :, None] / layer.self_attn.rope.periods
            found[layer.kind] = (mx.cos(angles), mx.sin(angles))
    return found


def hidden_states(model: Model, batch: Batch) -> tuple[mx.array, dict[str, tuple[mx.array, mx.array]]]:
    """The hidden states after the final norm, [B, T, hidden], and the last keys and values of each kind of layer."""
    h = embed(model, batch)
    masks = {FULL: mx.array(batch.full), SLIDING: mx.array(batch.sliding)}
    turns = turns_of(model, mx.array(batch.positions))
    last = {}
    for layer in model.language_model.layers:
        out, k, v = self_attention(
            cast(SelfAttention, layer.self_attn), layer.input_layernorm(h), turns[layer.kind], masks[layer.kind]
        )
        last[layer.kind] = (k, v)
        h = after_attention(layer, h, out)
    return model.language_model.norm(h), last


def learnt_logits(model: Model, hidden: mx.array, batch: Batch) -> mx.array:
    """Logits where a next token is learnt, [N, vocab]."""
    return model.language_model.head(hidden.flatten(0, 1)[mx.array(batch.learnt)][None])[0]


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """The surprise of each target in nats: logits [N, vocab], targets [N]."""
    return cast(mx.array, log_sum(logits)) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


@mx.custom_function
def log_sum(x: mx.array) -> mx.array:
    top = mx.max(x, axis=-1, keepdims=True)
    return (mx.log(mx.sum(exp_or_zero(x - top), axis=-1, keepdims=True)) + top)[:, 0]


@log_sum.vjp
def log_sum_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return exp_or_zero(x - output[:, None]) * cotangent[:, None]


def loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """Mean cross entropy of the learnt tokens in nats, and what part of them is the likeliest token."""
    hidden, _ = hidden_states(model, batch)
    logits, targets = learnt_logits(model, hidden, batch), mx.array(batch.targets)
    weights = mx.array(batch.weights) / mx.sum(mx.array(batch.weights))
    right = mx.sum((mx.argmax(logits, axis=-1) == targets) * weights)
    return mx.sum(cross_entropy(logits, targets) * weights), mx.stop_gradient(right)
