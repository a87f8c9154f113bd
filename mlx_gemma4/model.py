"""The whole model: a prompt in, hidden states and logits out."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_gemma4.cache import PromptCache
from mlx_gemma4.config import FULL, SLIDING, GenerationConfig, ModelConfig
from mlx_gemma4.controller import Controller
from mlx_gemma4.decoder import Decoder
from mlx_gemma4.drafter import Drafter
from mlx_gemma4.embed import MultimodalProjection, VisionEmbedder
from mlx_gemma4.mask import attention_mask
from mlx_gemma4.prompt import Prompt, SoftTokens, check_vocabulary
from mlx_gemma4.sampling import Sampler, Sampling

# Tokens read at once: enough to keep the multipliers busy, few enough for activations of tens of MB.
CHUNK = 512


@dataclass
class Learnt:
    """What one request leaves for the next: no part of it changes an answer."""

    controller: Controller = field(default_factory=Controller)
    # compiled, see speculate.py; by sampling, draft length and the caches' slots
    rounds: dict[tuple[GenerationConfig, int, tuple[int, ...]], Any] = field(default_factory=dict)


class Model(nn.Module):
    """Gemma 4: text, image, audio and video in, text out. What is kept of a request lives in caches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.drafter: Drafter | None = None
        self.learnt = Learnt()
        self.language_model = Decoder(config.text, config.dtype)
        if config.vision is not None:
            self.vision_embedder = VisionEmbedder(config.vision)
            self.embed_vision = MultimodalProjection(
                config.vision.output_proj_dims, config.vision.rms_norm_eps, config.text
            )
        if config.audio is not None:
            self.embed_audio = MultimodalProjection(
                config.audio.samples_per_token, config.audio.rms_norm_eps, config.text
            )

    def logits(self, prompt: Prompt) -> mx.array:
        """Logits of every position, [1, L, vocab] float32, soft-capped, nothing suppressed.

        ValueError for an id beyond the vocabulary.
        """
        check_vocabulary(prompt, self.config)
        cache = PromptCache(self.config.text, len(prompt.token_ids))
        hidden = mx.concatenate(list(self.read(prompt, cache)), axis=1)
        return self.language_model.head(hidden)

    def draft(self, prompt: Prompt, length: int) -> list[int]:
        """The drafter's `length` greedy proposals; the prompt's last token is the newest one.

        ValueError without a drafter, if the prompt is shorter than two tokens or has an id beyond the vocabulary, or
        if nothing is to be drafted.
        """
        if self.drafter is None:
            raise ValueError("the model has no drafter; expected one, load(…, drafter=…)")
        if len(prompt) < 2:
            raise ValueError("the prompt has 1 token; expected at least 2, one before the newest")
        if length < 1:
            raise ValueError(f"the length of the draft is {length}; expected 1 or more")
        check_vocabulary(prompt, self.config)
        committed = Prompt(prompt.token_ids[:-1], prompt.media)
        cache = PromptCache(self.config.text, len(committed))
        for hidden in self.read(committed, cache):  # noqa: B007
            pass
        stores = dict(zip(self.config.text.layer_types, cache.stores, strict=True))  # the last of each kind
        masks = {kind: mx.ones((1, store.rows()[0].shape[2]), mx.bool_) for kind, store in stores.items()}
        sampler = Sampler(Sampling(temperature=0), self.config.generation, self.config.text.vocab_size)
        token, hidden, proposals = mx.array(prompt.token_ids[-1:]), hidden[:, -1:], []
        for _ in range(length):
            embedding = self.language_model.embed(token[None])
            logits, hidden = self.drafter(embedding, hidden, mx.array(len(committed) - 1), masks, stores)
            token = sampler.draw(sampler.probabilities(logits[0]), mx.random.key(0))
            proposals.append(token)
        return cast(list[int], mx.concatenate(proposals).tolist())

    def read(self, prompt: Prompt, cache: PromptCache, chunk: int = CHUNK) -> Iterator[mx.array]:
        """Read a prompt into an empty cache, chunk by chunk; yields each chunk's hidden states, [1, l, hidden].

        A chunk never ends inside an image block, whose tokens see each other; beyond that its size changes nothing.
        """
        for start, end in chunks(prompt, chunk):
            offset = mx.array(start)
            masks = self.prompt_masks(prompt, start, end)
            hidden = self.language_model(self.embed(prompt, start, end), offset, masks, cache.stores)
            cache.length = end
            mx.eval(hidden, cache.arrays())
            mx.clear_cache()
            yield hidden

    def embed(self, prompt: Prompt, start: int, end: int) -> mx.array:
        """Embeddings of token_ids[start:end], soft tokens in their places, [1, end - start, hidden]."""
        h = self.language_model.embed(mx.array(prompt.token_ids[start:end])[None])
        for run in prompt.media:
            first, last = max(run.start, start), min(run.start + len(run), end)
            if first < last:
                rows = self.soft_tokens(run, first - run.start, last - run.start)
                h[:, first - start : last - start] = rows.astype(h.dtype)
        return h

    def soft_tokens(self, run: SoftTokens, first: int, last: int) -> mx.array:
        """Rows first … last of one run, [last - first, hidden]; they are not scaled as token embeddings are."""
        values = mx.array(run.values[first:last])
        if run.positions is None:
            return self.embed_audio(values.astype(self.language_model.dtype))
        return self.embed_vision(self.vision_embedder(values, mx.array(run.positions[first:last])))

    def prompt_masks(self, prompt: Prompt, start: int, end: int) -> dict[str, mx.array]:
        """The mask of each kind of layer for the chunk start … end and the keys that its stores give."""
        window = self.config.text.sliding_window
        oldest = start - min(start, window)
        blocks = mx.array(image_blocks(prompt, start, end))
        # keys before the chunk are in no block of it, for a chunk never splits one
        key_blocks = mx.concatenate([mx.full((start - oldest,), -1, blocks.dtype), blocks])
        queries = mx.arange(start, end)
        return {
            FULL: attention_mask(queries, mx.arange(end), None),
            SLIDING: attention_mask(queries, mx.arange(oldest, end), window, blocks, key_blocks),
        }


def chunks(prompt: Prompt, size: int) -> Iterator[tuple[int, int]]:
    """Where to cut a prompt: (start, end) of at most `size` tokens, or of one whole image block if that is longer."""
    length, start = len(prompt.token_ids), 0
    blocks = [run for run in prompt.media if run.positions is not None]
    while start < length:
        end = min(start + size, length)
        for block in blocks:
            if block.start < end < block.start + len(block):
                end = block.start if block.start > start else block.start + len(block)
        yield start, end
        start = end


def image_blocks(prompt: Prompt, start: int, end: int) -> np.ndarray:
    """For token_ids[start:end] the number of its image block, -1 outside of one, [end - start] int32."""
    blocks = np.full(end - start, -1, np.int32)
    for number, run in enumerate(prompt.media):
        if run.positions is not None:
            blocks[max(run.start - start, 0) : max(run.start + len(run) - start, 0)] = number
    return blocks
