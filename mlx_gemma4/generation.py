"""From a request to a reply, piece by piece."""

import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_gemma4.cache import Cache, PromptCache, capacity_for
from mlx_gemma4.chat import request_messages
from mlx_gemma4.model import Model
from mlx_gemma4.prompt import Processor, Prompt, check_length
from mlx_gemma4.reply import Controls, Piece, Reply, ReplyParser, Stats, collect
from mlx_gemma4.sampling import Sampler, Sampling
from mlx_gemma4.speculate import State, first_state, launch, make_round

# Freed buffers that MLX may keep for reuse; unbounded, they crowd the weights out of a 16 GB machine.
BUFFER_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Reading:
    """How much of the prompt has been read."""

    done: int
    total: int


def generate(
    model: Model,
    processor: Processor,
    request: str | Sequence[dict[str, Any]] | Prompt,
    images: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system: str | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = False,
    image_budget: int | None = None,
    max_tokens: int = 1024,
    sampling: Sampling = Sampling(),
    draft_length: int | str = "auto",
) -> Reply:
    """The whole reply to a request.

    request: a string (one user turn, with `images`, `audios`, `videos` placed before it and `system` in a turn of
    its own), chat messages, or a `Prompt`. ValueError if any of it is wrong.
    """
    return collect(
        stream_generate(
            model, processor, request, images, audios, videos, system, tools, thinking, image_budget, max_tokens,
            sampling, draft_length,
        )
    )  # fmt: skip


def stream_generate(
    model: Model,
    processor: Processor,
    request: str | Sequence[dict[str, Any]] | Prompt,
    images: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system: str | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = False,
    image_budget: int | None = None,
    max_tokens: int = 1024,
    sampling: Sampling = Sampling(),
    draft_length: int | str = "auto",
) -> Iterator[Piece]:
    """The reply piece by piece; takes what `generate` takes. The request is checked when this is called."""
    started = time.perf_counter()
    prompt = make_prompt(processor, request, images, audios, videos, system, tools, thinking, image_budget)
    events = generation_events(model, processor, prompt, max_tokens, sampling, draft_length, started)
    return (event for event in events if isinstance(event, Piece))


def make_prompt(
    processor: Processor,
    request: str | Sequence[dict[str, Any]] | Prompt,
    images: Sequence[Any],
    audios: Sequence[Any],
    videos: Sequence[Any],
    system: str | None,
    tools: Sequence[dict[str, Any]] | None,
    thinking: bool,
    image_budget: int | None,
) -> Prompt:
    """The prompt of a request as `generate` takes it."""
    if isinstance(request, str):
        request = request_messages(request, images, audios, videos, system)
    elif images or audios or videos or system is not None:
        raise ValueError("images, audios, videos and system go with a request that is a string; put them in the messages")
    if isinstance(request, Prompt):
        if tools or thinking or image_budget is not None:
            raise ValueError("tools, thinking and image_budget go with messages; a Prompt is taken as it stands")
        return request
    return processor(request, tools=tools, thinking=thinking, image_budget=image_budget)


def generation_events(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    max_tokens: int,
    sampling: Sampling,
    draft_length: int | str,
    started: float,
) -> Iterator[Reading | Piece]:
    """Check the request, then give what happens: how far the prompt is read, then the pieces of the reply."""
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}; expected a whole number, 1 or more")
    if draft_length not in ("auto", 0):
        raise ValueError(f"draft_length is {draft_length!r}; expected 'auto' or 0, for drafting is not there yet")
    check_length(prompt, model.config)
    return run(model, processor, prompt, max_tokens, sampling, started)


def run(
    model: Model, processor: Processor, prompt: Prompt, max_tokens: int, sampling: Sampling, started: float
) -> Iterator[Reading | Piece]:
    config, length = model.config, len(prompt.token_ids)
    limit = min(max_tokens, config.text.max_position_embeddings - length)
    sampler = Sampler(sampling, config.generation, config.text.vocab_size)
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    parser = ReplyParser(processor.tokenizer, Controls.from_tokenizer(processor.tokenizer), prompt.token_ids)
    mx.reset_peak_memory()
    with bounded_memory():
        cache = PromptCache(config.text, capacity_for(length, limit))
        read_from = time.perf_counter()
        for hidden in model.read(prompt, cache):
            yield Reading(cache.length, length)
        state = first_state(model, sampler, prompt.token_ids, hidden[:, -1:], seed)
        count, finish_reason, first_at = 0, "length", 0.0
        for ids in decode(model, sampler, cache, state, limit):
            first_at = first_at or time.perf_counter()
            stop = next((i for i, token in enumerate(ids) if token in config.generation.eos_token_ids), len(ids))
            count += stop
            if stop < len(ids):
                finish_reason = "stop"
            if stop:
                yield Piece(*parser.feed(ids[:stop]), ids[:stop])
            if finish_reason == "stop":
                break
        ended = time.perf_counter()
    if finish_reason == "length" and parser.in_thought:
        warnings.warn(f"the {count} tokens ran out inside the thought; raise max_tokens", stacklevel=2)
    stats = Stats(
        prompt_tokens=length,
        prompt_tps=length / (first_at - read_from),
        generation_tokens=count,
        generation_tps=max(count - 1, 0) / (ended - first_at),
        time_to_first_token=first_at - started,
        peak_memory=mx.get_peak_memory(),
        rounds=count,
        drafted_tokens=0,
        accepted_tokens=0,
        acceptance_by_position=[],
        tokens_per_round=1.0,
    )
    text, thinking = parser.finish()
    yield Piece(text, thinking, [], finish_reason, parser.tool_calls, stats)


def decode(model: Model, sampler: Sampler, prompt: PromptCache, state: State, limit: int) -> Iterator[list[int]]:
    """The ids of up to `limit` tokens, one list a round; close it to stop earlier.

    The host runs one round behind: while it reads the tokens of one round, the device works on the next.
    """
    length, count = prompt.length, 1
    yield tokens_of(state["token"])
    cache = Cache(prompt, rows=1)
    round_ = make_round(model, sampler, cache.is_sliding)
    waiting: mx.array | None = None
    while count < limit:
        ahead = 0 if waiting is None else 1
        following = None
        if count + ahead < limit:
            cache.reserve(length + count - 1, length + count - 1 + ahead)
            following, state = launch(round_, state, cache)
        if waiting is not None:
            ids = tokens_of(waiting)
            count += len(ids)
            yield ids
        waiting = following


def tokens_of(array: mx.array) -> list[int]:
    """The one place where the host waits for the device."""
    return array.tolist()


@contextmanager
def bounded_memory() -> Iterator[None]:
    """While generating, weights stay wired on Metal and MLX keeps few freed buffers."""
    wired = None
    if mx.metal.is_available():
        wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    buffers = mx.set_cache_limit(BUFFER_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(buffers)
        if wired is not None:
            mx.synchronize()
            mx.set_wired_limit(wired)
