"""From a request to a reply, piece by piece."""

import math
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from threading import Lock, get_ident
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.decoding.batch import Batch, Given, Seat, tokens_of
from mlx_gemma4.decoding.round import NOT_FINITE, State, first_state
from mlx_gemma4.decoding.sampling import Sampler, Sampling, told
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.reading import opened
from mlx_gemma4.engine.request import Asked, Options, Request
from mlx_gemma4.engine.row import Row
from mlx_gemma4.errors import a
from mlx_gemma4.model.model import Model, check_process
from mlx_gemma4.planner import Prediction, check_memory, predict
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt
from mlx_gemma4.reply.reply import TOOL_CALL_OPEN, Piece, Reply, collect
from mlx_gemma4.weights.load import footprint_of
from mlx_gemma4.weights.peers import hear, leads, settle, tell

# Freed buffers that MLX may keep for reuse; unbounded, they crowd the weights out of a 16 GB machine.
BUFFER_CACHE_BYTES = 512 * 2**20
SCORED = 32  # positions whose logits are held at once: 34 MB for 262,144 tokens, and as much for their order


@dataclass(frozen=True)
class Reading:
    """How much of the prompt has been read."""

    done: int
    total: int


Events = Generator[Reading | Piece, None, None]


def generate(
    model: Model,
    processor: Processor,
    request: str | list[dict[str, Any]] | Prompt,
    images: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    thinking: bool = False,
    image_budget: int | None = None,
    max_tokens: int = 1024,
    sampling: Sampling = Sampling(),
    draft_length: int | str = "auto",
    *,
    store: PromptStore | None = None,
    preserve_thinking: bool = False,
    repetition_detection: str | Mapping[str, int] = "auto",
    stop: str | Sequence[str] = (),
    thinking_budget: int | None = None,
    continue_final_message: bool = False,
    logprobs: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    response_format: Any = None,
    tool_choice: str = "auto",
    parallel_tool_calls: bool = True,
    adapter: str | None = None,
) -> Reply:
    """The whole reply to a request.

    request: a string (one user turn, with `images`, `audios`, `videos` placed before it and `system` in a turn of
    its own), chat messages, or a `Prompt`. store: where what is read is kept, and found again. repetition_detection:
    "auto", "off", or a dict with max_pattern_size, min_pattern_size and min_count, as vLLM has it: a reply that does
    nothing but repeat a block ends, with the finish_reason "repetition". response_format: what the answer is held to,
    "json", a JSON schema, or a dict with the type regex, lark, json_schema or json_object. tool_choice: "auto", "none",
    "required" or a tool's name. parallel_tool_calls False: one call at most. stop: texts before the first of which the
    answer ends. logprobs: how many of the likeliest tokens are told at each place, from 0, the chosen one alone, to 20,
    by the model's own law; None: nothing. logit_bias: what is added to the logits of token ids. thinking_budget: tokens
    of a thought, which then ends with its line, or soon; 0: it does not think. continue_final_message: the last message
    is the assistant's, and the reply is what follows in it. adapter: one of the model's, by name; None: none of them.
    ValueError if any of it is wrong, MemoryError if this machine cannot hold the model and the prompt.
    """
    return collect(
        stream_generate(
            model, processor, request, images, audios, videos, system, tools, thinking, image_budget, max_tokens,
            sampling, draft_length, store=store, preserve_thinking=preserve_thinking,
            repetition_detection=repetition_detection, stop=stop, thinking_budget=thinking_budget,
            continue_final_message=continue_final_message, logprobs=logprobs, logit_bias=logit_bias,
            response_format=response_format, tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls,
            adapter=adapter,
        )
    )  # fmt: skip


