"""The whole model: a prompt in, hidden states and logits out."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_gemma4.config import FULL, ModelConfig
from mlx_gemma4.errors import shown
from mlx_gemma4.model.cache import Caches, Offset, capacity, steps
from mlx_gemma4.model.decoder import Decoder
from mlx_gemma4.model.drafter import Drafter
from mlx_gemma4.model.embed import MultimodalProjection, VisionEmbedder, media_dtype
from mlx_gemma4.model.mask import Mask, causal_mask, whole_mask
from mlx_gemma4.prompt.prompt import Prompt, SoftTokens, check_prompt, is_whole

# Tokens read at once: enough to keep the multipliers busy, few enough for activations of tens of MB.
CHUNK = 512


# MLX's threads do not live on in a fork: what is evaluated there would wait for ever. The process that has loaded.
loaded_in: int | None = None


def claim_process() -> None:
    """This process loads a model, and MLX computes in it. RuntimeError as of `check_process`."""
    global loaded_in
    check_process()
    loaded_in = os.getpid()


def check_process() -> None:
    """RuntimeError in a fork of a process that had loaded a model."""
    if loaded_in not in (None, os.getpid()):
        raise RuntimeError("this process was forked after load, and MLX cannot go on in it; expected a spawned one")


class Model(nn.Module):
    """Gemma 4: text, image, audio and video in, text out. What is kept of a request lives in caches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        claim_process()
        self.config = config
        self.drafter: Drafter | None = None
        self.group: mx.distributed.Group | None = None  # of machines that share it
        self.split: str | None = None  # how they do
        self.engine: Any = None  # what decoding keeps of this model from one request to the next
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

    def __repr__(self) -> str:
        """One line that says what it is; not nn.Module's tree of all its layers."""
        config, text = self.config, self.config.text
        bits = "" if config.quantization is None else f", {config.quantization.bits}-bit {config.quantization.mode}"
        dtype = str(self.language_model.dtype).removeprefix("mlx.core.")
        drafter = "no drafter" if self.drafter is None else f"a drafter of {len(self.drafter.layers)} layers"
        media = (["image", "video"] if config.vision else []) + (["audio"] if config.audio else [])
        size = f"{len(text.layer_types)} layers, hidden {text.hidden_size}{bits}, {dtype}"
        return f"Model({size}, {drafter}; {', '.join(['text', *media])})"

    def logits(self, prompt: Prompt) -> mx.array:
        """Logits of every position, [1, L, vocab] float32, soft-capped, nothing suppressed.

        ValueError for a prompt that is longer than the context, has an id beyond the vocabulary or wrong media.
        """
        check_prompt(prompt, self.config)
        hidden = mx.concatenate(list(self.read(prompt, self.caches(len(prompt)))), axis=1)
        return self.agreed(self.language_model.head(hidden))[0]

    def draft(self, prompt: Prompt, length: int) -> list[int]:
        """The drafter's `length` greedy proposals; the prompt's last token is the newest one.

        ValueError without a drafter, if the prompt is shorter than two tokens or none for this model, or if the length
        is no whole number from 1 to the context's.
        """
        check_prompt(prompt, self.config)
        if self.drafter is None:
            raise ValueError("the model has no drafter; expected one, load(…, drafter=…)")
        if len(prompt) < 2:
            raise ValueError("the prompt has 1 token; expected at least 2, one before the newest")
        if not is_whole(length) or not 1 <= length <= self.config.text.max_position_embeddings:
            raise ValueError(f"the length of the draft is {shown(length)}; expected a whole number, 1 or more")
        committed = Prompt(prompt.token_ids[:-1], prompt.media)
        caches = self.caches(len(committed))
        for hidden in self.read(committed, caches):  # noqa: B007
            pass
        suppressed = mx.array(self.config.generation.suppress_tokens, mx.int32)
        token, hidden, proposals = mx.array(prompt.token_ids[-1:]), hidden[:, -1:], []
        last = mx.array([len(committed) - 1])
        masks = self.masks(caches, last, 1)
        for _ in range(length):
            logits, hidden = self.drafter(self.language_model.embed(token[None]), hidden, last, masks, caches.last)
            token = mx.put_along_axis(logits[0], suppressed[None], mx.array(-mx.inf), axis=-1).argmax(axis=-1)
            proposals.append(token)
        return cast(list[int], self.agreed(mx.concatenate(proposals))[0].tolist())

    def caches(self, positions: int) -> Caches:
        """Empty ones for one request, with room for so many positions."""
        text = self.config.text
        return Caches.empty(text, self.language_model.dtype, capacity(positions, text.max_position_embeddings))

    def read(self, prompt: Prompt, caches: Caches, chunk: int = CHUNK, adapter: int = 0) -> Iterator[mx.array]:
        """Read what the caches do not hold of a prompt, chunk by chunk; yields their hidden states, [1, l, hidden].

        A chunk never ends inside an image block, whose tokens see each other; beyond that its size changes nothing.
        adapter: of those by name, from 1 on; 0: none.
        """
        check_process()
        adapters = mx.array([adapter]) if adapter else None
        for start, end in chunks(prompt, caches.length, chunk):
            masks = self.masks(caches, start, end - start, mx.array(image_blocks(prompt, start, end)))
            h = self.embed(prompt, start, end, adapters)
            hidden = self.language_model(h, start, masks, caches.layers, adapters)
            caches.length = end
            mx.eval(hidden, caches.arrays)
            mx.clear_cache()
            yield hidden

    def agreed(self, *decided: mx.array) -> Sequence[mx.array]:
        """What the last of several machines has decided, in arrays alike: rounding must not let them drift apart."""
        if self.group is None:
            return decided
        # times 0 and not zeros: what led to it exchanges too, and has to be computed everywhere
        own = mx.stack([*decided]) * int(self.group.rank() == self.group.size() - 1)
        return [*mx.distributed.all_sum(own, group=self.group)]

    def masks(self, caches: Caches, offset: Offset, length: int, blocks: mx.array | None = None) -> dict[str, Mask]:
        """What a pass of `length` positions at `offset` sees, by kind of layer. blocks [length]: of images."""
        queries = mx.arange(offset, offset + length)[None] if isinstance(offset, int) else steps(offset, length)
        masks: dict[str, Mask] = {}
        for kind, cache in caches.last.items():
            keys = cache.positions(offset, length)
            if kind == FULL and isinstance(offset, int):
                masks[kind] = causal_mask(queries, keys)
            else:
                own = self.config.text.attention[kind].window
                masks[kind] = whole_mask(queries, keys, own, None if own is None else blocks)
        return masks

    def embed(self, prompt: Prompt, start: int, end: int, adapters: mx.array | None = None) -> mx.array:
        """Embeddings of token_ids[start:end], soft tokens in their places, [1, end - start, hidden]."""
        h = self.language_model.embed(mx.array(prompt.token_ids[start:end])[None])
        for run in prompt.media:
            first, last = max(run.start, start), min(run.start + len(run), end)
            if first < last:
                rows = self.soft_tokens(run, first - run.start, last - run.start, adapters)
                if self.language_model.unit != 1:
                    rows = rows * self.language_model.unit
                h[:, first - start : last - start] = rows.astype(h.dtype)
        return h

    def soft_tokens(self, run: SoftTokens, first: int, last: int, adapters: mx.array | None = None) -> mx.array:
        """Rows first … last of one run, [last - first, hidden]; they are not scaled as token embeddings are."""
        values = mx.array(run.values[first:last])
        if run.positions is None:
            return self.embed_audio(values.astype(media_dtype(self.language_model.dtype)), adapters)
        embedded = self.vision_embedder(values, mx.array(run.positions[first:last]), adapters)
        return self.embed_vision(embedded, adapters)


def chunks(prompt: Prompt, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Where to cut a prompt from `start` on: (start, end) of at most `size` tokens, or of one whole image block if that
    is longer."""
    length = len(prompt)
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
