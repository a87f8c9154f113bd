"""The decoder: embeddings in, hidden states out."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import mlx.core as mx
from mlx import nn

from mlx_gemma4.cache import Store
from mlx_gemma4.config import FULL, AttentionConfig, TextConfig

# Scores of one pass over the keys: queries are split so that they stay below it at any length. MLX allocates a few
# operations ahead, so about six times as much is alive.
MAX_SCORE_BYTES = 32 * 2**20


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array, fold: bool) -> mx.array:
    """softmax(q kᵀ) v with a scale of 1: queries and keys are normed.

    q [B, H, L, hd]; k, v [B, KV, S, hd]; mask [L, S] bool -> [B, H, L, hd]. With `fold`, the query heads of one
    key/value head become rows of one matrix product: for head sizes that MLX has no fused kernel for.
    """
    heads, length, slots = q.shape[1], q.shape[2], k.shape[2]
    one_pass = folded_attention if fold else fused_attention
    rows = max(1, MAX_SCORE_BYTES // (heads * slots * q.dtype.size))
    if length <= rows:
        return one_pass(q, k, v, mask)
    parts: list[mx.array] = []
    for i in range(0, length, rows):
        part = q[:, :, i : i + rows]
        if parts:  # one pass after the other, or all their scores would be alive at once
            part = mx.depends(part, parts[-1])
        parts.append(one_pass(part, k, v, mask[i : i + rows]))
    return mx.concatenate(parts, axis=2)


def fused_attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)


def folded_attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    batch, heads, length, head_dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    q = q.reshape(batch, groups, -1, head_dim)  # [B, H, L, hd] -> [B, KV, H / KV * L, hd]
    scores = (q @ k.swapaxes(-1, -2)).reshape(batch, groups, -1, length, slots)
    scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(batch, groups, -1, slots)
    return (weights @ v).reshape(batch, heads, length, head_dim)


class RoPE:
    """Rotary positions; of `head_dim` the first `rotated_dims` turn, paired over the halves of the whole head."""

    def __init__(self, config: AttentionConfig):
        self.dims = config.head_dim
        turning = mx.arange(0, config.rotated_dims, 2, dtype=mx.float32) / config.head_dim
        still = mx.full(((config.head_dim - config.rotated_dims) // 2,), mx.inf)
        self.periods = mx.concatenate([config.rope_theta**turning, still])  # infinite: never turns
        mx.eval(self.periods)  # what is left to compute can be computed in this thread alone

    def __call__(self, x: mx.array, offset: mx.array) -> mx.array:
        """x [B, H, L, hd], whose first row is at position `offset`."""
        return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self.periods)


class QueryAttention(nn.Module):
    """Attention to keys and values that are there already: all that a drafter's layer has."""

    def __init__(self, text: TextConfig, kind: str):
        super().__init__()
        config = text.attention[kind]
        self.heads, self.head_dim = text.num_attention_heads, config.head_dim
        self.eps = text.rms_norm_eps
        self.is_full = kind == FULL
        self.q_proj = nn.Linear(text.hidden_size, self.heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, text.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, text.rms_norm_eps)
        self.rope = RoPE(config)

    def __call__(self, x: mx.array, offset: mx.array, mask: mx.array, store: Store) -> mx.array:
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.heads, self.head_dim)
        q = self.rope(self.q_norm(q).swapaxes(1, 2), offset)  # [B, L, H, hd] -> [B, H, L, hd]
        return self.output(q, *store.rows(), mask)

    def output(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
        out = attend(q, k, v, mask, fold=self.is_full).swapaxes(1, 2)  # [B, H, L, hd] -> [B, L, H, hd]
        return self.o_proj(out.flatten(2))


class SelfAttention(QueryAttention):
    """Attention to its own keys and values, which it adds to the store.

    Queries, keys and values go through one norm and one rotation: values are normed without a weight, and those of
    full layers are the keys before theirs.
    """

    def __init__(self, text: TextConfig, kind: str):
        super().__init__(text, kind)
        self.kv_heads = text.attention[kind].num_key_value_heads
        self.k_proj = nn.Linear(text.hidden_size, self.kv_heads * self.head_dim, bias=False)
        if not self.is_full:  # full layers take their values from k_proj
            self.v_proj = nn.Linear(text.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.k_norm = nn.RMSNorm(self.head_dim, text.rms_norm_eps)

    def __call__(self, x: mx.array, offset: mx.array, mask: mx.array, store: Store) -> mx.array:
        parts = [self.q_proj(x), self.k_proj(x)] + ([] if self.is_full else [self.v_proj(x)])
        rows = mx.unflatten(mx.concatenate(parts, axis=-1), -1, (-1, self.head_dim))  # [B, L, heads, hd]
        # rounded to the cache's type only after the weight, as a norm with weight does
        normed = mx.fast.rms_norm(rows.astype(mx.float32), None, self.eps).swapaxes(1, 2)  # [B, heads, L, hd]
        v = normed[:, -self.kv_heads :].astype(x.dtype)
        weighted = (normed[:, : self.heads + self.kv_heads] * self.norm_weights()).astype(x.dtype)
        turned = self.rope(weighted, offset)
        k, v = store.update(turned[:, self.heads :], v)
        return self.output(turned[:, : self.heads], k, v, mask)

    def norm_weights(self) -> mx.array:
        """The weight of each query and key head's norm, [heads, 1, head_dim]."""
        q = mx.broadcast_to(self.q_norm.weight, (self.heads, 1, self.head_dim))
        k = mx.broadcast_to(self.k_norm.weight, (self.kv_heads, 1, self.head_dim))
        return mx.concatenate([q, k])


@partial(mx.compile, shapeless=True)
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) · up in one kernel, rounded once to their type, with the tanh form of gelu."""
    wide = gate.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1 + mx.tanh(inner)) * up).astype(gate.dtype)


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, text: TextConfig, kind: str, attention: QueryAttention):
        super().__init__()
        self.kind = kind
        self.self_attn = attention
        self.mlp = MLP(text.hidden_size, text.intermediate_size)
        self.input_layernorm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.post_feedforward_layernorm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.layer_scalar = mx.ones((1,))

    def __call__(self, h: mx.array, offset: mx.array, mask: mx.array, store: Store) -> mx.array:
        h = h + self.post_attention_layernorm(self.self_attn(self.input_layernorm(h), offset, mask, store))
        h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        return h * self.layer_scalar


class Decoder(nn.Module):
    """Named as the checkpoint's `language_model`; the embedding is also the head, unless there is one.

    dtype: of hidden states and caches, whatever the tables are quantized to.
    """

    def __init__(self, config: TextConfig, dtype: mx.Dtype):
        super().__init__()
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, kind, SelfAttention(config, kind)) for kind in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.softcap = config.final_logit_softcapping
        self.is_tied = config.tie_word_embeddings
        if not self.is_tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, token_ids: mx.array) -> mx.array:
        """[B, L] ids -> [B, L, hidden], times √hidden in the embedding's own type: 62.0 in bf16, 61.97 in float32."""
        rows = self.embed_tokens(token_ids).astype(self.dtype)
        return rows * mx.array(rows.shape[-1] ** 0.5, self.dtype)

    def __call__(
        self, h: mx.array, offset: mx.array, masks: Mapping[str, mx.array], stores: Sequence[Store]
    ) -> mx.array:
        """Embeddings [B, L, hidden] at positions offset… -> hidden states after the final norm, [B, L, hidden]."""
        for layer, store in zip(self.layers, stores, strict=True):
            h = layer(h, offset, masks[layer.kind], store)
        return self.norm(h)

    def head(self, hidden: mx.array) -> mx.array:
        """[B, L, hidden] -> logits [B, L, vocab], float32, soft-capped."""
        logits = self.embed_tokens.as_linear(hidden) if self.is_tied else self.lm_head(hidden)
        logits = logits.astype(mx.float32)
        return logits if self.softcap is None else mx.tanh(logits / self.softcap) * self.softcap