def stream_generate(
    model: Model,
    processor: Processor,
    request: str | list[dict[str, Any]] | Prompt,
    images: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    thinking: bool = False,
    image_budget: int | None = None,
    max_tokens: int = 1024,
    sampling: Sampling = Sampling(),
    draft_length: int | str = "auto",
    *,
    store: PromptStore | None = None,
    preserve_thinking: bool = False,
    repetition_detection: str | Mapping[str, int] = "auto",
    stop: str | Sequence[str] = (),
    thinking_budget: int | None = None,
    continue_final_message: bool = False,
    logprobs: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    response_format: Any = None,
    tool_choice: str = "auto",
    parallel_tool_calls: bool = True,
    adapter: str | None = None,
) -> Iterator[Piece]:
    """The reply piece by piece; takes what `generate` takes. Request and memory are checked when this is called."""
    check_given(model, processor, store)
    options = Options(
        max_tokens=max_tokens, sampling=sampling, draft_length=draft_length, repetition_detection=repetition_detection,
        stop=stop, thinking_budget=thinking_budget, logprobs=logprobs, logit_bias=logit_bias,
        response_format=response_format, tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls,
        adapter=adapter,
    )  # fmt: skip
    request_ = Request(
        content=request, images=images, audios=audios, videos=videos, system=system, tools=tools,
        thinking=options.thinks(thinking), image_budget=image_budget, preserve_thinking=preserve_thinking,
        continue_final_message=continue_final_message,
    )  # fmt: skip
    prompt, prepared = request_.timed_prompt(processor)
    events = generation_events(model, processor, prompt, options, prepared, store)
    check_memory(footprint_of(model), len(prompt), options.max_tokens)
    return (event for event in events if isinstance(event, Piece))


def check_given(model: Any, processor: Any, store: Any) -> None:
    """ValueError for what `load` did not return, and for what is no store."""
    if not isinstance(model, Model):
        raise ValueError(f"model is {a(model)}; expected what load returns")
    if not isinstance(processor, Processor):
        raise ValueError(f"processor is {a(processor)}; expected what load returns beside the model")
    if store is not None and not isinstance(store, PromptStore):
        raise ValueError(f"store is {a(store)}; expected a PromptStore, or None")


def generation_events(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    options: Options,
    prepared: float,
    store: PromptStore | None = None,
) -> Events:
    """Check the request against the model, then give what happens: how far the prompt is read, then the pieces.

    The model's weights are not touched before the first of these is asked for. prepared: seconds that making the
    prompt took, which count for the time to first token.
    """
    check_process()
    asked = Asked(model, processor, prompt, options, prepared)
    return of_one_thread(led_events(model, prompt, options, run(model, processor, asked, store)))


def of_one_thread(events: Events) -> Events:
    """RuntimeError where another thread asks for the next: MLX computes in streams of each thread's own."""
    thread = get_ident()
    with closing(events):
        for event in events:
            yield event
            if get_ident() != thread:
                raise RuntimeError(
                    "a stream is read on by another thread; expected the one that began it, or Engine's streams"
                )


def led_events(model: Model, prompt: Prompt, options: Options, events: Events) -> Events:
    """For each of them the machines that follow, if any do, take a step too; they leave when these are left."""
    if not leads(model.group):  # which is known once the weights are there
        yield from events
        return
    tell((prompt, options))
    with closing(events):
        try:
            while True:
                tell(True)
                try:
                    event = next(events)
                except StopIteration:
                    return
                except Exception as error:  # whatever it is, the others must have it too
                    settle(model.group, error)
                    raise
                yield event
        finally:
            tell(False)


def follow(model: Model, processor: Processor, store: PromptStore | None) -> None:
    """On the machines behind the first of those that share a model: take part in its replies until it releases them."""
    while (asked := hear()) is not None:
        prompt, options = asked
        with closing(generation_events(model, processor, prompt, options, 0, store)) as events:
            while hear():
                try:
                    next(events, None)
                except Exception as error:  # of this reply: the first machine goes on
                    settle(model.group, error)


def run(model: Model, processor: Processor, asked: Asked, store: PromptStore | None) -> Events:
    prompt, scope, adapter = asked.prompt, asked.options.scope, asked.adapter
    row, length = Row(processor, asked), len(prompt)
    needed = predict(footprint_of(model), length, asked.limit)
    mx.reset_peak_memory()
    with (
        bounded_memory.request(needed),
        opened(store, model, processor, prompt, asked.limit, needed.peak, scope, adapter) as reading,
    ):
        caches = reading.caches
        row.cached = caches.length
        yield Reading(caches.length, length)
        for hidden in model.read(prompt, caches, reading.chunk, adapter):  # noqa: B007
            reading.keep()
            yield Reading(caches.length, length)
        state, given = begin(model, processor, asked, hidden[:, -1:])
        piece = row.take(given)
        reading.ids += given.tokens
        yield piece
        if row.finish_reason is None:
            batch, seat = Batch(model), given.seat
            batch.put(seat, caches, state)
            try:
                while row.finish_reason is None:
                    for given in batch.step():
                        piece = row.take(given)
                        reading.ids += given.tokens
                        yield piece
            finally:
                batch.remove(seat, caches)
    yield row.finish()


