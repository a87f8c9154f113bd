"""The decoder: embeddings in, hidden states out."""

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
from mlx import nn

from mlx_gemma4.config import TextConfig
from mlx_gemma4.model.attention import Projections, QueryAttention, SelfAttention
from mlx_gemma4.model.cache import LayerCache, Offset
from mlx_gemma4.model.mask import Mask


@mx.compile  # for each shape: a shapeless trace is cut in two kernels
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) · up in one kernel, rounded once to their type, with the tanh form of gelu."""
    wide = gate.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1 + mx.tanh(inner)) * up).astype(gate.dtype)


class MLP(nn.Module):
    inputs: Projections  # of gate_proj and up_proj: `arrange.py`

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(*self.inputs(x)))


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

    def __call__(self, h: mx.array, offset: Offset, mask: Mask, cache: LayerCache) -> mx.array:
        h = h + self.post_attention_layernorm(self.self_attn(self.input_layernorm(h), offset, mask, cache))
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
        self, h: mx.array, offset: Offset, masks: Mapping[str, Mask], caches: Sequence[LayerCache]
    ) -> mx.array:
        """Embeddings [B, L, hidden] at positions offset… -> hidden states after the final norm, [B, L, hidden]."""
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, offset, masks[layer.kind], cache)
        return self.norm(h)

    def head(self, hidden: mx.array) -> mx.array:
        """[B, L, hidden] -> logits [B, L, vocab], float32, soft-capped."""
        logits = self.embed_tokens.as_linear(hidden) if self.is_tied else self.lm_head(hidden)
        logits = logits.astype(mx.float32)
        return logits if self.softcap is None else mx.tanh(logits / self.softcap) * self.softcap
