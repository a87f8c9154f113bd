"""Attention: the formulas, and the layers' projections around them."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_gemma4.config import FULL, AttentionConfig, TextConfig
from mlx_gemma4.model.cache import ROUND, Entry, LayerCache, Offset, Packed, slots_of
from mlx_gemma4.model.mask import Mask
from mlx_gemma4.model.matrix import are_alike, join, product

# Scores of one pass over the keys: queries are split so that they stay below it at any length. MLX allocates a few
# operations ahead, so about six times as much is alive.
MAX_SCORE_BYTES = 32 * 2**20


def attend(q: mx.array, entries: Sequence[Entry], mask: Mask, turned: int | None) -> mx.array:
    """softmax(q kᵀ) v with a scale of 1: queries and keys are normed. q [B, H, L, hd] -> [B, H, L, hd].

    turned: of a full layer, how many dimensions RoPE turns; None in a sliding one.
    """
    one_pass = sliding_attention if turned is None else partial(full_attention, turned=turned)
    batch, heads, length, _ = q.shape
    # a round is one pass, or it would read the keys twice
    rows = max(ROUND, MAX_SCORE_BYTES // (batch * heads * slots_of(entries[0]) * q.dtype.size))
    if length <= rows:
        return one_pass(q, entries, mask(0, length))
    parts: list[mx.array] = []
    for first in range(0, length, rows):
        last = min(first + rows, length)
        part = q[:, :, first:last]
        if parts:  # one pass after the other, or all their scores would be alive at once
            part = mx.depends(part, parts[-1])
        parts.append(one_pass(part, entries, mask(first, last)))
    return mx.concatenate(parts, axis=2)


def sliding_attention(q: mx.array, entries: Sequence[Entry], mask: mx.array) -> mx.array:
    """entries: keys and values, [B, KV, S, hd]; mask [B or 1, L, S]."""
    k, v = cast(Sequence[mx.array], entries)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask[:, None])


def full_attention(q: mx.array, entries: Sequence[Entry], mask: mx.array, turned: int) -> mx.array:
    """entries as `FullCache` keeps them; q's and the result's dimensions in the order of `arrange.py`, `turned` first.

    Behind these a key is its value, for the weight of its norm lies in q's. The query heads of one key/value head are
    rows of one product, for MLX has no fused kernel for heads as wide as these.
    """
    keys, values = entries
    batch, heads, length, head_dim = q.shape
    groups = (keys.weight if isinstance(keys, Packed) else keys).shape[1]
    q = q.reshape(batch, groups, -1, head_dim)  # [B, H, L, hd] -> [B, KV, H / KV * L, hd]
    scores = times_keys(q, keys).reshape(batch, groups, -1, length, slots_of(keys))
    scores = mx.where(mask[:, None, None], scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True).flatten(2, 3)
    # of the keys' product all, and then a part: of the keys a part, they would be copied on a CPU or if they are packed
    out = mx.concatenate([times_values(weights, values), times_values(weights, keys)[..., turned:]], axis=-1)
    return out.reshape(batch, heads, length, head_dim)


def times_keys(q: mx.array, keys: Entry) -> mx.array:
    """q kᵀ: q [B, KV, R, dims], keys [B, KV, S, dims] -> [B, KV, R, S]."""
    if isinstance(keys, Packed):
        return mx.quantized_matmul(q, *keys[:3], transpose=True, group_size=keys.group_size, bits=keys.bits)
    return q @ keys.swapaxes(-1, -2)


def times_values(weights: mx.array, values: Entry) -> mx.array:
    """weights [B, KV, R, S], values [B, KV, S, dims] -> [B, KV, R, dims]."""
    if isinstance(values, Packed):
        return mx.quantized_matmul(
            weights, *values[:3], transpose=False, group_size=values.group_size, bits=values.bits
        )
    return weights @ values


class RoPE:
    """Rotary positions: of the last axis the first `dims` turn, paired over their halves."""

    def __init__(self, config: AttentionConfig):
        self.dims = config.head_dim
        if config.window is None:  # what never turns has been put behind
            self.dims = config.rotated_dims
        turning = mx.arange(0, config.rotated_dims, 2, dtype=mx.float32) / config.head_dim
        still = mx.full(((self.dims - config.rotated_dims) // 2,), mx.inf)
        self.periods = mx.concatenate([config.rope_theta**turning, still])  # infinite: never turns
        # evaluated, or every trace would compute them anew, and another thread could not
        mx.eval(self.periods)

    def __call__(self, x: mx.array, offset: Offset) -> mx.array:
        """x [B, H, L, hd], whose first row is at position `offset`."""
        return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self.periods)


class Projections(nn.Module):
    """Matrices that are multiplied by the same input, those that are alike joined to one."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        groups: list[list[nn.Module]] = []
        for module in modules:
            if groups and are_alike(groups[-1][0], module):
                groups[-1].append(module)
            else:
                groups.append([module])
        # of each joined matrix but the last, where the rows of those that it is made of end
        self._ends = tuple(
            [int(end) for end in np.cumsum([len(module.weight) for module in group[:-1]])] for group in groups
        )
        self.joined = [join(group) for group in groups]

    def __call__(self, x: mx.array, adapters: mx.array | None = None) -> list[mx.array]:
        """[B, L, D] -> what each matrix gives, [B, L, its rows]."""
        found: list[mx.array] = []
        for module, ends in zip(self.joined, self._ends, strict=True):
            y = product(module, x, adapters)
            found += mx.split(y, ends, axis=-1) if ends else [y]
        return found

    def whole(self, x: mx.array, adapters: mx.array | None = None) -> mx.array:
        """The same side by side, [B, L, all rows]; nothing moves if all matrices are joined."""
        found = [product(module, x, adapters) for module in self.joined]
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)


