"""Conversations at random, and what a fresh reading says of each of their prompts."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from rounds import GREEDY
from toy_checkpoint import Shape, media_ids

from mlx_gemma4 import Prompt, generate
from mlx_gemma4.config import FULL
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.reading import opened
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import SoftTokens

Loaded = tuple[Model, Processor]

# a window that pages do not divide, and entries that can be quantized
PAGED = Shape(hidden=32, mlp=48, heads=2, kv_heads=1, head_dim=16, global_head_dim=128, window=200, context=8192)


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(110, 500, count).tolist()


def picture(shape: Shape, seed: int, start: int, count: int, width: int) -> SoftTokens:
    """An image of `count` soft tokens, `width` of them side by side; the seed is its content."""
    values = np.random.default_rng(seed).integers(0, 255, (count, 48 * 48 * 3)).astype(np.uint8)
    places = np.arange(count)
    return SoftTokens("image", start, values, np.stack([places % width, places // width], axis=1).astype(np.int32))


def with_picture(shape: Shape, ids: list[int], image: SoftTokens, rest: list[int]) -> Prompt:
    token = media_ids(shape)["<|image|>"]
    return Prompt([*ids, *[token] * len(image), *rest], (image,))


def quantizing(model: Model, bits: int | None) -> None:
    """As load(…, kv_bits=bits) sets it."""
    config = model.config
    own = config.text.attention | {FULL: replace(config.text.attention[FULL], kv_bits=bits)}
    model.config = replace(config, text=replace(config.text, attention=own))


def stored_logits(loaded: Loaded, store: PromptStore, prompt: Prompt, scope: str = "") -> tuple[mx.array, int]:
    """Logits [V] behind a prompt that is read with a store, and how many of its positions were not read."""
    model, processor = loaded
    with opened(store, model, processor, prompt, 8, 0, scope) as reading:
        cached, run = reading.caches.length, 0
        for hidden in model.read(prompt, reading.caches, reading.chunk):
            reading.keep()
            run += hidden.shape[1]
        logits = model.language_model.head(hidden[:, -1:])[0, 0]
        mx.eval(logits)
    assert cached + run == len(prompt)
    return logits, cached


def law_of(model: Model, prompt: Prompt) -> np.ndarray:
    """[L, V]: logarithms of how likely what follows each token is."""
    logits = np.array(model.logits(prompt))[0].astype(np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))


def logprobs_of(model: Model, prompt: Prompt) -> np.ndarray:
    """[L - 1]: of the prompt's own tokens but the first."""
    ids = np.array(prompt.token_ids[1:])
    return np.take_along_axis(law_of(model, prompt)[:-1], ids[:, None], axis=1)[:, 0]


def difference(found: mx.array, expected: mx.array) -> float:
    """The largest, as a part of the largest logit."""
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


def check_reply(loaded: Loaded, store: PromptStore, prompt: Prompt, tokens: int = 6, **options: Any) -> list[int]:
    """Ask with a store: every token of the reply is what a fresh reading would choose, but for rounding."""
    model = loaded[0]
    reply = generate(*loaded, prompt, max_tokens=tokens, sampling=GREEDY, store=store, **options)
    assert 0 <= reply.stats.cached_tokens < len(prompt)
    logits = model.logits(Prompt([*prompt.token_ids, *reply.token_ids], prompt.media))[0, len(prompt) - 1 :]
    logits[:, mx.array(model.config.generation.suppress_tokens)] = -mx.inf
    rows = logits[: len(reply.token_ids)]
    chosen = mx.take_along_axis(rows, mx.array(reply.token_ids)[:, None], axis=1)[:, 0] if reply.token_ids else rows
    if reply.token_ids:
        assert ((rows.max(axis=1) - chosen) / rows.max()).max().item() < tolerance(model)
    return reply.token_ids


def tolerance(model: Model) -> float:
    return 1e-4 if model.config.text.attention[FULL].kv_bits is None else 5e-4
