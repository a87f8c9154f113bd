"""The model as it is trained: many rows at once, no caches, gradients; the package's own modules and weights."""

import math
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_gemma4.config import FULL, SLIDING
from mlx_gemma4.model.attention import SelfAttention
from mlx_gemma4.model.decoder import Layer
from mlx_gemma4.model.embed import VisionEmbedder
from mlx_gemma4.model.model import Model
from training.rows import Batch

HINT_LAYERS = 4  # of six: what soft tokens say after these, the last two can still carry to where it is asked for
GELU_A, GELU_B = math.sqrt(2 / math.pi), 0.044715


def exp(x: mx.array) -> mx.array:
    """e to the x, and not quite 0 far below: denormal numbers are slow. Without gradient."""
    return mx.exp(mx.maximum(x, -60.0))


def row_sums(x: mx.array) -> mx.array:
    """[..., n] -> [..., 1]. As a product: inside compiled loops a reduction cannot stand."""
    return x @ mx.ones((x.shape[-1], 1))


def spread(x: mx.array, n: int) -> mx.array:
    """[..., 1] -> [..., n]. As a product: compiled loops are made of vector instructions only if no array in them is
    broadcast."""
    return x @ mx.ones((1, n))


@mx.custom_function
def rms_norm(x: mx.array, weight: mx.array, eps: mx.array) -> mx.array:
    """x [..., n], weight [n]."""
    return x * (mx.rsqrt(row_sums(x * x) / x.shape[-1] + eps) @ weight[None])


@rms_norm.vjp
def rms_norm_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    x, weight, eps = primals
    n = x.shape[-1]
    r = mx.rsqrt(row_sums(x * x) / n + eps)
    along = cotangent * (r @ weight[None])
    dx = along - x * spread(r * r * row_sums(along * x) / n, n)
    return dx, (r.reshape(1, -1) @ (cotangent * x).reshape(-1, n))[0], mx.zeros_like(eps)


def norm(module: nn.RMSNorm, x: mx.array) -> mx.array:
    return cast(mx.array, rms_norm(x, module.weight, mx.array(module.eps)))


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    return nn.gelu_approx(x)


@gelu.vjp
def gelu_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    """Without the powers and the hyperbolic cosine that MLX's own has."""
    square = x * x
    t = mx.tanh(GELU_A * x * (1 + GELU_B * square))
    return cotangent * 0.5 * (1 + t + x * (1 - t * t) * (GELU_A * (1 + 3 * GELU_B * square)))


def heads_first(x: mx.array) -> mx.array:
    """[B, T, H, hd] <-> [B, H, T, hd], and the gradient, in the order of memory: see spread."""
    return cast(mx.array, swapped(x))


@mx.custom_function
def swapped(x: mx.array) -> mx.array:
    return mx.contiguous(x.swapaxes(1, 2))


@swapped.vjp
def swapped_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return mx.contiguous(cotangent.swapaxes(1, 2))


