"""From a request to a reply, piece by piece."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast

import mlx.core as mx

from mlx_gemma4.decoding.controller import FixedLength, Pace, RoundClock
from mlx_gemma4.decoding.round import NONE, State, compiled_round, first_state, launch, learnt_of
from mlx_gemma4.decoding.sampling import Sampler, Sampling, settled
from mlx_gemma4.decoding.store import PromptStore
from mlx_gemma4.engine.reading import opened
from mlx_gemma4.engine.request import Options, Request
from mlx_gemma4.engine.row import Row
from mlx_gemma4.errors import a
from mlx_gemma4.model.cache import ROUND, Caches
from mlx_gemma4.model.model import Model, check_process
from mlx_gemma4.planner import check_memory, footprint, predict
from mlx_gemma4.prompt.processor import Processor
from mlx_gemma4.prompt.prompt import Prompt, check_length
from mlx_gemma4.reply.repetition import parse_repetition_detection
from mlx_gemma4.reply.reply import Piece, Reply, collect
from mlx_gemma4.weights.load import parameters

SEEDED_LENGTH = 3  # drafts a round for "auto" when a reply is to be the same again

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
) -> Reply:
    """The whole reply to a request.

    request: a string (one user turn, with `images`, `audios`, `videos` placed before it and `system` in a turn of
    its own), chat messages, or a `Prompt`. store: where what is read is kept, and found again. repetition_detection:
    "auto", "off", or a dict with max_pattern_size, min_pattern_size and min_count, as vLLM has it: a reply that does
    nothing but repeat a block ends, with the finish_reason "repetition". ValueError if any of it is wrong, MemoryError
    if this machine cannot hold the model and the prompt.
    """
    return collect(
        stream_generate(
            model, processor, request, images, audios, videos, system, tools, thinking, image_budget, max_tokens,
            sampling, draft_length, store=store, preserve_thinking=preserve_thinking,
            repetition_detection=repetition_detection,
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
) -> Iterator[Piece]:
    """The reply piece by piece; takes what `generate` takes. Request and memory are checked when this is called."""
    if not isinstance(model, Model):
        raise ValueError(f"model is {a(model)}; expected what load returns")
    request_ = Request(
        content=request, images=images, audios=audios, videos=videos, system=system, tools=tools, thinking=thinking,
        image_budget=image_budget, preserve_thinking=preserve_thinking,
    )  # fmt: skip
    options = Options(
        max_tokens=max_tokens,
        sampling=sampling,
        draft_length=draft_length,
        repetition_detection=repetition_detection,
    )
    prompt, prepared = request_.timed_prompt(processor)
    events = generation_events(model, processor, prompt, options, prepared, store)
    check_memory(footprint(model.config, parameters(model)), len(prompt), max_tokens)
    return (event for event in events if isinstance(event, Piece))


def generation_events(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    options: Options,
    prepared: float,
    store: PromptStore | None = None,
) -> Iterator[Reading | Piece]:
    """Check the request against the model, then give what happens: how far the prompt is read, then the pieces.

    The model's weights are not touched before the first of these is asked for. prepared: seconds that making the
    prompt took, which count for the time to first token.
    """
    check_process()
    check_length(prompt, model.config)
    return run(model, processor, prompt, options, choose_pace(model, options), prepared, store)


def choose_pace(model: Model, options: Options) -> Pace:
    """With a seed "auto" is one length: which random number decides on which token must not hang on measured times."""
    length, sampling = options.draft_length, options.sampling
    if model.drafter is None and length not in ("auto", 0):
        raise ValueError(f"draft_length is {length} and the model has no drafter; expected 0, or load one")
    if length != "auto":
        return FixedLength(int(length))
    if model.drafter is None:
        return FixedLength(0)
    is_greedy = settled(sampling, model.config.generation).temperature == 0
    return learnt_of(model).controller if sampling.seed is None or is_greedy else FixedLength(SEEDED_LENGTH)


def run(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    options: Options,
    pace: Pace,
    prepared: float,
    store: PromptStore | None,
) -> Iterator[Reading | Piece]:
    config, length, sampling = model.config, len(prompt), options.sampling
    limit = min(int(options.max_tokens), config.text.max_position_embeddings - length)
    repetition = parse_repetition_detection(options.repetition_detection)
    row = Row(processor, prompt, config.generation.eos_token_ids, limit, repetition, prepared)
    sampler = Sampler(sampling, config.generation, config.text.vocab_size)
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    needed = predict(footprint(config, parameters(model)), length, limit).peak
    mx.reset_peak_memory()
    with (
        bounded_memory.request(needed),
        opened(store, model, processor, prompt, limit, needed, options.scope) as reading,
    ):
        caches = reading.caches
        row.cached = caches.length
        yield Reading(caches.length, length)
        for hidden in model.read(prompt, caches, reading.chunk):  # noqa: B007
            reading.keep()
            yield Reading(caches.length, length)
        state = first_state(model, sampler, prompt.token_ids, hidden[:, -1:], seed)
        tokens = tokens_of(state["token"])
        piece = row.take(tokens)
        reading.ids += tokens
        yield piece
        if row.finish_reason is None:
            for drafted, tokens in decode(model, sampler, caches, state, pace, limit):
                piece = row.take(tokens, drafted)
                reading.ids += tokens
                yield piece
                if row.finish_reason is not None:
                    break
    yield row.finish()


def decode(
    model: Model, sampler: Sampler, caches: Caches, state: State, pace: Pace, limit: int
) -> Iterator[tuple[int, list[int]]]:
    """Rounds until `limit` tokens: (tokens drafted, ids). The prompt is cached and the newest token is known.

    The host runs one round behind: while it reads the tokens of one round, the device works on the next.
    """
    count, length = 1, caches.length  # tokens known, positions before them
    waiting: tuple[int, mx.array] | None = None
    clock = RoundClock()
    while count < limit:
        following = None
        least, most = (1, waiting[0] + 1) if waiting else (0, 0)  # tokens of the round that is waited for
        if count + least < limit:
            draft = pace.choose()
            caches.reserve(length + count - 1 + most + ROUND)
            round_, is_new = compiled_round(model, sampler, draft, caches)
            clock.launched(draft, is_new)
            tokens, state = launch(round_, state, caches)
            following = draft, tokens
        if waiting is not None:
            draft, tokens = waiting
            ids = [token for token in tokens_of(tokens) if token != NONE]
            count += len(ids)
            pace.record(draft, len(ids) - 1, clock.read())
            yield draft, ids
            clock.resumed()
        waiting = following


def tokens_of(array: mx.array) -> list[int]:
    """The one place where the host waits for the device."""
    return cast(list[int], array.tolist())


class BoundedMemory:
    """While generating, weights and caches stay wired on Metal and MLX keeps few freed buffers.

    MLX's limits are those of the process: the first of requests that overlap sets them, and the last sets them back.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.peaks: list[int] = []  # of the requests in work
        self.buffers, self.wired = 0, 0  # the limits before

    @contextmanager
    def request(self, peak: int) -> Iterator[None]:
        """peak: bytes that the model and the request's caches take at most; no more than these is wired."""
        with self.lock:
            if not self.peaks:
                self.buffers = mx.set_cache_limit(BUFFER_CACHE_BYTES)
            self.peaks.append(peak)
            before = self.wire()
            if len(self.peaks) == 1:
                self.wired = before
        try:
            yield
        finally:
            with self.lock:
                self.peaks.remove(peak)
                if not self.peaks:
                    mx.set_cache_limit(self.buffers)
                if mx.metal.is_available():
                    mx.synchronize()
                self.wire()

    def wire(self) -> int:
        """Set the limit to what the requests in work take; the limit before, 0 without Metal."""
        if not mx.metal.is_available():
            return 0
        most = int(mx.device_info()["max_recommended_working_set_size"])
        return mx.set_wired_limit(min(most, sum(self.peaks)) if self.peaks else self.wired)


bounded_memory = BoundedMemory()