class QueryAttention(nn.Module):
    """Attention to keys and values that are there already: all that a drafter's layer has."""

    def __init__(self, text: TextConfig, kind: str):
        super().__init__()
        config = text.attention[kind]
        self.head_dim = config.head_dim
        self.eps = text.rms_norm_eps
        self.is_full = kind == FULL
        self.q_proj = nn.Linear(text.hidden_size, text.num_attention_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(text.num_attention_heads * self.head_dim, text.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, text.rms_norm_eps)
        self.rope = RoPE(config)
        self.turned_dims = config.rotated_dims
        self._order: mx.array | None = None  # of the result's dimensions, where o_proj could not be put in order

    def heads(self, y: mx.array) -> mx.array:
        """[B, L, heads · hd] -> [B, L, heads, hd]."""
        return mx.unflatten(y, -1, (-1, self.head_dim))

    def queries(self, y: mx.array, offset: Offset) -> mx.array:
        """What q_proj gives -> [B, H, L, hd]."""
        return self.rope(self.q_norm(self.heads(y)).swapaxes(1, 2), offset)

    def __call__(
        self, x: mx.array, offset: Offset, mask: Mask, cache: LayerCache, adapters: mx.array | None = None
    ) -> mx.array:
        return self.output(self.queries(product(self.q_proj, x, adapters), offset), cache.entries, mask, adapters)

    def output(self, q: mx.array, entries: Sequence[Entry], mask: Mask, adapters: mx.array | None = None) -> mx.array:
        turned = self.turned_dims if self.is_full else None
        out = attend(q, entries, mask, turned).swapaxes(1, 2)  # [B, H, L, hd] -> [B, L, H, hd]
        if self._order is not None:
            out = out[..., self._order]
        return product(self.o_proj, out.flatten(2), adapters)


class SelfAttention(QueryAttention):
    """Attention to its own keys and values, which it adds to the cache.

    Values are normed without a weight; those of full layers are the keys before their own norm.
    """

    inputs: Projections  # of q_proj, k_proj and v_proj: `arrange.py`

    def __init__(self, text: TextConfig, kind: str):
        super().__init__(text, kind)
        rows = text.attention[kind].num_key_value_heads * self.head_dim
        self.k_proj = nn.Linear(text.hidden_size, rows, bias=False)
        if not self.is_full:  # full layers take their values from k_proj
            self.v_proj = nn.Linear(text.hidden_size, rows, bias=False)
        self.k_norm = nn.RMSNorm(self.head_dim, text.rms_norm_eps)
        self.own_heads: slice | None = None  # of several machines: of what the cache holds, what this one attends to

    def __call__(
        self, x: mx.array, offset: Offset, mask: Mask, cache: LayerCache, adapters: mx.array | None = None
    ) -> mx.array:
        q, k, *v = self.inputs(x, adapters)
        k = self.heads(k)
        values = mx.fast.rms_norm(self.heads(*v) if v else k, None, self.eps).swapaxes(1, 2)  # [B, KV, L, hd]
        keys = self.rope(self.k_norm(k).swapaxes(1, 2), offset)
        entries = (keys, values[..., : self.turned_dims] if self.is_full else values)
        seen = cache.update(entries, offset)
        if self.own_heads is not None:
            seen = tuple(cast(mx.array, entry)[:, self.own_heads] for entry in seen)
        return self.output(self.queries(q, offset), seen, mask, adapters)