def turn(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """RoPE at any positions: x [B, H, T, hd]; cos, sin [B, H or more, T, hd]."""
    n, heads = x.shape[-1] // 2, x.shape[1]
    half = mx.eye(n)
    quarter = mx.concatenate([mx.concatenate([0 * half, half], 1), mx.concatenate([-half, 0 * half], 1)], 0)
    return x * mx.contiguous(cos[:, :heads]) + (x @ quarter) * mx.contiguous(sin[:, :heads])


def self_attention(
    module: SelfAttention, x: mx.array, turns: tuple[mx.array, mx.array], mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Attention without a cache; also its keys and values, [B, KV, T, hd], which a drafter reads."""
    rows, length, _ = x.shape
    dims = module.head_dim

    def heads(y: mx.array, count: int) -> mx.array:
        return y.reshape(rows, length, count, dims)

    q = heads_first(norm(module.q_norm, heads(module.q_proj(x), module.q_proj.weight.shape[0] // module.head_dim)))
    keys = heads(module.k_proj(x), module.k_proj.weight.shape[0] // module.head_dim)
    values = keys if module.is_full else heads(module.v_proj(x), module.k_proj.weight.shape[0] // module.head_dim)
    k = turn(heads_first(norm(module.k_norm, keys)), *turns)
    v = heads_first(cast(mx.array, rms_norm(values, mx.ones((dims,)), mx.array(module.eps))))
    return module.o_proj(attend(turn(q, *turns), k, v, mask)), k, v


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """q [B, H, L, hd], k, v [B, KV, S, hd], mask [B, H, L, S] to add -> [B, L, H * hd]."""
    rows, heads, length, dims = q.shape
    groups = k.shape[1]  # the query heads of a key/value head are rows of one product
    folded = q.reshape(rows, groups, -1, dims), k, v, mask.reshape(rows, groups, -1, k.shape[2])
    out, *_ = cast(tuple[mx.array, ...], attention(*folded))
    return heads_first(out.reshape(rows, heads, length, dims)).flatten(2)


@mx.custom_function
def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """q [B, KV, L, hd], k, v [B, KV, S, hd], mask [B, KV, L, S] to add -> out, and for the gradient the weights before
    they are divided by their sums, and the sums."""
    scores = q @ k.swapaxes(-1, -2) + mask
    weights = exp(scores - spread(mx.max(scores, axis=-1, keepdims=True), k.shape[2]))
    sums = row_sums(weights)
    return (weights @ v) * spread(1 / sums, v.shape[-1]), weights, sums


@attention.vjp
def attention_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    (q, k, v, mask), (out, weights, sums) = primals, outputs
    g = cotangents[0] * spread(1 / sums, v.shape[-1])
    # the sums' share goes into the product as one more column, against a column of ones
    product = mx.concatenate([g, -row_sums(g * out)], axis=-1)
    d_scores = weights * (product @ mx.concatenate([v, mx.ones((*v.shape[:-1], 1))], axis=-1).swapaxes(-1, -2))
    return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ g, mx.zeros_like(mask)


def mlp(layer: Layer, x: mx.array) -> mx.array:
    return layer.mlp.down_proj(cast(mx.array, gelu(layer.mlp.gate_proj(x))) * layer.mlp.up_proj(x))


def after_attention(layer: Layer, h: mx.array, out: mx.array) -> mx.array:
    """The rest of a layer once its attention has given `out`."""
    h = h + norm(layer.post_attention_layernorm, out)
    h = h + norm(layer.post_feedforward_layernorm, mlp(layer, norm(layer.pre_feedforward_layernorm, h)))
    return h * layer.layer_scalar


def embed(model: Model, batch: Batch) -> mx.array:
    """Tokens and media → [B, T, hidden]."""
    h = model.language_model.embed(mx.array(batch.ids))
    parts = []
    if len(batch.patches):
        parts.append(model.embed_vision(seen(model.vision_embedder, mx.array(batch.patches), mx.array(batch.places))))
    if len(batch.frames):
        parts.append(model.embed_audio(mx.array(batch.frames)))
    if not parts:
        return h
    media = mx.concatenate([mx.zeros((1, h.shape[-1])), *parts])
    soft = mx.array(batch.soft)
    return mx.where((soft > 0)[..., None], media[soft], h)


def seen(embedder: VisionEmbedder, patches: mx.array, places: mx.array) -> mx.array:
    """The embedder from its second step on: the first norm, of weights 1 and 0, is taken as the batch is made."""
    x = embedder.patch_ln2(embedder.patch_dense(patches))
    return embedder.pos_norm(x + embedder.pos_embedding[places[:, 0], 0] + embedder.pos_embedding[places[:, 1], 1])


def for_heads(x: np.ndarray | mx.array, heads: int) -> mx.array:
    """[B, L, n] -> [B, H, L, n], every head's own copy: see spread."""
    rows, length, n = x.shape
    return mx.contiguous(mx.broadcast_to(mx.array(x)[:, None], (rows, heads, length, n)))


def turns_of(model: Model, positions: mx.array) -> dict[str, tuple[mx.array, mx.array]]:
    found = {}
    for layer in model.language_model.layers:
        if layer.kind not in found:
            turns = 1 / np.array(layer.self_attn.rope.periods)
            still = layer.self_attn.head_dim // 2 - len(turns)  # of full layers RoPE knows those that turn alone
            angles = positions[..., None] * mx.array(np.pad(turns, (0, still)))  # 0: not turned
            both = mx.concatenate([angles, angles], axis=-1)
            heads = layer.self_attn.q_proj.weight.shape[0] // layer.self_attn.head_dim
            found[layer.kind] = (for_heads(mx.cos(both), heads), for_heads(mx.sin(both), heads))
    return found


def hidden_states(model: Model, batch: Batch) -> tuple[mx.array, mx.array, dict[str, tuple[mx.array, mx.array]]]:
    """The hidden states after the final norm, and those that hints are read from, both [B, T, hidden].

    Then the last keys and values of each kind of layer.
    """
    h = embed(model, batch)
    first = model.language_model.layers[0].self_attn
    heads = first.q_proj.weight.shape[0] // first.head_dim
    masks = {FULL: for_heads(batch.full, heads), SLIDING: for_heads(batch.sliding, heads)}
    turns = turns_of(model, mx.array(batch.positions))
    last, early = {}, h
    for number, layer in enumerate(model.language_model.layers, 1):
        out, k, v = self_attention(
            cast(SelfAttention, layer.self_attn), norm(layer.input_layernorm, h), turns[layer.kind], masks[layer.kind]
        )
        last[layer.kind] = (k, v)
        h = after_attention(layer, h, out)
        if number == HINT_LAYERS:
            early = norm(model.language_model.norm, h)
    return norm(model.language_model.norm, h), early, last


def learnt_logits(model: Model, hidden: mx.array, early: mx.array, batch: Batch) -> mx.array:
    """Logits where a next token is learnt, [N, vocab]: of an answer from `hidden`, of a hint from `early`."""
    late, soon = (states.flatten(0, 1)[mx.array(batch.learnt)] for states in (hidden, early))
    return model.language_model.head(mx.where(mx.array(batch.answers)[:, None], late, soon)[None])[0]


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """The surprise of each target in nats: logits [N, vocab], targets [N]."""
    return cast(mx.array, log_sum(logits)) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


@mx.custom_function
def log_sum(x: mx.array) -> mx.array:
    top = mx.max(x, axis=-1, keepdims=True)
    return (mx.log(row_sums(exp(x - spread(top, x.shape[-1])))) + top)[:, 0]


@log_sum.vjp
def log_sum_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    n = x.shape[-1]
    return exp(x - spread(output[:, None], n)) * spread(cotangent[:, None], n)


def loss(model: Model, batch: Batch) -> tuple[mx.array, mx.array]:
    """Mean cross entropy of the learnt tokens in nats, and what part of the answers' tokens is the likeliest token."""
    hidden, early, _ = hidden_states(model, batch)
    logits, targets = learnt_logits(model, hidden, early, batch), mx.array(batch.targets)
    weights = mx.array(batch.weights)
    answers = mx.array(batch.answers).astype(mx.float32)
    right = mx.sum((mx.argmax(logits, axis=-1) == targets) * answers) / mx.sum(answers)
    weights = weights / mx.sum(weights)
    return mx.sum(cross_entropy(logits, targets) * weights), mx.stop_gradient(right)