def begin(model: Model, processor: Processor, asked: Asked, hidden: mx.array) -> tuple[State, Given]:
    """The state of a row whose prompt has been read, and its first token. hidden: [1, 1, D], of the last position."""
    options, config, constraint = asked.options, model.config, asked.constraint
    bias = {int(token): float(value) for token, value in (options.logit_bias or {}).items()}
    call = processor.tokenizer.token_to_id(TOOL_CALL_OPEN)
    if options.tool_choice == "none" and call is not None:
        bias[call] = -math.inf
    tells = options.logprobs is not None
    sampler = Sampler(options.sampling, config.generation, config.text.vocab_size, bias, tells)
    stages = replace(sampler.stages, pauses=constraint is not None, adapts=asked.adapter > 0)
    seat = Seat(stages, len(asked.prompt), asked.limit, asked.drafts, constraint)
    return first_token(model, sampler, asked.prompt, hidden, options.sampling.seed, seat, asked.adapter)


def first_token(
    model: Model, sampler: Sampler, prompt: Prompt, hidden: mx.array, seed: int | None, seat: Seat, adapter: int = 0
) -> tuple[State, Given]:
    """The state of a row whose prompt has been read, and its first token. hidden: [1, 1, D], of the last position.
    seed: None for one by chance."""
    seed, constraint = secrets.randbits(64) if seed is None else seed, seat.constraint
    bits = None if constraint is None or not constraint.binds else mx.array(constraint.mask())[None, None]
    state = first_state(model, sampler, prompt.token_ids, hidden, seed, bits, adapter)
    if constraint is not None:
        state["pauses"] = mx.array([constraint.pauses])
    tokens, told = tokens_of(state["token"]), state.pop("told", None)
    if constraint is not None and NOT_FINITE not in tokens:
        constraint.advance(tokens)
    return state, Given(seat, None, tokens, None if told is None else np.asarray(told)[0])


def prompt_told(model: Model, hidden: mx.array, token_ids: list[int], adapter: int) -> np.ndarray:
    """How likely tokens of a prompt were, sampling.told, from the hidden states before them, [1, L, hidden]."""
    adapters, found = mx.array([adapter]) if adapter else None, []
    for start in range(0, len(token_ids), SCORED):
        ids = mx.array(token_ids[start : start + SCORED])[None]
        logits = model.language_model.head(hidden[:, start : start + ids.shape[1]], adapters)
        found.append(np.asarray(model.agreed(told(logits, ids))[0])[0])
    return np.concatenate(found)


class BoundedMemory:
    """While generating, weights and caches stay wired on Metal and MLX keeps few freed buffers.

    MLX's limits are those of the process: the first of requests that overlap sets them, and the last sets them back.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.needed: list[Prediction] = []  # of the requests in work
        self.buffers, self.wired = 0, 0  # the limits before

    @contextmanager
    def request(self, needed: Prediction) -> Iterator[None]:
        """needed: what the model and the request's caches take at most; no more than these is wired."""
        with self.lock:
            self.needed.append(needed)
            wired = self.wire()
            if len(self.needed) == 1:
                self.buffers, self.wired = mx.set_cache_limit(BUFFER_CACHE_BYTES), wired
        try:
            yield
        finally:
            with self.lock:
                self.needed.remove(needed)
                if not self.needed:
                    mx.set_cache_limit(self.buffers)
                if mx.metal.is_available():
                    mx.synchronize()
                self.wire()

    def wire(self) -> int:
        """Set the limit to what the requests in work take; the limit before, 0 without Metal."""
        if not mx.metal.is_available():
            return 0
        most = int(mx.device_info()["max_recommended_working_set_size"])
        models = {own.weights + own.drafter for own in self.needed}  # requests share their model's weights
        needed = sum(models) + sum(own.peak - own.weights - own.drafter for own in self.needed)
        return mx.set_wired_limit(min(most, needed) if self.needed else self.wired)


bounded_memory = BoundedMemory()
