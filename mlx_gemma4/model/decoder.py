"""The decoder: embeddings in, hidden states out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from mlx import nn

from mlx_gemma4.config import TextConfig
from mlx_gemma4.model.attention import Projections, QueryAttention, SelfAttention
from mlx_gemma4.model.cache import LayerCache, Offset
from mlx_gemma4.model.mask import Mask
from mlx_gemma4.model.matrix import product

STEEP = 2 * math.sqrt(2 / math.pi)  # of gelu's sigmoid


@mx.compile  # for each shape: a shapeless trace is cut in two kernels
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) · up in one kernel, rounded once to their type, with the tanh form of gelu.

    (1 + tanh x) / 2 is sigmoid 2x, whose exponential takes a CPU half as long as a tanh.
    """
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide * (STEEP + STEEP * 0.044715 * mx.square(wide))) * up).astype(gate.dtype)


@partial(mx.compile, shapeless=True)
def ranged_geglu(gate: mx.array, normed_gate: mx.array, up: mx.array, grow: mx.array, factor: mx.array) -> mx.array:
    """The same, times `factor`, of a gate that is to be times `grow` to be itself, and both once more, normed.

    Written so that it is one kernel: one holds no formula deeper than eleven operations.
    """
    wide = gate.astype(mx.float32) * grow
    open_ = mx.sigmoid(wide * (STEEP + STEEP * 0.044715 * mx.square(wide)))
    return (open_ * (normed_gate * (up * factor))).astype(gate.dtype)


@dataclass(frozen=True)
class Ranges:
    """What keeps an MLP's product within float16: `float16.py`."""

    floor: float  # gate and up are divided by √(the mean of both their squares + floor)
    back: float  # what products are times to be themselves again, with the square of that root
    # One number each, as many times as there are columns: a scalar would become a part of the kernel, which would be
    # another in each layer
    weight: mx.array  # [2 · intermediate], what they are then times
    gate: mx.array  # [intermediate]
    product: mx.array  # [intermediate]


class MLP(nn.Module):
    inputs: Projections  # of gate_proj and up_proj: `arrange.py`

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.ranges: Ranges | None = None  # in float16

    def __call__(self, x: mx.array, adapters: mx.array | None = None) -> mx.array:
        if self.ranges is None:
            return product(self.down_proj, geglu(*self.inputs(x, adapters)), adapters)
        return self.ranged(self.ranges, self.inputs.whole(x, adapters), adapters)

    def ranged(self, own: Ranges, both: mx.array, adapters: mx.array | None) -> mx.array:
        """both: gate and up side by side, [B, L, 2 · intermediate]."""
        gate, _ = mx.split(both, 2, axis=-1)
        normed_gate, up = mx.split(mx.fast.rms_norm(both, own.weight, own.floor), 2, axis=-1)
        return product(self.down_proj, ranged_geglu(gate, normed_gate, up, own.gate, own.product), adapters)


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

    def __call__(
        self, h: mx.array, offset: Offset, mask: Mask, cache: LayerCache, adapters: mx.array | None = None
    ) -> mx.array:
        h = h + self.post_attention_layernorm(self.self_attn(self.input_layernorm(h), offset, mask, cache, adapters))
        h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h), adapters))
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
        # powers of two, other than 1 in float16 alone: what the residual stream is times, and what the head's are to be
        self.unit, self.grow = 1.0, 1.0
        self.is_tied = config.tie_word_embeddings
        if not self.is_tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, token_ids: mx.array) -> mx.array:
        """[B, L] ids -> [B, L, hidden], times √hidden in the embedding's own type: 62.0 in bf16, 61.97 in float32."""
        rows = self.embed_tokens(token_ids).astype(self.dtype)
        if self.unit == 1:
            return rows * mx.array(rows.shape[-1] ** 0.5, self.dtype)
        return (rows.astype(mx.float32) * (rows.shape[-1] ** 0.5 * self.unit)).astype(self.dtype)

    def __call__(
        self, h: mx.array, offset: Offset, masks: Mapping[str, Mask], caches: Sequence[LayerCache],
        adapters: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """Embeddings [B, L, hidden] at positions offset… -> hidden states after the final norm, [B, L, hidden].

        adapters [B]: of those by name, which one each row has, from 1 on, 0 for none; None: no row has any.
        """
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, offset, masks[layer.kind], cache, adapters)
        return self.norm(h)

    def scores(self, hidden: mx.array, adapters: mx.array | None = None) -> mx.array:
        """[B, L, hidden] -> [B, L, vocab] float32, before the soft cap."""
        scores = self.embed_tokens.as_linear(hidden) if self.is_tied else product(self.lm_head, hidden, adapters)
        scores = scores.astype(mx.float32)
        return scores if self.grow == 1 else scores * self.grow

    def head(self, hidden: mx.array, adapters: mx.array | None = None) -> mx.array:
        """[B, L, hidden] -> logits [B, L, vocab], float32, soft-capped."""
        scores = self.scores(hidden, adapters)
        return scores if self.softcap is None else mx.tanh(scores / self.softcap) * self.softcap
