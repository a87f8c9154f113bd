"""The multi-token-prediction drafter: a small decoder with queries only, on the target's keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_gemma4.config import (
    FULL,
    SLIDING,
    Quantization,
    TextConfig,
    count,
    parse_quantization,
    parse_text,
    read_checked,
)
from mlx_gemma4.errors import CheckpointError, shown
from mlx_gemma4.model.attention import QueryAttention
from mlx_gemma4.model.cache import LayerCache
from mlx_gemma4.model.decoder import Layer
from mlx_gemma4.model.mask import Mask

MODEL_TYPE = "gemma4_unified_assistant"


@dataclass(frozen=True)
class DrafterConfig:
    text: TextConfig
    backbone_hidden_size: int
    quantization: Quantization | None
    quantization_overrides: dict[str, Quantization]


def read_drafter_config(folder: Path) -> DrafterConfig:
    """Read a drafter folder's config.json; CheckpointError if it is another kind of model."""
    return read_checked(folder / "config.json", parse_drafter)


def parse_drafter(raw: dict[str, Any]) -> DrafterConfig:
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"model_type is {shown(raw.get('model_type'))}; expected a drafter, {MODEL_TYPE!r}")
    if raw.get("use_ordered_embeddings"):
        raise CheckpointError("use_ordered_embeddings is True; supported is False")
    text = raw["text_config"]
    shared, layers = text["num_kv_shared_layers"], text["num_hidden_layers"]
    if shared not in (0, layers):
        raise CheckpointError(f"num_kv_shared_layers is {shown(shared)}; supported is all {shown(layers)} layers")
    quantization, overrides = parse_quantization(raw.get("quantization") or raw.get("quantization_config"))
    return DrafterConfig(
        text=parse_text(text | {"num_kv_shared_layers": 0}),
        backbone_hidden_size=count(raw, "backbone_hidden_size"),
        quantization=quantization,
        quantization_overrides=overrides,
    )


def check_fit(drafter: DrafterConfig, target: TextConfig) -> None:
    """CheckpointError if a drafter was not made for this target."""
    for name, own, expected in (
        ("backbone_hidden_size", drafter.backbone_hidden_size, target.hidden_size),
        ("vocab_size", drafter.text.vocab_size, target.vocab_size),
        *((f"shape of {kind}", drafter.text.attention[kind], target.attention[kind]) for kind in (SLIDING, FULL)),
    ):
        if own != expected:
            raise CheckpointError(
                f"the drafter does not fit the model: its {name} is {own}; expected {expected}, or no drafter"
            )


class Drafter(nn.Module):
    """Named as the assistant checkpoint, without its leading `model.`; the embedding is only the head."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        text = config.text
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.pre_projection = nn.Linear(2 * config.backbone_hidden_size, text.hidden_size, bias=False)
        self.layers = [Layer(text, kind, QueryAttention(text, kind)) for kind in text.layer_types]
        self.norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        # powers of two, other than 1 in float16 alone: as the target's, and what the target's embedding is to be times
        self.unit, self.grow, self.joined = 1.0, 1.0, 1.0
        self.post_projection = nn.Linear(text.hidden_size, config.backbone_hidden_size, bias=False)

    def __call__(
        self, embedding: mx.array, hidden: mx.array, last: mx.array, masks: Mapping[str, Mask],
        caches: Mapping[str, LayerCache],
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """Propose one token more.

        embedding [1, 1, D]: the target's, scaled, of the newest token or the last proposal. hidden [1, 1, D]: the
        target's at position `last`, the last committed one, after its final norm; then what this returned.
        masks and caches by kind of layer: the target's last layer of that kind, committed positions only.
        Returns logits [1, 1, vocab], float32, and the hidden of the next proposal.
        """
        if self.joined != 1:
            embedding = (embedding.astype(mx.float32) * self.joined).astype(hidden.dtype)
        h = self.pre_projection(mx.concatenate([embedding, hidden], axis=-1))
        if (factor := self.grow * self.unit) != 1:
            h = (h.astype(mx.float32) * factor).astype(h.dtype)
        for layer in self.layers:
            # transformers counts one position more; vLLM, Ollama and mlx-vlm stay at that of the hidden, as here
            h = layer(h, last, masks[layer.kind], caches[layer.kind])
        h = self.norm(h)
        logits = self.embed_tokens.as_linear(h).astype(mx.float32)
        return logits if self.grow == 1 else logits * self.grow, self.post_projection(h)
